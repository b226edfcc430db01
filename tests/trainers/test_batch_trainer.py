"""BatchTrainer: epochs over an archive, early stopping, resuming, and going on in a stream, bit for bit."""

from __future__ import annotations

import io
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.errors import DamagedError
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part
from streamrec.testing._state import copy_state, first_difference
from streamrec.trainers import Cosine, Linear
from tests.trainers.conftest import LATENESS, WINDOWS, Logistic, Schema, make_stream

START = 1_700_000_000.0
SMALL = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("genres"), sr.Text("title"))


def parts() -> dict[str, Any]:
    join = sr.LabelJoin(windows=WINDOWS, lateness=LATENESS)
    return {"preprocessors": [sr.Dedup(ttl=600.0, capacity=10_000)], "join": join}


def fm(**settings: Any) -> sr.FM:
    return sr.FM(Schema, **{"dim": 4, "seed": 3, **settings})


def shown(count: int = 2000, seed: int = 0) -> list[sr.Labeled]:
    """Users like items of their own parity; one second apart."""
    rng = random.Random(seed)
    examples = []
    for n in range(count):
        user, item = rng.randrange(40), rng.randrange(40)
        features = {"genres": rng.sample("abc", rng.randrange(3)), "title": f"title {item}"}
        one = sr.Impression(f"i{n}", START + n, f"u{user}", f"p{item}", features if n % 9 else {})
        examples.append(sr.Labeled(one, float(rng.random() < (0.7 if (user + item) % 2 else 0.1)), weight=1.0 + n % 2))
    return examples


def rows_of(examples: list[sr.Labeled]) -> LabeledRows:
    labels = np.array([one.label for one in examples], dtype=np.float32)
    weights = np.array([one.weight for one in examples], dtype=np.float32)
    return LabeledRows(encode(SMALL, [one.impression for one in examples]).batch, labels, weights)


def dataset(uri: str, examples: list[sr.Labeled], files: int = 3) -> sr.EncodedRows:
    pytest.importorskip("pyarrow")
    cuts = np.linspace(0, len(examples), files + 1).astype(int).tolist()
    written = [
        write_part(uri, f"part-{n}", [rows_of(examples[begin:end])] if end > begin else [])
        for n, (begin, end) in enumerate(pairwise(cuts))
    ]
    commit_rows(uri, SMALL, written, {"duplicate": 2})
    return sr.EncodedRows(uri)


def assert_same(one: Any, other: Any) -> None:
    assert first_difference(copy_state(one.state_dict()), copy_state(other.state_dict())) is None


class Broken:
    """Rows that fail when so many reads were done."""

    def __init__(self, rows: Any, reads: int) -> None:
        self.rows, self.left = rows, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def read(self, limit: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return self.rows.read(limit)


# -- batch, then stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0.3, 0.7])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [{}, {"optimizer": sr.Adam()}])
def test_batch_first_then_stream_equals_the_stream(seed: int, cut: float, settings: dict[str, Any]) -> None:
    stream = make_stream(seed, 200)
    at = int(cut * len(stream))
    whole = sr.OnlineTrainer(model=fm(**settings), **parts())
    whole.run(sr.Memory(stream))

    shared = parts()
    batch = sr.BatchTrainer(model=fm(**settings), window=37)
    batch.run(sr.JoinedEvents(sr.Memory(stream[:at]), schema=Schema, **shared))
    online = sr.OnlineTrainer(model=batch.model, **shared)
    online.run(sr.Memory(stream[at:]))

    assert_same(online.model, whole.model)
    assert online.join is not None and whole.join is not None
    assert online.join.counts == whole.join.counts and online.join.pending == whole.join.pending
    assert len(online._rows) == len(whole._rows)


def test_a_stream_goes_on_from_the_store_of_a_batch_training(tmp_path: Path) -> None:
    stream = make_stream(5, 200)
    whole = sr.OnlineTrainer(model=fm(), **parts())
    whole.run(sr.Memory(stream))
    batch = sr.BatchTrainer(model=fm(), store=tmp_path)
    batch.run(sr.JoinedEvents(sr.Memory(stream[:150]), schema=Schema, **parts()))
    assert sr.Scorer(str(tmp_path)).version.number == 1

    online = sr.OnlineTrainer(model=fm(), store=tmp_path, **parts())
    online.run(sr.Memory(stream[150:]))
    assert_same(online.model, whole.model)
    again = sr.OnlineTrainer(model=fm(), store=tmp_path, **parts())  # now it has checkpoints of its own
    again.run(sr.Memory(stream[150:]))
    assert_same(again.model, whole.model)
    with pytest.raises(sr.ConfigError, match="was not cut by a BatchTrainer"):
        batch.run(sr.JoinedEvents(sr.Memory(stream), schema=Schema, **parts()))


def test_a_stream_does_not_go_on_from_half_a_training(tmp_path: Path) -> None:
    batch = sr.BatchTrainer(model=sr.FM(SMALL), store=tmp_path, window=100, checkpoint_seconds=1e-9)
    with pytest.raises(OSError, match="the disk is gone"):
        batch.run(Broken(sr.JoinedEvents(sr.Memory(shown()), schema=SMALL), 3))
    with pytest.raises(sr.ConfigError, match="has not ended: run that BatchTrainer again"):
        sr.OnlineTrainer(model=sr.FM(SMALL), store=tmp_path).run(sr.Memory([]))


# -- epochs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["events", "rows"])
@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_training_that_broke_ends_as_one_that_did_not(tmp_path: Path, kind: str, stop: int) -> None:
    examples = shown(1000)

    def source() -> Any:
        if kind == "rows":
            return dataset(str(tmp_path / "data"), examples)
        return sr.JoinedEvents(sr.Memory(examples), schema=SMALL, preprocessors=[sr.Dedup(ttl=60.0, capacity=100)])

    def trainer(store: Path | None) -> sr.BatchTrainer:
        return sr.BatchTrainer(
            model=sr.FM(SMALL, dim=4),
            epochs=3,
            window=150,
            shuffle=True,
            validation=0.2,
            patience=3,
            schedule=Cosine(warmup=0.1, end=0.1),
            store=store,
            checkpoint_seconds=1e-9,
        )

    whole = trainer(None)
    report = whole.run(source())
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path / "store").run(Broken(source(), stop))
    resumed = trainer(tmp_path / "store")
    assert resumed.run(source()).metrics == report.metrics
    assert_same(resumed.model, whole.model)
    assert resumed.history == whole.history and len(whole.history) == 3
    once_more = trainer(tmp_path / "store")
    assert once_more.run(source()).counts["learned"] == report.counts["learned"]
    assert_same(once_more.model, whole.model)
    with pytest.raises(sr.ConfigError, match="epochs=3 there and 4 here"):
        sr.BatchTrainer(model=sr.FM(SMALL, dim=4), epochs=4, store=tmp_path / "store").run(source())


def test_rows_from_events_and_from_parquet_teach_the_same(tmp_path: Path) -> None:
    examples = shown(1500)
    models = []
    for rows in (
        dataset("memory://teach", examples),
        dataset(str(tmp_path), examples, files=1),
        sr.JoinedEvents(sr.Memory(examples), schema=SMALL),
    ):
        trainer = sr.BatchTrainer(model=sr.FM(SMALL, dim=4), epochs=2, window=100, shuffle=True, seed=5)
        trainer.run(rows)
        models.append(trainer.model)
    assert_same(models[0], models[1])
    assert_same(models[0], models[2])


def test_early_stopping_keeps_the_best_epoch() -> None:
    rows = sr.JoinedEvents(sr.Memory(shown(1000)), schema=SMALL)
    trainer = sr.BatchTrainer(
        model=sr.FM(SMALL, dim=16, init=0.3, optimizer=sr.Adagrad(lr=0.5)),
        epochs=30,
        window=200,
        validation=0.3,
        patience=2,
        metrics=[sr.AUC(), sr.NormalizedEntropy()],
    )
    report = trainer.run(rows)
    losses = [one["LogLoss"] for one in trainer.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30 and report.counts["best_epoch"] == best + 1
    assert report.metrics == trainer.history[best] and {*report.metrics} == {"LogLoss", "AUC", "NormalizedEntropy"}
    assert report.counts["learned"] == 700 * len(losses)
    judged = rows_of(shown(1000)[700:])
    loss = sr.LogLoss()
    loss.update(judged.labels, trainer.model.predict(judged.batch), judged.weights)
    assert loss.compute() == pytest.approx(report.metrics["LogLoss"], rel=1e-9)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("screen", "progress"), [(Terminal, True), (Terminal, False), (io.StringIO, True)])
def test_progress_is_drawn_on_terminals_only(screen: Any, progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = screen()
    monkeypatch.setattr(sys, "stderr", drawn)
    trainer = sr.BatchTrainer(model=sr.FM(SMALL, dim=4), epochs=2, window=100, validation=0.2, patience=2)
    trainer.run(sr.JoinedEvents(sr.Memory(shown(400)), schema=SMALL), progress=progress)
    assert ("100%" in drawn.getvalue() and "LogLoss=" in drawn.getvalue()) is (screen is Terminal and progress)
    assert bool(drawn.getvalue()) is (screen is Terminal and progress)


def test_shuffling_is_seeded_and_within_windows() -> None:
    class Order(Logistic):
        def __init__(self) -> None:
            super().__init__(SMALL)
            self.times: list[float] = []

        def learn(self, batch: sr.Batch, labels: Any, weights: Any = None) -> None:
            self.times += batch.times.tolist()

    def order(seed: int) -> list[float]:
        trainer = sr.BatchTrainer(model=Order(), epochs=2, window=100, shuffle=True, seed=seed)
        trainer.run(sr.JoinedEvents(sr.Memory(shown(300)), schema=SMALL))
        return trainer.model.times  # type: ignore[attr-defined]

    once = order(1)
    assert order(1) == once != order(2)
    for begin in range(0, 600, 100):
        window = [START + n for n in range(begin % 300, begin % 300 + 100)]
        assert sorted(once[begin : begin + 100]) == window != once[begin : begin + 100]
    assert once[:300] != once[300:]


# -- the learning rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [sr.SGD(), sr.Adagrad(), sr.Adagrad(row_wise=True), sr.Adam()])
def test_a_rate_is_a_learning_rate(rule: Any) -> None:
    halved = type(rule)(**{**{n: getattr(rule, n) for n in rule.__struct_fields__}, "lr": rule.lr / 2})
    one, other = sr.FM(SMALL, optimizer=rule, dim=4), sr.FM(SMALL, optimizer=halved, dim=4)
    one.rate = 0.5
    for model in (one, other):
        model.learn(*rows_of(shown(300)))
    assert_same(one, other)


def test_a_rate_does_not_move_what_ftrl_has_learned() -> None:
    model = sr.FM(SMALL, dim=4, optimizer=sr.FTRL())
    rows = rows_of(shown(300))
    model.learn(*rows)
    before = model.predict(rows.batch)
    model.rate = 0.0
    model.learn(*rows)
    assert np.abs(model.predict(rows.batch) - before).max() < 1e-6
    moved = []
    for rate in (0.5, 1.0):
        twin = sr.FM(SMALL, dim=4, optimizer=sr.FTRL())
        twin.load_state_dict(model.state_dict())
        twin.rate = rate
        bias = twin.bias.item()
        twin.learn(*rows.take(slice(0, 1)))
        moved.append(twin.bias.item() - bias)
    assert moved[0] == pytest.approx(moved[1] / 2, rel=1e-3)
    with pytest.raises(sr.ConfigError, match="rate must be from 0 to 1000"):
        model.rate = -1.0


def test_schedules() -> None:
    told: list[float] = []
    trainer = sr.BatchTrainer(
        model=sr.FM(SMALL), epochs=2, window=100, schedule=lambda done: told.append(done) or Linear(end=0.5)(done)
    )
    trainer.run(sr.JoinedEvents(sr.Memory(shown(200)), schema=SMALL))
    assert told == [0.0, 0.25, 0.5, 0.5, 0.75, 1.0]  # the last read of an epoch finds its end
    assert trainer.model.rate == 1.0  # type: ignore[attr-defined]
    with pytest.raises(sr.ConfigError, match="has no `rate`"):
        sr.BatchTrainer(model=Logistic(SMALL), schedule=Linear())
    with pytest.raises(sr.ConfigError, match="warmup must be a share"):
        Cosine(warmup=1.0)
    with pytest.raises(sr.ConfigError, match="end must be a rate"):
        Linear(end=2.0)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"patience": 0}, "patience must be >= 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"validation": 1.0}, "validation must be a share"),
        ({"checkpoint_seconds": 0.0}, "checkpoint_seconds must be > 0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(sr.ConfigError, match=message):
        sr.BatchTrainer(model=sr.FM(SMALL), **settings)


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(sr.StoreError, match="there is no data set of encoded rows"):
        sr.EncodedRows(str(tmp_path / "none"))
    rows = dataset(str(tmp_path), shown(100))
    with pytest.raises(sr.SchemaError, match="differs from that of the rows"):
        sr.BatchTrainer(model=fm()).run(rows)
    with pytest.raises(sr.ConfigError, match="limit must be >= 1"):
        rows.read(0)
    with pytest.raises(sr.StoreError, match="has 100 rows"):
        rows.load_state_dict({"row": 101})
    files = sorted((tmp_path / "rows").glob("*.parquet"))
    files[1].write_bytes(files[1].read_bytes()[:-20])
    with pytest.raises(DamagedError, match="cannot be read"):
        rows.read(100)
    files[1].unlink()
    rows.load_state_dict({"row": 0})
    with pytest.raises(DamagedError, match="lacks the file"):
        rows.read(100)
    (tmp_path / "rows" / "rows.json").write_text("{}")
    with pytest.raises(DamagedError, match="is damaged"):
        sr.EncodedRows(str(tmp_path))


def test_encoded_rows_are_as_written(tmp_path: Path) -> None:
    examples = shown(1000)
    rows = dataset(str(tmp_path), examples, files=4)
    assert len(rows) == 1000 and rows.span() == (START, START + 999) and rows.counts == {"duplicate": 2}
    assert len(rows.only([1, 2])) == 500 and rows.only([1]).span() == (START + 250, START + 499)
    assert rows.only([1, 2]).since(START + 499.5).span() == (START + 500, START + 749) and not len(
        rows.since(START + 1e4)
    )
    read, sizes = [], random.Random(0)
    while (part := rows.read(sizes.randrange(1, 400))) is not None:
        read.append(part)
        rows.load_state_dict(rows.state_dict())
    found, whole = LabeledRows.concatenated(read), rows_of(examples)
    assert rows.fraction() == 1.0
    for name in ("ids", "values", "fields", "starts", "ends", "times"):
        np.testing.assert_array_equal(getattr(found.batch, name), getattr(whole.batch.compact(), name))
    np.testing.assert_array_equal(found.labels, whole.labels)
    np.testing.assert_array_equal(found.weights, whole.weights)

    def texts(batch: sr.Batch) -> list[list[str | None]]:
        return [[batch.texts[ref] if ref >= 0 else None for ref in refs] for refs in batch.text_refs.tolist()]

    assert texts(found.batch) == texts(whole.batch) and [None] in texts(found.batch)
    commit_rows(str(tmp_path), SMALL, [write_part(str(tmp_path), "other", [whole])])
    assert len([*(tmp_path / "rows").iterdir()]) == 2  # the files before are gone
    assert not len(dataset(str(tmp_path / "empty"), [])) and dataset(str(tmp_path / "empty"), []).read(5) is None
