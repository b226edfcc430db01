"""What holds for the package as a whole: its names, its weight, its wheel, its layers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import streamrec

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "streamrec").rglob("*.py"))
HEAVY = ("torch", "transformers", "numba", "numpy", "faust", "dask")


def python(code: str, executable: str | Path = sys.executable) -> str:
    """What `code` prints in an interpreter of its own, away from the checkout."""
    done = subprocess.run([executable, "-I", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = json.loads(python("import json, sys, streamrec; print(json.dumps(sorted(sys.modules)))"))
    assert "streamrec" in loaded
    assert not set(HEAVY) & set(loaded)


def test_every_public_name_is_declared_for_type_checkers_and_loads() -> None:
    declared = {
        name.asname or name.name
        for block in ast.parse(Path(streamrec.__file__).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for name in statement.names
    }
    assert declared == set(streamrec.__all__)
    assert len(streamrec.__all__) == len(declared)
    assert declared <= set(dir(streamrec))
    for name in streamrec.__all__:
        assert getattr(streamrec, name).__name__ == name
    with pytest.raises(AttributeError, match="'streamrec' has no attribute 'Click'"):
        _ = streamrec.Click


def test_the_wheel_installs_into_an_empty_environment(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    assert {path.relative_to(ROOT / "src").as_posix() for path in SOURCES} <= set(held)
    assert "streamrec/py.typed" in held
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in held)

    venv.create(tmp_path / "empty", with_pip=False)
    (empty,) = (tmp_path / "empty").glob("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [sys.executable, "-m", "pip", "--python", str(empty), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    version, home = python("import streamrec; print(streamrec.__version__); print(streamrec.__file__)", empty).split(
        "\n", 1
    )
    assert version == streamrec.__version__
    assert Path(home.strip()).is_relative_to(tmp_path)


def test_arrows_go_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT / "src").as_posix())
def test_nothing_is_unpickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & {
                name.name.split(".")[0] for name in node.names
            }
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "torch.load"
            assert not any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)


ON_IMPORT = """
import importlib, json, logging, os, pkgutil, random, signal, sys, threading
import fsspec, msgspec, numba, numpy, safetensors.torch, torch, tqdm  # what these do is theirs

class Argv(list):
    def refuse(self, *_):
        raise AssertionError("sys.argv was read on import")
    __getitem__ = __iter__ = __len__ = refuse

def state():
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "handlers": {
            name: found
            for name in (None, *(name for name in logging.root.manager.loggerDict if name.startswith("streamrec")))
            # a NullHandler writes nothing: mode gives one to the logger of each module with a Service
            if (found := [str(one) for one in logging.getLogger(name).handlers if type(one) is not logging.NullHandler])
        },
        "random": [str(random.getstate()), str(numpy.random.get_state()), torch.get_rng_state().tolist()],
        "environment": dict(os.environ),
        "torch threads": torch.get_num_threads(),
        "numpy errors": numpy.geterr(),
    }

before = state()
sys.argv = Argv()
import streamrec
missing = []
def skip(name):
    missing.append(name)
for module in pkgutil.walk_packages(streamrec.__path__, "streamrec.", onerror=skip):
    try:
        importlib.import_module(module.name)
    except ImportError:
        skip(module.name)
sys.argv = [""]
after = state()
changed = [name for name in before if before[name] != after[name]]
print(json.dumps({"changed": changed, "missing": missing, "modules": len(sys.modules)}))
"""


def test_nothing_happens_on_import() -> None:
    found = json.loads(python(ON_IMPORT))
    assert found["changed"] == []
    # the adapters need packages of their own, which may not be here
    assert [name for name in found["missing"] if not name.startswith("streamrec.adapters")] == []
