"""Checkpoints that do not stop the stream: cut between two pushes, written behind it, as changes where a model can."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.protocols import Changed
from streamrec.storage import DamagedWarning, Shelf
from streamrec.testing._state import copy_state, first_difference
from streamrec.trainers import _saver

Schema = sr.Schema(sr.Id("user"), sr.Id("item"))


class Counting:
    """A model that knows what has changed: row k of its table counts the labels of the ids k modulo its rows."""

    def __init__(self, rows: int = 500) -> None:
        self.schema = Schema
        self.table = np.zeros((rows, 17), dtype=np.float32)
        self.touched = {False: np.zeros(rows, bool), True: np.zeros(rows, bool)}
        self.whole_cuts = 0

    def predict(self, batch: sr.Batch) -> Any:
        return np.full(len(batch), 0.5, dtype=np.float32)

    def learn(self, batch: sr.Batch, labels: Any, weights: Any = None) -> None:
        rows = batch.ids[batch.starts[: len(batch)]] % len(self.table)
        np.add.at(self.table, rows, labels[:, None] + 1)
        for touched in self.touched.values():
            touched[rows] = True

    def state_dict(self) -> dict[str, Any]:
        self.whole_cuts += 1
        return {"table": self.table.copy()}

    published = state_dict

    def load_state_dict(self, state: Any) -> None:
        self.table[:] = state["table"]

    def changes(self, published: bool = False) -> dict[str, Any]:
        rows = np.flatnonzero(self.touched[published])
        return {"table": Changed(rows, self.table[rows], len(self.table))}

    def mark(self, published: bool = False) -> None:
        self.touched[published][:] = False


def shown(n: int) -> sr.Labeled:
    return sr.Labeled(sr.Impression(f"i{n}", float(n), f"u{n % 40}", f"p{n % 7}"), float(n % 3 == 0))


STREAM = [shown(n) for n in range(400)]


def make(store: Any, **changed: Any) -> sr.OnlineTrainer:
    settings: dict[str, Any] = {"model": Counting(), "metrics": [sr.CTR()], "checkpoint_every": 50, "batch_size": 10}
    return sr.OnlineTrainer(store=store, **{**settings, **changed})


def without_seconds(state: Any) -> Any:
    return {name: value for name, value in copy_state(state).items() if name not in ("seconds", "position")}


def after(events: int, **changed: Any) -> Any:
    """The state of a trainer that has taken so many events and never written."""
    trainer = make(None, **changed)
    for begin in range(0, events, 10):
        trainer.push(STREAM[begin : begin + 10])
    return without_seconds(trainer.state_dict())


def in_files(shelf: Shelf) -> dict[int, Any]:
    return {version.number: shelf.read(version.number)[1] for version in shelf.list()}  # type: ignore[index]


class Slow:
    """Holds back what is written on a shelf until it is told to go on, or breaks it."""

    def __init__(self, shelf: Shelf, patch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.begun = threading.Event()
        self.error: Exception | None = None
        self.threads: set[str] = set()
        plain = shelf.write

        def write(*args: Any, **named: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            self.begun.set()
            assert self.go_on.wait(30)
            if self.error is not None:
                raise self.error
            return plain(*args, **named)

        patch.setattr(shelf, "write", write)


class Watched(sr.Memory):
    """A source that calls back before each read, with how many events it has given."""

    def __init__(self, events: Any, callback: Callable[[int], None]) -> None:
        super().__init__(events)
        self.callback, self.given = callback, 0

    def read(self, limit: int) -> Any:
        self.callback(self.given)
        events = super().read(limit)
        self.given += len(events)
        return events


@pytest.mark.parametrize("make_model", [Counting, lambda: sr.FM(Schema, dim=4)], ids=["Counting", "FM"])
def test_the_stream_goes_on_while_a_checkpoint_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_model: Callable[[], Any]
) -> None:
    monkeypatch.delattr(sr.FM, "live")  # the first whole table would be copied first: see below
    store = sr.Store(tmp_path, keep=100)
    slow = Slow(store.checkpoints, monkeypatch)
    trainer = make(store, model=make_model())

    def go_on(given: int) -> None:
        if given == 60:
            assert slow.begun.wait(30)
        if given == 300:
            slow.go_on.set()
            while trainer._saver._thread is not None and trainer._saver._thread.is_alive():
                time.sleep(0.001)

    trainer.run(Watched(STREAM, go_on))

    # cut at 50, as it was then, though it was written at 300; at 310 the next; and the end
    states = in_files(store.checkpoints)
    events = [state["counts"]["events"] for state in states.values()]
    assert events[:2] == [50, 310] and events[-1] == 400
    for state in states.values():
        whole = after(state["counts"]["events"], model=make_model())
        assert first_difference(whole, without_seconds(state)) is None
    assert [version.info["events"] for version in store.versions.list()] == events
    assert slow.threads == {"streamrec checkpoint", "MainThread"}
    assert "streamrec checkpoint" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("background", [True, False])
def test_a_chain_of_checkpoints_is_what_whole_ones_would_have_been(tmp_path: Path, background: bool) -> None:
    store = sr.Store(tmp_path, keep=100)
    trainer = make(store, checkpoint_every=20, background=background)

    trainer.run(sr.Memory(STREAM))

    for shelf, name in ((store.checkpoints, "table"), (store.versions, "table")):
        assert any(version.base is not None for version in shelf.list())
        for version in shelf.list():
            state = shelf.read(version.number)[1]  # type: ignore[index]
            events = version.info["events"] if shelf is store.versions else state["counts"]["events"]
            assert np.array_equal(state["model"][name], after(events)["model"][name])
    assert trainer.model.whole_cuts < 2 * len(store.versions.list())  # type: ignore[attr-defined]


class Living(Counting):
    """Gives its table to be copied while it learns."""

    def live(self, published: bool = False) -> dict[str, Any]:
        return {"table": self.table}


def test_a_table_is_copied_while_the_stream_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    plain = _saver._copied

    def torn(value: Any) -> Any:
        found = plain(value)
        if isinstance(value, np.ndarray):
            begun.set()
            assert go_on.wait(30)
            found[:, 5:] = value[:, 5:]  # a row that is learned meanwhile is half old and half new
        return found

    monkeypatch.setattr(_saver, "_copied", torn)
    store = sr.Store(tmp_path, keep=100)
    trainer = make(store, model=Living())

    def watch(given: int) -> None:
        if given == 60:
            assert begun.wait(30)
        if given == 150:
            go_on.set()
            while trainer._saver._thread is not None and trainer._saver._thread.is_alive():
                time.sleep(0.001)

    trainer.run(Watched(STREAM, watch))

    states = in_files(store.checkpoints)
    assert states[1]["counts"]["events"] == 160  # due at 50, when the copy was begun; cut when it was done
    for state in states.values():
        assert first_difference(after(state["counts"]["events"]), without_seconds(state)) is None
    for version in store.versions.list():
        found = store.versions.read(version.number)
        assert found is not None
        assert np.array_equal(found[1]["model"]["table"], after(version.info["events"])["model"]["table"])
    assert trainer.model.whole_cuts == 0  # type: ignore[attr-defined]


def test_after_resuming_the_next_checkpoint_is_changes_of_the_one_resumed_from(tmp_path: Path) -> None:
    store = sr.Store(tmp_path, keep=100)
    make(store, checkpoint_every=1000).run(sr.Memory(STREAM), limit=200)
    trainer = make(store, checkpoint_every=1000)

    trainer.run(sr.Memory(STREAM), limit=20)

    assert [version.base for version in store.checkpoints.list()] == [None, 1]
    assert [version.base for version in store.versions.list()] == [None, None]
    found = store.checkpoints.read()
    assert found is not None
    assert first_difference(after(220), without_seconds(found[1])) is None
    # a state from elsewhere is no version of this shelf
    trainer.load_state_dict(found[1])
    assert trainer.checkpoint().base is None
    trainer.push(STREAM[220:230])
    assert trainer.checkpoint().base == 3


def test_a_failed_write_ends_the_run_and_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = sr.Store(tmp_path, keep=100)
    trainer = make(store)
    source = sr.Memory(STREAM)
    trainer.run(source, limit=50)
    with monkeypatch.context() as patch:
        slow = Slow(store.checkpoints, patch)
        slow.error = sr.StoreError("no space left")
        slow.go_on.set()
        with pytest.raises(sr.StoreError, match="no space left"):
            trainer.run(source)
    assert slow.threads == {"streamrec checkpoint"}

    trainer.run(source)

    newest = store.checkpoints.list()[1]
    assert newest.base is None
    found = store.checkpoints.read()
    assert found is not None
    assert first_difference(after(400), without_seconds(found[1])) is None


def test_an_error_of_the_source_waits_for_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sr.Store(tmp_path)
    slow = Slow(store.checkpoints, monkeypatch)

    def broken(given: int) -> None:
        if given == 70:
            assert slow.begun.wait(30)
            threading.Timer(0.05, slow.go_on.set).start()
            raise sr.SourceError("gone")

    with pytest.raises(sr.SourceError, match="gone"):
        make(store).run(Watched(STREAM, broken))

    assert [state["counts"]["events"] for state in in_files(store.checkpoints).values()] == [50]


def test_a_damaged_chain_is_warned_of_and_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = sr.Store(tmp_path, keep=100)
    trainer = make(store)
    monkeypatch.setattr("streamrec.storage.shelf._HEAVY", 0.0)
    for begin in range(0, 20, 10):
        trainer.push(STREAM[begin : begin + 10])
        trainer.checkpoint()
    (path,) = (tmp_path / "checkpoints").glob("0000000001-*")
    path.unlink()

    trainer.push(STREAM[20:30])
    with pytest.warns(DamagedWarning, match="the next is written whole"):
        assert trainer.checkpoint().base == 2
    assert trainer.checkpoint().base is None
    found = store.checkpoints.read()
    assert found is not None
    assert first_difference(after(30), without_seconds(found[1])) is None


def test_where_most_has_changed_the_next_is_whole(tmp_path: Path) -> None:
    store = sr.Store(tmp_path, keep=100)
    trainer = make(store, model=Counting(rows=40))
    for begin in range(0, 400, 100):
        trainer.push(STREAM[begin : begin + 100])
        trainer.checkpoint()

    assert [version.base for version in store.checkpoints.list()] == [None, 1, None, 3]


def test_a_model_that_cannot_tell_what_changed_is_written_whole(tmp_path: Path, Logistic: Any) -> None:
    store = sr.Store(tmp_path, keep=100)
    make(store, model=Logistic(Schema)).run(sr.Memory(STREAM))

    for shelf in (store.checkpoints, store.versions):
        assert len(shelf.list()) > 1 and all(version.base is None for version in shelf.list())


def test_a_trainer_can_be_copied(tmp_path: Path) -> None:
    import copy

    trainer = make(str(tmp_path))
    trainer.run(sr.Memory(STREAM), limit=100)
    twin = copy.deepcopy(trainer)
    twin.push(STREAM[100:110])
    assert twin.report().counts["events"] == 110
