from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from streamrec.batch import Batch
from streamrec.testing._state import check_state_is_plain, copy_state, same_state
from streamrec.trainers.held_rows import HeldRows

Row = tuple[list[int], list[float], list[int], list["str | None"]]


def batch_of(rows: list[Row], text_fields: int) -> Batch:
    ends = np.cumsum([len(row[0]) for row in rows], dtype=np.int64)
    texts = sorted({text for row in rows for text in row[3] if text is not None})
    refs = [[-1 if text is None else texts.index(text) for text in row[3]] for row in rows]
    return Batch(
        np.array([i for row in rows for i in row[0]], dtype=np.int64),
        np.array([x for row in rows for x in row[1]], dtype=np.float32),
        np.array([f for row in rows for f in row[2]], dtype=np.int32),
        ends - np.array([len(row[0]) for row in rows], dtype=np.int64),
        ends,
        texts,
        np.array(refs, dtype=np.int32).reshape(len(rows), text_fields),
    )


def read(held: HeldRows, slot: int, text_fields: int) -> Row:
    batch = held.batch
    at = slice(batch.starts[slot], batch.ends[slot])
    refs = batch.text_refs[slot].tolist() if text_fields else []
    texts = [batch.texts[ref] if ref >= 0 else None for ref in refs]
    return batch.ids[at].tolist(), batch.values[at].tolist(), batch.fields[at].tolist(), texts


def random_row(rng: np.random.Generator, text_fields: int, longest: int) -> Row:
    count = int(rng.integers(0, longest))
    texts = [None if rng.random() < 0.3 else f"t{rng.integers(1000)}" for _ in range(text_fields)]
    ids = rng.integers(-(2**63), 2**63 - 1, count).tolist()
    return ids, rng.integers(0, 9, count).astype(float).tolist(), rng.integers(0, 4, count).tolist(), texts


class AgainstADict(RuleBasedStateMachine):
    """Adds, frees, saves and loads at random; a dict of slots knows what should be there."""

    @initialize(text_fields=st.integers(0, 2), seed=st.integers(0, 1000))
    def begin(self, text_fields: int, seed: int) -> None:
        self.text_fields, self.rng = text_fields, np.random.default_rng(seed)
        self.held, self.reference = HeldRows(text_fields), dict[int, tuple[Row, float, float]]()

    @rule(count=st.sampled_from([0, 1, 3, 40, 700]), longest=st.sampled_from([1, 4, 12]))
    def add(self, count: int, longest: int) -> None:
        rows = [random_row(self.rng, self.text_fields, longest) for _ in range(count)]
        times = self.rng.normal(1e9, 1e6, count).tolist()
        slots = self.held.add(batch_of(rows, self.text_fields), times)
        assert len(set(slots)) == count and not set(slots) & set(self.reference)
        for slot, row, time in zip(slots, rows, times, strict=True):
            self.held.served[slot] = score = np.float32(self.rng.random())
            self.reference[slot] = row, float(score), time

    @rule(share=st.sampled_from([0.1, 0.9, 1.0]))
    def free(self, share: float) -> None:
        gone = [slot for slot in self.reference if self.rng.random() < share]
        self.held.free(gone)
        for slot in gone:
            del self.reference[slot]

    @rule()
    def save_and_load(self) -> None:
        state = self.held.state_dict()
        check_state_is_plain(state)
        saved = copy_state(state)
        twin = HeldRows(self.text_fields)
        twin.add(batch_of([random_row(self.rng, self.text_fields, 5)], self.text_fields), [0.0])
        twin.load_state_dict(state)
        assert same_state(twin.state_dict(), saved)
        self.held = twin

    @invariant()
    def holds_what_it_should(self) -> None:
        if not hasattr(self, "held"):
            return
        assert len(self.held) == len(self.reference)
        for slot in list(self.reference)[:20] + list(self.reference)[-20:]:
            row, score, time = self.reference[slot]
            assert read(self.held, slot, self.text_fields) == row
            assert self.held.served[slot] == np.float32(score)
            assert self.held.times[slot] == time


AgainstADict.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestAgainstADict = AgainstADict.TestCase


@pytest.mark.parametrize("longest", [1, 6])  # 1: rows without entries, texts alone
def test_memory_follows_what_is_held(longest: int) -> None:
    rng = np.random.default_rng(0)
    held = HeldRows(text_fields=1)
    waiting: list[int] = []
    for n in range(400):
        rows = [(row[0], row[1], row[2], [f"{n}-{k}"]) for k in range(50) if (row := random_row(rng, 1, longest))]
        waiting += held.add(batch_of(rows, 1), [float(n)] * len(rows)).tolist()
        gone, waiting = waiting[:-200], waiting[-200:]
        held.free(gone)
    assert len(held) == 200
    assert len(held.batch) == 512 and len(held.batch.ids) == 4096
    assert len(held.batch.texts) <= 4096
    assert len(held.state_dict()["texts"]) == 200


def test_states_do_not_follow() -> None:
    rng = np.random.default_rng(0)
    held = HeldRows(text_fields=1)
    slots = held.add(batch_of([random_row(rng, 1, 5) for _ in range(10)], 1), [1.0] * 10)
    held.served[slots] = 0.5
    state = held.state_dict()
    saved = copy_state(state)
    held.served[slots] = 0.25
    held.free(slots[:5])
    held.add(batch_of([random_row(rng, 1, 5) for _ in range(2000)], 1), [2.0] * 2000)
    assert same_state(saved, state)
    twin = HeldRows(text_fields=1)
    twin.load_state_dict(state)
    twin.served[:] = 0
    twin.free(slots)
    assert same_state(saved, state)


def test_freed_slots_are_used_again() -> None:
    held = HeldRows()
    first = held.add(batch_of([([1], [1.0], [0], [])] * 3, 0), [0.0] * 3)
    held.free([first[1]])
    assert held.add(batch_of([([2], [1.0], [0], [])], 0), [3.0]).tolist() == [first[1]]
    assert held.batch.ids[held.batch.starts[first]].tolist() == [1, 2, 1]
