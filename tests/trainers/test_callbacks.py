"""Callbacks: what is told and when, what they raise stops nothing, and what the writers have written is there."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import streamrec as sr
from streamrec.testing._state import first_difference
from streamrec.trainers import Callback, Progress
from streamrec.trainers.writers import Prometheus, TensorBoard, WandB

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))
EVENTS = [
    sr.Labeled(sr.Impression(f"i{n}", float(n), f"u{n % 7}", f"p{n % 4}"), float(n % 4 == 0 or n % 7 == 0))
    for n in range(1000)
]


def trainer(*callbacks: Callback, **options: Any) -> sr.OnlineTrainer:
    settings = {"checkpoint_every": 300, "batch_size": 100, "window": 250.0, **options}
    metrics = [sr.AUC(), sr.LogLoss()]
    return sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), metrics=metrics, callbacks=callbacks, **settings)


class Heard(Callback):
    """All that was said, in order."""

    every = 250

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.logs: list[Mapping[str, float]] = []
        self.evaluated: list[Mapping[str, float]] = []
        self.saved: list[int] = []

    def on_train_begin(self, progress: Progress) -> None:
        self.told.append(("begin", progress.events))

    def on_step_end(self, progress: Progress) -> None:
        self.told.append(("step", progress.events))

    def on_log(self, progress: Progress, logs: Mapping[str, float]) -> None:
        self.told.append(("log", progress.events))
        self.logs.append(logs)

    def on_evaluate(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        self.told.append(("evaluate", progress.events))
        self.evaluated.append(metrics)

    def on_save(self, progress: Progress, version: Any) -> None:
        self.told.append(("save", progress.events))
        self.saved.append(version.number)

    def on_train_end(self, progress: Progress) -> None:
        self.told.append(("end", progress.events))


def of(heard: Heard, what: str) -> list[int]:
    return [events for name, events in heard.told if name == what]


@pytest.mark.parametrize("background", [False, True])
def test_a_stream_tells_its_steps_logs_windows_and_checkpoints(tmp_path: Path, background: bool) -> None:
    heard = Heard()
    report = trainer(heard, store=tmp_path, background=background).run(sr.Memory(EVENTS))
    assert heard.told[0] == ("begin", 0) and heard.told[-1] == ("end", 1000)
    assert of(heard, "step") == [*range(100, 1100, 100)]
    assert of(heard, "log") == [300, 500, 800, 1000]
    assert heard.logs[-1]["AUC"] == report.metrics["AUC"] and heard.logs[-1]["counts/learned"] == 1000
    assert [one["window/start"] for one in heard.evaluated] == [0.0, 250.0, 500.0]
    assert heard.evaluated[0]["AUC"] == report.windows[0].metrics["AUC"]
    saved = [one.number for one in sr.Store(tmp_path).checkpoints.list()]
    assert heard.saved[-1] == saved[-1] and of(heard, "save")[-1] == 1000
    if not background:
        assert of(heard, "save") == [300, 600, 900, 1000] and heard.saved == [1, 2, 3, 4]


def test_a_run_that_is_resumed_goes_on_telling(tmp_path: Path) -> None:
    first, second = Heard(), Heard()
    trainer(first, store=tmp_path).run(sr.Memory(EVENTS), limit=400)
    trainer(second, store=tmp_path).run(sr.Memory(EVENTS))
    assert second.told[0] == ("begin", 400)
    assert of(second, "log") == [500, 800, 1000]


def test_your_own_loop_is_heard_as_well() -> None:
    heard = Heard()
    one = trainer(heard)
    one.push(EVENTS[:260])
    one.push(EVENTS[260:261])
    assert heard.told == [("step", 260), ("evaluate", 260), ("log", 260), ("step", 261)]


class Breaks(Callback):
    every = 100

    def on_step_end(self, progress: Progress) -> None:
        raise ValueError("no more room")

    def on_log(self, progress: Progress, logs: Mapping[str, float]) -> None:
        logs["AUC"] = 0.0  # type: ignore[index]  # others must not see it
        raise OSError("no network")


def test_what_a_callback_raises_is_counted_and_stops_neither_the_stream_nor_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard, quiet = Heard(), trainer()
    one = trainer(Breaks(), heard)
    with caplog.at_level(logging.ERROR):
        report = one.run(sr.Memory(EVENTS))
    assert report.counts["callback_errors"] == 10 + 10
    assert "callback_errors" in str(report)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"Breaks.{name} failed; the training goes on" for name in ("on_step_end", "on_log")], "each once"
    assert heard.logs[0]["AUC"] > 0.5
    quiet.run(sr.Memory(EVENTS))
    saved, expected = one.state_dict(), quiet.state_dict()
    assert first_difference({**saved, "seconds": 0}, {**expected, "seconds": 0}) is None


def test_a_batch_training_tells_its_epochs() -> None:
    heard = Heard()
    rows = sr.JoinedEvents(sr.Memory(EVENTS), schema=SCHEMA)
    batch = sr.BatchTrainer(
        model=sr.FM(SCHEMA, dim=4), epochs=2, window=200, validation=0.2, patience=2, callbacks=[heard, Breaks()]
    )
    report = batch.run(rows)
    assert [progress for name, progress in heard.told if name == "evaluate"] == [800, 1600]
    assert [one["LogLoss"] for one in heard.evaluated] == [one["LogLoss"] for one in batch.history]
    assert heard.told[0] == ("begin", 0) and heard.told[-1] == ("end", 1600)
    assert heard.logs[-1]["counts/learned"] == 1600 and report.counts["callback_errors"] > 0


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(sr.ConfigError, match="subclass of Callback, got 3"):
        trainer(3)  # type: ignore[arg-type]
    never = Heard()
    never.every = 0
    with pytest.raises(sr.ConfigError, match="every of Heard must be >= 1"):
        trainer(never)


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = trainer(TensorBoard(tmp_path / "tb", every=200), store=tmp_path / "ctr").run(sr.Memory(EVENTS))
    read = accumulator.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    auc = read.Scalars("AUC")
    assert [point.step for point in auc] == [200, 400, 600, 800, 1000]
    assert auc[-1].value == pytest.approx(report.metrics["AUC"])
    windows = read.Scalars("window/AUC")
    assert [point.value for point in windows] == pytest.approx([one.metrics["AUC"] for one in report.windows[:-1]])
    assert read.Scalars("counts/learned")[-1].value == 1000
    assert read.Scalars("checkpoint")[-1].value == sr.Store(tmp_path / "ctr").checkpoints.latest().number  # type: ignore[union-attr]


def test_prometheus_has_the_gauges(tmp_path: Path) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    first = trainer(Prometheus(registry, labels={"trainer": "a"}), store=tmp_path).run(sr.Memory(EVENTS))
    trainer(Prometheus(registry, labels={"trainer": "b"})).run(sr.Memory(EVENTS[:500]))
    scraped = client.generate_latest(registry).decode()
    value = registry.get_sample_value
    assert value("streamrec_metric", {"metric": "AUC", "of": "start", "trainer": "a"}) == first.metrics["AUC"]
    window = {"metric": "AUC", "of": "window", "trainer": "a"}
    assert value("streamrec_metric", window) == first.windows[-2].metrics["AUC"]
    assert 'streamrec_events{count="learned",trainer="b"} 500.0' in scraped
    saved = sr.Store(tmp_path).checkpoints.latest()
    assert saved is not None
    assert value("streamrec_checkpoint_created_seconds", {"trainer": "a"}) == saved.created


def test_wandb_has_the_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="ctr", settings=wandb.Settings(console="off"))
    report = trainer(WandB(run, every=200)).run(sr.Memory(EVENTS))
    folder = Path(run.dir).parent
    run.finish()
    (log,) = folder.glob("*.wandb")
    records: list[Any] = []
    for _ in range(600):  # its own process writes the file, and is not done when `finish` returns
        if log.stat().st_size > 7:
            store = datastore.DataStore()
            store.open_for_scan(str(log))
            records = []
            with suppress(AssertionError):  # of a record that is half there
                while (data := store.scan_data()) is not None:
                    records.append(messages.Record.FromString(data))
            store.close()
            if records and records[-1].WhichOneof("record_type") == "exit":
                break
        time.sleep(0.05)
    history = [one.history.item for one in records if one.WhichOneof("record_type") == "history"]
    rows = [{each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in row} for row in history]
    logged = [row for row in rows if "AUC" in row]
    assert [row["events"] for row in logged] == [200, 400, 600, 800, 1000]
    assert logged[-1]["AUC"] == pytest.approx(report.metrics["AUC"])
    assert [row["window/start"] for row in rows if "window/AUC" in row] == [0.0, 250.0, 500.0]
