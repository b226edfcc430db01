"""What is served gets better or stays: promotions, refusals, rollbacks, and how often a gate errs."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
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


END = HOUR.stop + 1_500


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, poisoned: list[sr.Labeled]) -> sr.OnlineTrainer:
    one = watchful(tmp_path_factory.mktemp("whole"))
    one.run(sr.Memory(poisoned[:END]))
    return one


class Dies(sr.Memory):
    """A source whose process is killed after so many events."""

    left = 0

    def read(self, limit: int) -> list[Any]:
        self.left -= limit
        if self.left < 0:
            die()
        return super().read(limit)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: str, moment: str) -> None:
    """Run over the stream in a process that is killed at a moment: at the verdict, when the learner has gone back, when
    the version of then is published and its checkpoint is not, or after so many events."""
    stream = [
        *events(0, HOUR.start),
        *events(HOUR.start, HOUR.stop - HOUR.start, flipped=True),
        *events(HOUR.stop, TAIL),
    ]
    one, source = watchful(Path(folder)), Dies(stream[:END])
    source.left = int(moment) if moment.isdigit() else len(stream)
    go_back, write = one._go_back, one._checkpoints._saver.write

    def when_it_goes_back(version: int) -> Callable[[], None]:
        if moment == "verdict":
            die()
        take_back = go_back(version)
        if moment == "reload":
            die()

        def when_it_has() -> None:
            take_back()
            one._checkpoints._saver.write = when_it_writes  # type: ignore[method-assign]

        return when_it_has

    def when_it_writes(shelf: Any, cut: Any) -> Any:
        version = write(shelf, cut)
        if moment == "published" and cut.published:
            die()
        return version

    one._go_back = when_it_goes_back  # type: ignore[method-assign]
    one.run(source)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("moment", ["5000", "verdict", "reload", "published", str(HOUR.stop + 1_300)])
def test_a_run_that_broke_decides_what_it_would_have(
    tmp_path: Path, whole: sr.OnlineTrainer, poisoned: list[sr.Labeled], moment: str
) -> None:
    code = "import sys; from tests.trainers.test_gate import killed; killed(*sys.argv[1:])"
    root = str(Path(__file__).parents[2])
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path), moment], cwd=root, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    again = watchful(tmp_path)
    again.run(sr.Memory(poisoned[:END]))
    assert whole.report().counts["unlearned"] > 0
    for part in ("model", "metrics", "counts", *(["gate"] if moment != "published" else [])):
        assert first_difference(whole.state_dict()[part], again.state_dict()[part]) is None, part
    usual, told = (reasons(one.store) for one in (whole, again))  # type: ignore[arg-type]
    if moment == "published":  # that version is published again, by another number, and what was decided is told again
        usual, told = ([*{why for why in each if "goes back" in why}] for each in (usual, told))
    assert told == usual != []


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


@pytest.mark.filterwarnings("ignore::streamrec.storage.DamagedWarning")
def test_where_a_kept_checkpoint_is_damaged_the_learner_goes_back_to_an_older_one(
    tmp_path: Path, whole: sr.OnlineTrainer, poisoned: list[sr.Labeled]
) -> None:
    says = "the learner goes back to the checkpoint of version "
    assert whole.store is not None
    [usual] = [int(why[len(says) :].split(":")[0]) for why in reasons(whole.store) if why.startswith(says)]
    one = watchful(tmp_path)
    one.run(sr.Memory(poisoned), limit=HOUR.stop)
    assert one.store is not None
    number = one.store.checkpoint_of(usual)
    [payload] = (tmp_path / "checkpoints").glob(f"{number:010d}-*")
    content = bytearray(payload.read_bytes())
    content[len(content) // 2] ^= 0xFF
    payload.write_bytes(content)
    one.run(_from(poisoned, HOUR.stop), limit=1_500)
    told = reasons(one.store)
    first = next(
        n for n, why in enumerate(told) if why.startswith(f"the checkpoint of version {usual} cannot be read: ")
    )
    older = next(int(why[len(says) :].split(":")[0]) for why in told[first:] if why.startswith(says))
    assert older < usual
    assert one.report().counts["unlearned"] > whole.report().counts["unlearned"] > 0
    # and what is served has learned nothing of the hour
    assert loss_of(one.store, poisoned[HOUR.stop :]) < loss_of(whole.store, poisoned[HOUR.stop :]) + 0.02


def test_an_hour_longer_than_the_watch_is_learned_and_learned_over(tmp_path: Path, poisoned: list[sr.Labeled]) -> None:
    """What there was before it is known no more: nothing is unlearned, and newer versions are better soon."""
    one = trainer(tmp_path, watch=3_000, every=500)
    one.run(sr.Memory(poisoned), limit=HOUR.stop)
    assert one.store is not None
    clean = events(90_000, 2_000)
    taught = loss_of(one.store, clean)
    one.run(_from(poisoned, HOUR.stop))
    assert one.report().counts["unlearned"] == 0 and not any("goes back" in why for why in reasons(one.store))
    assert taught > 0.65 and loss_of(one.store, clean) < taught - 0.15


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
