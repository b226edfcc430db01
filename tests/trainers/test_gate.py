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


def test_what_a_poisoned_hour_taught_is_not_served(tmp_path: Path) -> None:
    stream = [*events(0, 12_000), *events(12_000, 3_000, flipped=True)]
    one = trainer(tmp_path)
    one.run(sr.Memory(stream[:12_000]))
    store = one.store
    assert store is not None
    before, served = loss_of(store, events(90_000, 2000)), store.served.pinned()
    # what was learned in the hour is tried after it, on labels that are right again
    poisoned = sr.FM(SCHEMA, dim=4)
    poisoned.load_state_dict(one.model.state_dict())  # type: ignore[attr-defined]
    alone = sr.OnlineTrainer(model=poisoned, store=tmp_path)
    alone.push(stream[12_000:])
    number = alone.publish().number
    # a gate tries the newest version there is when a trial begins: so nothing newer may be published until then
    again = trainer(tmp_path)
    again.checkpoint_every, again.checkpoint_seconds = 100_000, 1e9
    again.run(sr.Memory([*stream[:12_000], *events(20_000, 6_000)]))
    assert any(f"version {number} is turned down: it is worse" in why for why in reasons(store))
    assert number not in [decision.version for decision in store.served.history()]
    assert loss_of(store, events(90_000, 2000)) <= before + 0.01
    assert served is not None


class Breaks(sr.Memory):
    """A source that is gone after so many events, as a process is that is killed: nothing is saved on the way out."""

    left = 5_000

    def read(self, limit: int) -> list[Any]:
        self.left -= limit
        if self.left < 0:
            raise sr.SourceError("gone")
        return super().read(limit)


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
        gate.update(clicked, gate.note(batch))
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
