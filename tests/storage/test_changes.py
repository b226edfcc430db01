"""Versions that are changes of others: what is read is the whole, whatever the chain, whoever dies."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrec.errors import ConfigError, DamagedError, StoreError
from streamrec.protocols import Changed
from streamrec.storage import DamagedWarning, Shelf, Store
from streamrec.storage import shelf as shelf_module
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

_memory = itertools.count()


class Table:
    """A model with rows of two kinds, in numpy and torch, which knows what has changed since it was marked."""

    def __init__(self, rows: int = 0, width: int = 3) -> None:
        self.width = width
        self.weights = np.zeros((rows, width), dtype=np.float32)
        self.counts = np.zeros(rows, dtype=np.int64)
        self.step = 0
        self.marked = self.state()

    def state(self) -> dict[str, Any]:
        import torch

        leaves = {"weights": torch.from_numpy(self.weights.copy()), "counts": self.counts.copy()}
        return {"model": {**leaves, "parts": [{"width": self.width}, leaves["counts"].copy()]}, "step": self.step}

    def mark(self) -> None:
        self.marked = self.state()

    def changes(self) -> dict[str, Any]:
        now, before = self.state(), self.marked["model"]
        old = np.zeros((len(self.counts), self.width), dtype=np.float32)
        both = min(len(old), len(before["counts"]))
        old[:both] = before["weights"].numpy()[:both]
        old_counts = np.zeros(len(self.counts), dtype=np.int64)
        old_counts[:both] = before["counts"][:both]
        rows = np.flatnonzero((old != self.weights).any(axis=1) | (old_counts != self.counts))

        def changed(leaf: Any) -> Changed:
            return Changed(rows, leaf[rows], len(leaf))

        model = now["model"]
        parts = [{"width": self.width}, changed(model["counts"])]
        return {
            **now,
            "model": {"weights": changed(model["weights"]), "counts": changed(model["counts"]), "parts": parts},
        }

    def learn(self, rows: Any, length: int) -> None:
        """Cut or grow to `length` rows and set some of them."""
        for name in ("weights", "counts"):
            old = getattr(self, name)
            new = np.zeros((length, *old.shape[1:]), dtype=old.dtype)
            new[: min(length, len(old))] = old[:length]
            setattr(self, name, new)
        self.step += 1
        for row in rows:
            self.weights[row] = self.step + row / 7
            self.counts[row] += 1


def assert_is(shelf: Shelf, number: int | None, wanted: Any) -> None:
    found = shelf.read(number)
    assert found is not None
    assert first_difference(wanted, found[1]) is None


def chain(shelf: Shelf, links: int, rows: int = 200) -> list[Any]:
    """A whole version and `links` changes of it; the states they stand for."""
    table = Table(rows)
    table.learn(range(rows), rows)
    states = [table.state()]
    base = shelf.write(table.state()).number
    for link in range(links):
        table.mark()
        table.learn([link % rows, (7 * link) % rows], rows + link)
        states.append(table.state())
        base = shelf.write(table.changes(), base=base).number
    return states


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Store(tmp_path / "runs", keep=3).checkpoints


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_chain_of_changes_equals_the_whole_state(data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, 4))
    shelf = Store(f"memory://test-changes-{next(_memory)}", keep=keep).checkpoints
    table = Table(data.draw(st.integers(0, 12)))
    base, states = None, {}
    for _ in range(data.draw(st.integers(1, 12))):
        length = max(0, len(table.counts) + data.draw(st.integers(-4, 5)))
        table.learn(sorted(data.draw(st.sets(st.integers(0, length - 1)))) if length else [], length)
        whole = base is None or data.draw(st.integers(0, 4)) == 0
        version = shelf.write(table.state() if whole else table.changes(), base=None if whole else base)
        table.mark()
        base = version.number
        states[base] = table.state()
        if data.draw(st.booleans()):
            shelf.compact()
        there = [version.number for version in shelf.list()]
        assert there[-keep:] == list(states)[-keep:]
        for number in there:
            assert_is(shelf, number, states[number])
        for held in list(states)[:-1]:
            changes = shelf.changes_since(held)
            if changes is not None:
                assert changes[0].number == base
                assert (
                    first_difference(states[base], shelf_module.resolve([copy_state(states[held]), *changes[1]]))
                    is None
                )


@given(data=st.data())
def test_changed_is_what_it_says(data: st.DataObject) -> None:
    import torch

    before = np.arange(data.draw(st.integers(0, 9)) * 2, dtype=np.float64).reshape(-1, 2) + 1
    length = data.draw(st.integers(0, 12))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, length - 1)))) if length else [], dtype=np.int64)
    values = -np.ones((len(rows), 2))
    wanted = np.zeros((length, 2))
    wanted[: len(before)] = before[:length]
    wanted[rows] = -1
    untouched = before.copy()

    np.testing.assert_array_equal(Changed(rows, values, length).applied_to(before), wanted)
    tensor = Changed(rows, torch.from_numpy(values), length).applied_to(torch.from_numpy(before))

    assert type(tensor) is torch.Tensor and np.array_equal(tensor.numpy(), wanted)
    assert np.array_equal(before, untouched)


def test_changes_are_plain_and_can_be_compared_and_copied() -> None:
    state = {"weights": Changed(np.array([1, 4]), np.ones((2, 3)), 9)}

    check_state_is_plain(state)
    twin = copy_state(state)
    assert first_difference(state, twin) is None
    twin["weights"].values[1, 2] = 7
    assert "['values']" in str(first_difference(state, twin))
    assert state["weights"].values.all() and state["weights"].values[1, 2] == 1


@pytest.mark.parametrize(
    ("rows", "values", "length", "message"),
    [
        ([1, 0], [1.0, 2.0], 3, "rows must ascend without doubles from 0 to at most 2, got 0 to 1"),
        ([1, 1], [1.0, 2.0], 3, "rows must ascend"),
        ([-1], [1.0], 3, "rows must ascend .*got -1 to -1"),
        ([3], [1.0], 3, "to at most 2, got 3 to 3"),
        ([1], [1.0, 2.0], 3, r"1 rows need as many values, got ndarray of float64 \(2,\)"),
        ([1.5], [1.0], 3, r"rows must be an int64 array \(m,\), got ndarray of float64 \(1,\)"),
    ],
)
def test_changed_refuses_what_does_not_fit(rows: Any, values: Any, length: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Changed(np.array(rows), np.array(values), length)


def test_changed_refuses_an_array_of_another_kind() -> None:
    changed = Changed(np.array([0]), np.ones((1, 2)), 1)
    for other in (np.ones((1, 2), np.float32), np.ones((1, 3))):
        with pytest.raises(ConfigError, match=r"ndarray of float64 \(1, 2\)"):
            changed.applied_to(other)


def test_changes_without_a_base_or_of_no_version_are_refused(shelf: Shelf) -> None:
    changed = {"model": {"weights": Changed(np.array([0]), np.ones(1), 1)}}

    with pytest.raises(StoreError, match=r"/model/weights, which is Changed, without the version .*pass base="):
        shelf.write(changed)
    with pytest.raises(StoreError, match=r"has no version 3 to write changes of; it has none; write the whole state"):
        shelf.write(changed, base=3)
    assert not os.path.exists(shelf.uri) or os.listdir(shelf.uri) == []


def test_a_base_without_any_change_is_no_base(shelf: Shelf) -> None:
    first = shelf.write({"step": 1})

    assert shelf.write({"step": 2}, base=first.number).base is None


def test_changes_of_what_is_no_array_are_damage(shelf: Shelf) -> None:
    shelf.write({"weights": 3.0, "other": np.zeros((2, 2))})
    shelf.write({"weights": Changed(np.array([0]), np.ones(1), 1)}, base=1)
    shelf.write({"other": Changed(np.array([0]), np.ones(1), 1)}, base=1)

    with pytest.raises(DamagedError, match=r"version 2 of .* is damaged: /weights changes what is no array before"):
        shelf.read(2)
    with pytest.raises(DamagedError, match=r"version 3 of .* is damaged: /other does not fit what it changes"):
        shelf.read(3)


def test_what_a_chain_needs_stays_and_so_does_one_whole_version_more(shelf: Shelf) -> None:
    first = chain(shelf, 6)
    assert [version.number for version in shelf.list()] == [1, 2, 3, 4, 5, 6, 7]
    second = chain(shelf, 5)
    assert [version.number for version in shelf.list()] == [1, 8, 9, 10, 11, 12, 13]
    for number, state in zip([1, *range(8, 14)], [first[0], *second], strict=True):
        assert_is(shelf, number, state)
    assert [version.base for version in shelf.list()] == [None, None, 8, 9, 10, 11, 12]

    fresh = Store(Path(shelf.uri).parent, keep=3).checkpoints  # knows of no chain but by the files
    for _ in range(3):
        fresh.write({"step": 0})
    assert [version.number for version in shelf.list()] == [14, 15, 16]
    assert len(os.listdir(shelf.uri)) == 6


def test_keep_1_keeps_one_chain(tmp_path: Path) -> None:
    shelf = Store(tmp_path, keep=1).checkpoints
    chain(shelf, 2)
    chain(shelf, 2)
    assert [version.number for version in shelf.list()] == [4, 5, 6]


def test_chains_are_cut_short_when_their_changes_weigh_more_than_the_whole(
    shelf: Shelf,
) -> None:
    states = chain(shelf, 5, rows=20)
    before = shelf.list()
    assert sum(version.bytes for version in before[1:5]) > before[0].bytes

    made = shelf.compact()

    assert made is not None and made.number == 5 and made.base is None
    assert (made.info, made.created) == (before[4].info, before[4].created)
    # 4 is kept, and so are 1 to 3, which it needs
    assert [(version.number, version.base) for version in shelf.list()] == [
        *((1, None), (2, 1), (3, 2), (4, 3)),
        *((5, None), (6, 5)),
    ]
    for version in shelf.list():
        assert_is(shelf, version.number, states[version.number - 1])
    assert shelf.compact() is None
    assert len(os.listdir(shelf.uri)) == 2 * len(shelf.list())
    # a reader of the version before needs no more than the newest changes
    found = shelf.changes_since(5)
    assert found is not None and found[0].number == 6 and len(found[1]) == 1
    assert shelf.changes_since(4) is None and shelf.changes_since(6) is None


def test_chains_are_cut_short_when_they_have_many_links(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "_LINKS", 4)
    chain(shelf, 3, rows=5000)
    assert shelf.compact() is None

    base = shelf.latest().number  # type: ignore[union-attr]
    shelf.write({"model": {"counts": Changed(np.array([0]), np.array([5]), 5000)}}, base=base)
    made = shelf.compact()

    assert made is not None and made.number == 4


def test_there_is_nothing_to_compact_in_whole_versions_and_short_chains(shelf: Shelf) -> None:
    assert shelf.compact() is None
    shelf.write({"step": 1})
    assert shelf.compact() is None
    chain(shelf, 1)
    assert shelf.compact() is None


@pytest.mark.parametrize("number", range(1, 5))
@pytest.mark.parametrize("what", ["payload", "manifest", "no payload", "no manifest"])
def test_a_damaged_link_takes_what_is_made_of_it_and_no_more(shelf: Shelf, number: int, what: str) -> None:
    shelf.write({"step": "whole and older"})
    states = {at + 2: state for at, state in enumerate(chain(shelf, 3))}
    number += 1
    (path,) = Path(shelf.uri).glob(f"{number:010d}" + (".json" if "manifest" in what else "-*"))
    if what.startswith("no"):
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    last = number - 1
    gone = what == "no manifest" and number == 5  # then the newest is not there, and nobody misses it
    if gone:
        assert_is(shelf, None, states[4])
        return
    with pytest.warns(DamagedWarning, match=rf"version {last} is used instead"):
        assert_is(shelf, None, states.get(last, {"step": "whole and older"}))
    if number < 5:
        with pytest.raises(DamagedError):
            shelf.read(5)


def test_changes_are_never_made_to_another_version_of_the_same_number(shelf: Shelf, tmp_path: Path) -> None:
    chain(shelf, 2)
    other = Store(tmp_path / "other").checkpoints
    other.write({"model": {}})
    for path in Path(other.uri).iterdir():
        shutil.copy(path, shelf.uri)

    with pytest.raises(DamagedError, match=r"version 3 of .* needs a version 1 that was another one"):
        shelf.read(3)


def test_a_damaged_chain_is_not_compacted(shelf: Shelf) -> None:
    chain(shelf, 5, rows=20)
    (path,) = Path(shelf.uri).glob("0000000002-*")
    path.unlink()

    with pytest.raises(DamagedError, match=r"is missing"):
        shelf.compact()


@pytest.mark.parametrize("call", range(1, 5))
def test_a_full_disk_leaves_the_chain_as_it_was(shelf: Shelf, full_disk: Any, call: int) -> None:
    states = chain(shelf, 5, rows=20)
    files = sorted(os.listdir(shelf.uri))
    with full_disk(call), pytest.raises(StoreError, match=r"cannot write to .*free some space"):
        shelf.compact()

    if call < 4:
        assert sorted(os.listdir(shelf.uri)) == files
    for number, state in enumerate(states, start=1):
        assert_is(shelf, number, state)
    assert len(os.listdir(shelf.uri)) == len(files)
    shelf.compact()
    assert_is(shelf, None, states[-1])


def moments(shelf: Shelf, copies: Path, patch: pytest.MonkeyPatch) -> list[Path]:
    """Copies of the folder before and after each operation that changes it: what a crash there would leave."""
    taken: list[Path] = []

    def around(operation: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any) -> Any:
            for when in ("before", "after"):
                if when == "after":
                    result = operation(*args)
                taken.append(copies / str(len(taken)))
                shutil.copytree(shelf.uri, taken[-1] / "checkpoints")
            return result

        return recorded

    for name in ("replace", "remove", "fsync"):
        patch.setattr(os, name, around(getattr(os, name)))
    return taken


def test_a_crash_at_any_moment_of_writing_changes_and_compacting_leaves_all_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Store(tmp_path / "runs", keep=2).checkpoints
    shelf.write({"step": -1})
    states = {at + 2: state for at, state in enumerate(chain(shelf, 4, rows=20))}
    table = Table(20)
    table.learn(range(3), 20)
    state = copy_state(states[6])
    state["model"]["counts"][3] = 99
    changed = {**state, "model": {**state["model"], "counts": Changed(np.array([3]), np.array([99]), 23)}}
    states[7] = state
    with monkeypatch.context() as patch:
        taken = moments(shelf, tmp_path / "copies", patch)
        shelf.write(changed, base=6)
        written = len(taken)
        assert shelf.compact() is not None

    seen = []
    for moment in taken:
        reader = Store(moment, keep=2).checkpoints
        there = [version.number for version in reader.list()]
        for number in there:
            if number > 1:
                assert_is(reader, number, states[number])
        seen.append(there[-1])
        # a writer that comes after goes on from there, and nothing of the crash is left
        reader.write({**state, "step": 8}, base=there[-1])
        reader.write({**changed, "step": 9}, base=there[-1])
        reader.compact()
        assert_is(reader, None, {**state, "step": 9})
        assert len(os.listdir(reader.uri)) == 2 * len(reader.list())
    assert seen == sorted(seen) and set(seen) == {6, 7}
    assert len(taken) - written >= 16  # the new payload, the new manifest, and what is not needed any more


@pytest.mark.parametrize("moment", range(12))
def test_compacting_under_a_reader_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    writer = Store(tmp_path, keep=1).checkpoints
    reader = Store(tmp_path, keep=1).checkpoints
    states = chain(writer, 4, rows=20)
    plain = reader._folder.read
    reads = itertools.count()

    def late(name: str) -> Any:
        if next(reads) == moment:
            assert writer.compact() is not None
        return plain(name)

    monkeypatch.setattr(reader._folder, "read", late)

    assert_is(reader, None, states[-1])
    assert_is(reader, 5, states[-1])


_WRITER = """
import sys
import numpy as np
from streamrec.protocols import Changed
from streamrec.storage import Store

shelf = Store(sys.argv[1], keep=2).checkpoints
found = shelf.read()
number = 0 if found is None else found[0].number
if found is None:
    shelf.write({"table": np.full((50, 4), 1.0), "number": 1})
    number = 1
while True:
    # row k of version n is the greatest m <= n with m % 50 == k, and 1 if there is none
    rows = np.array([(number + 1) % 50])
    state = {"table": Changed(rows, np.full((1, 4), float(number + 1)), 50), "number": number + 1}
    assert shelf.write(state, base=number).number == number + 1
    number += 1
    shelf.compact()
"""


def test_a_writer_of_changes_killed_again_and_again_is_never_noticed_by_a_reader(tmp_path: Path) -> None:
    shelf = Store(tmp_path, keep=2).checkpoints
    last, compacted = 0, 0
    for attempt in range(4):
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)]) as writer:
            wanted = last + 25 + attempt
            while last < wanted:
                assert writer.poll() is None, "the writer failed"
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    found = shelf.read()
                if found is None:
                    continue
                version, state = found
                assert version.number == state["number"] >= last
                last = version.number
                rows = np.arange(50)
                wanted_rows = np.maximum(last - (last - rows) % 50, 1)
                np.testing.assert_array_equal(state["table"][:, 0], wanted_rows)
                compacted += shelf.list()[0].number > 1
            writer.kill()
    assert compacted
