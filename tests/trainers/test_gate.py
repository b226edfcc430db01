"""What is served gets better or stays: promotions, refusals, rollbacks, and how often a gate errs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.storage import Store
from streamrec.testing._state import first_difference
from streamrec.trainers import Gate

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))
_stores = itertools.count()


def events(first: int, count: int, flipped: bool = False) -> list[sr.Labeled]:
    """Users like the items that their number says, nine times of ten."""
    rng = np.random.default_rng(first)
    users, items, noise = rng.integers(20, size=count), rng.integers(12, size=count), rng.random(count)
    likes = ((users * 7 + items * 5) % 3 == 0) ^ (noise < 0.1) ^ flipped
    return [
        sr.Labeled(sr.Impression(f"i{first + n}", 10.0 * (first + n), f"u{users[n]}", f"p{items[n]}"), float(likes[n]))
        for n in range(count)
    ]


def trainer(store: Any, keep: int = 2, **options: Any) -> sr.OnlineTrainer:
    settings = {"worse": 0.05, "watch": 3000, "every": 1000, "patience": 20_000, **options}
    return sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=4),
        metrics=[sr.LogLoss()],
        store=Store(store, keep=keep, clock=lambda: 0.0),
        checkpoint_every=500,
        batch_size=100,
        background=False,
        gate=Gate(**settings),
    )


def loss_of(store: Store, shown: list[sr.Labeled]) -> float:
    """Of the version that is served."""
    metric = sr.LogLoss()
    labels = np.array([one.label for one in shown], dtype=np.float32)
    metric.update(labels, sr.Scorer(store).score([one.impression for one in shown]))
    return metric.compute()


def reasons(store: Store) -> list[str]:
    return [decision.why for decision in store.served.history()]


def test_a_better_version_is_promoted_and_scorers_get_it(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.run(sr.Memory(events(0, 500)))
    store = one.store
    assert store is not None
    first = loss_of(store, events(90_000, 2000))
    assert store.served.version() == 1
    again = trainer(tmp_path)
    again.run(sr.Memory(events(0, 12_000)))
    assert any(why.startswith("not worse than version 1: its log loss differs by -") for why in reasons(store))
    assert loss_of(store, events(90_000, 2000)) < first - 0.05
    assert {store.served.pinned()} <= {version.number for version in store.versions.list()}


class Breaks(sr.Memory):
    """A source that is gone after so many events, as a process is that is killed: nothing is saved on the way out."""

    left = 5_000

    def read(self, limit: int) -> list[Any]:
        self.left -= limit
        if self.left < 0:
            raise sr.SourceError("gone")
        return super().read(limit)


HOUR = slice(8_000, 14_000)  # of the stream below
TAIL = 6_000


@pytest.fixture(scope="module")
def poisoned() -> list[sr.Labeled]:
    hour = HOUR.stop - HOUR.start
    return [*events(0, HOUR.start), *events(HOUR.start, hour, flipped=True), *events(HOUR.stop, TAIL)]


@pytest.fixture(scope="module")
def undisturbed() -> list[sr.Labeled]:
    return [*events(0, HOUR.start), *events(HOUR.start, HOUR.stop - HOUR.start), *events(HOUR.stop, TAIL)]


def watchful(folder: Path, recover: bool = True, **options: Any) -> sr.OnlineTrainer:
    return trainer(folder, watch=7_000, every=500, recover=recover, **options)


def judged(one: sr.OnlineTrainer, stream: list[sr.Labeled], since: int) -> tuple[float, float]:
    """AUC and log loss of what was served from an event on."""
    one.run(sr.Memory(stream), limit=since)
    scores: list[float] = []
    push = one.push
    one.push = lambda some: scores.extend(push(some))  # type: ignore[assignment, func-returns-value]
    one.run(_from(stream, since))
    labels = np.array([each.label for each in stream[since:]], dtype=np.float32)
    metrics = sr.AUC(), sr.LogLoss()
    for metric in metrics:
        metric.update(labels, np.array(scores, dtype=np.float32))
    return metrics[0].compute(), metrics[1].compute()


def _from(stream: list[sr.Labeled], since: int) -> sr.Memory:
    source = sr.Memory(stream)
    source.read(since)
    return source


def test_what_a_poisoned_hour_taught_is_unlearned(
    tmp_path: Path, poisoned: list[sr.Labeled], undisturbed: list[sr.Labeled]
) -> None:
    since = HOUR.stop + 2_000
    best = judged(watchful(tmp_path / "undisturbed"), undisturbed, since)
    left = judged(watchful(tmp_path / "left", recover=False), poisoned, since)
    one = watchful(tmp_path / "mended")
    mended = judged(one, poisoned, since)
    assert mended[0] > best[0] - 0.002 and mended[1] < best[1] + 0.01
    assert left[1] > best[1] + 0.1, "it makes a difference"
    told = one.store.served.history()  # type: ignore[union-attr]
    back = next(n for n, decision in enumerate(told) if "the learner goes back to the checkpoint" in decision.why)
    assert told[back - 1].version == told[back].version, "the same version is served"
    assert 10.0 * HOUR.stop < told[back].time < 10.0 * (HOUR.stop + 5_000)  # type: ignore[operator]
    counts = one.report().counts
    assert 6_000 < counts["unlearned"] < 10_000 and counts["learned"] == counts["events"] == len(poisoned)
    # the verdict came within 5,000 events of the end of the hour, and not before
    first = watchful(tmp_path / "first")
    first.run(sr.Memory(poisoned), limit=HOUR.stop)
    assert first.report().counts["unlearned"] == 0
    first.run(_from(poisoned, HOUR.stop), limit=1_000)
    assert first.report().counts["unlearned"] == counts["unlearned"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, poisoned: list[sr.Labeled]) -> sr.OnlineTrainer:
    one = watchful(tmp_path_factory.mktemp("whole"))
    one.run(sr.Memory(poisoned[: HOUR.stop + 1_500]))
    return one


@pytest.mark.parametrize("moment", ["verdict", "reload", "later"])
def test_a_run_that_broke_unlearns_what_it_would_have(
    tmp_path: Path,
    whole: sr.OnlineTrainer,
    poisoned: list[sr.Labeled],
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = watchful(tmp_path / "parts")
    go_back = sr.OnlineTrainer._go_back

    def broken(self: sr.OnlineTrainer, version: int) -> None:
        if moment == "reload":
            go_back(self, version)
        raise sr.SourceError("gone")

    source = sr.Memory(poisoned[: HOUR.stop + 1_500])
    if moment == "later":
        source = Breaks(poisoned[: HOUR.stop + 1_500])
        source.left = HOUR.stop + 1_300
    else:
        monkeypatch.setattr(sr.OnlineTrainer, "_go_back", broken)
    with pytest.raises(sr.SourceError):
        parts.run(source)
    monkeypatch.undo()
    again = watchful(tmp_path / "parts")
    again.run(sr.Memory(poisoned[: HOUR.stop + 1_500]))
    assert whole.report().counts["unlearned"] > 0
    for part in ("model", "metrics", "gate", "counts"):
        assert first_difference(whole.state_dict()[part], again.state_dict()[part]) is None, part


def test_a_learner_whose_way_back_is_gone_goes_on(tmp_path: Path, poisoned: list[sr.Labeled]) -> None:
    one = watchful(tmp_path)
    one.run(sr.Memory(poisoned), limit=HOUR.stop)
    store = one.store
    assert store is not None
    one._saver.forget()  # the next one is whole, so that those before it can go
    one.checkpoint(_from(poisoned, HOUR.stop).position())
    store.checkpoints.only_newest()
    one.run(_from(poisoned, HOUR.stop), limit=1_000)
    assert any("it goes on as it is, for no checkpoint of that is left" in why for why in reasons(store))


def test_a_run_that_broke_decides_what_it_would_have(tmp_path: Path) -> None:
    stream = events(0, 9_000)
    whole = trainer(tmp_path / "whole")
    whole.run(sr.Memory(stream))
    with pytest.raises(sr.SourceError):
        trainer(tmp_path / "parts").run(Breaks(stream))
    again = trainer(tmp_path / "parts")
    again.run(sr.Memory(stream))
    for part in ("model", "metrics", "gate"):
        assert first_difference(whole.state_dict()[part], again.state_dict()[part]) is None, part
    assert reasons(whole.store) == reasons(again.store)  # type: ignore[arg-type]


class Noisy:
    """A model whose logit is a number for each row, read off the ids, plus noise and a shift of its own."""

    schema = SCHEMA

    def __init__(self, version: int, shift: float = 0.0, since: int = 0) -> None:
        self.version, self.shift, self.since = version, shift, since

    def predict(self, batch: sr.Batch) -> np.ndarray:
        rng = np.random.default_rng([self.version, int(batch.times[0])])
        shift = np.where(batch.times % 1e5 >= self.since, self.shift, 0.0)
        logits = batch.times % 7 - 4 + shift + rng.normal(0, 0.3, len(batch))
        return (1 / (1 + np.exp(-logits))).astype(np.float32)

    learn = state_dict = load_state_dict = None


def shadow(gate: Gate, shifts: dict[int, float], labels: int, seed: int, since: int = 0) -> Store:
    """Run a gate over labels of a known rate, with two versions that are shifted as said from label `since` on."""
    store = Store(f"memory://test-gate-{next(_stores)}")
    gate.recover = False  # there is no learner
    store.versions.write({})
    gate.attach(store, lambda number: Noisy(number + 100 * seed, shifts.get(number, 0.0), since))  # type: ignore[arg-type]
    gate.decide()
    store.versions.write({})
    gate.decide()
    rng = np.random.default_rng(seed)
    none = np.empty(0, dtype=np.int64)
    for start in range(0, labels, 250):
        times = np.arange(start, start + 250) + 1e5 * seed
        ends = np.zeros(250, dtype=np.int64)
        batch = sr.Batch(none, none.astype(np.float32), none.astype(np.int32), ends, ends, times=times)
        clicked = (rng.random(250) < 1 / (1 + np.exp(-(times % 7 - 4)))).astype(np.float32)
        gate.update(clicked, gate.note(batch), batch)
        if gate.due:
            gate.decide()
    return store


def test_of_equally_good_versions_few_are_called_worse_and_none_is_taken_back() -> None:
    wrong = 0
    for seed in range(100):
        store = shadow(Gate(worse=0.05, watch=4000, every=1000), {}, 8_000, seed)
        wrong += any("turned down" in why or "is worse than" in why for why in reasons(store))
    assert wrong <= 5


def test_a_worse_version_is_never_promoted_and_is_found_out() -> None:
    for seed in range(20):
        store = shadow(Gate(worse=0.01), {2: 1.0}, 5_000, seed)
        assert store.served.pinned() == 1
        assert any("turned down: it is worse" in why for why in reasons(store))


def test_a_champion_that_goes_wrong_is_taken_back_within_every_labels_twice_over() -> None:
    for seed in range(10):
        gate = Gate(worse=0.05, watch=50_000, every=1_000)
        store = shadow(gate, {2: 3.0}, 10_000, seed, since=8_000)
        told = reasons(store)
        assert any(why.startswith("not worse than version 1") for why in told)
        assert told[-1].startswith("version 2 is worse than 1: its log loss is higher by")
        assert store.served.pinned() == 1


def test_a_challenger_of_nan_is_turned_down_after_its_patience() -> None:
    store = shadow(Gate(patience=1000), {2: np.nan}, 2_000, 0)
    assert store.served.pinned() == 1
    assert any("turned down: no answer" in why for why in reasons(store))


def test_somebody_else_decides(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.run(sr.Memory(events(0, 12_000)))
    store = one.store
    assert store is not None
    assert one.gate is not None
    compared = one.gate.state_dict()["versions"].values()
    pinned = next(one.number for one in store.versions.list() if one.number not in compared)
    store.served.pin(pinned, why="it must be this one")
    again = trainer(tmp_path)
    again.run(sr.Memory(events(0, 12_500)))
    assert store.served.pinned() == pinned
    assert again.gate is not None and again.gate.state_dict()["versions"]["champion"] == pinned


def test_what_cannot_work_is_refused() -> None:
    for wrong in ({"worse": 0.0}, {"patience": 0}, {"watch": -1}, {"every": 0}, {"confidence": 1.0}):
        with pytest.raises(sr.ConfigError):
            Gate(**wrong)  # type: ignore[arg-type]
    with pytest.raises(sr.ConfigError, match="store"):
        sr.OnlineTrainer(model=sr.FM(SCHEMA), gate=Gate())
    with pytest.raises(sr.ConfigError, match="no store"):
        Gate().decide()
