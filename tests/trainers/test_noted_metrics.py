"""Metrics that note something of an impression, in a trainer: late labels, micro-batches, resuming, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import streamrec as sr
from streamrec.evaluators import GAUC, NDCG, Coverage
from streamrec.testing._state import first_difference

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


def events(count: int = 300) -> list[Any]:
    stream: list[Any] = []
    for n in range(count):
        features = {"request": f"r{n // 5}", "country": ["GB", "FR", None][n % 3]}
        stream.append(sr.Impression(f"i{n}", 10.0 * n, f"u{n % 7}", f"p{n % 11}", features))
        if n % 3 == 0:
            stream.append(sr.Feedback(f"c{n}", f"i{n}", 10.0 * n + 5))
        if n % 20 == 0:
            stream.append(sr.Labeled(sr.Impression(f"l{n}", 10.0 * n + 6, "u1", "p1", features), 1.0))
    return stream


def trainer(store: Any = None, metrics: Any = None) -> sr.OnlineTrainer:
    usual = [
        sr.AUC(),
        GAUC(),
        sr.Slices(by="country", metrics=[sr.CTR(), sr.AUC(), sr.GAUC(), sr.NDCG(k=3)]),
        NDCG(k=3),
        Coverage(size=11),
    ]
    return sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=4),
        join=sr.LabelJoin(windows={"click": 60.0}, lateness=5.0),
        metrics=usual if metrics is None else metrics,
        window=1000.0,
        store=store,
        checkpoint_every=100,
    )


def test_how_the_stream_is_cut_does_not_show() -> None:
    stream = events()
    whole, apart = trainer(), trainer()
    whole.push(stream)
    for event in stream:
        apart.push([event])
    ours, theirs = (dict(one.state_dict()) for one in (whole, apart))
    assert first_difference(ours["metrics"], theirs["metrics"]) is None
    report = whole.report()
    assert report.metrics == pytest.approx(apart.report().metrics, nan_ok=True)
    assert report.metrics["Coverage"] == 1.0
    assert 0.0 < report.metrics["NDCG@3"] <= 1.0
    assert report.metrics["CTR[country=GB]"] == 1.0  # every third impression is both clicked and from GB
    assert report.metrics["CTR[country=FR]"] < 0.2
    assert {"GAUC[country=FR]", "NDCG@3[country=FR]", "NDCG@3[country=(none)]"} <= {*report.metrics}
    assert {"GAUC", "CTR[country=GB]"} <= set(report.windows[1].metrics)
    assert "CTR[country=(none)]" in str(report)


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    stream = events()
    whole = trainer()
    whole.run(sr.Memory(stream))
    first = trainer(tmp_path)
    first.run(sr.Memory(stream), limit=170)
    again = trainer(tmp_path)
    again.run(sr.Memory(stream))
    ours, theirs = whole.state_dict(), again.state_dict()
    for part in ("model", "metrics", "counts"):
        assert first_difference(ours[part], theirs[part]) is None, part
    # the same rows wait, maybe in other slots
    waiting = [
        [notes[rows["times"].argsort(kind="stable")] for notes in rows["notes"]]
        for rows in (ours["rows"], theirs["rows"])
    ]
    assert first_difference(*waiting) is None


def test_a_checkpoint_while_nothing_waits(tmp_path: Path) -> None:
    labeled = [event for event in events() if isinstance(event, sr.Labeled)]
    trainer(tmp_path).run(sr.Memory(labeled))
    assert trainer(tmp_path).resume() is not None


def test_notes_of_other_metrics_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run(sr.Memory(events()))
    with pytest.raises(sr.ConfigError, match="metrics"):
        trainer(tmp_path, [sr.AUC()]).run(sr.Memory(events()))
