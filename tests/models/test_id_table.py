from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.errors import StoreError
from streamrec.models import IdTable

EDGES = [0, -1, 1, -(2**63), 2**63 - 1]
ids = st.one_of(st.sampled_from(EDGES), st.integers(-8, 8), st.integers(-(2**63), 2**63 - 1))
# the same low bits: they all want one slot
crowded = st.integers(-5, 5).map(lambda n: n * 2**40)


@given(st.lists(st.lists(ids | crowded, max_size=12), max_size=12))
def test_it_is_a_dict_that_counts(parts: list[list[int]]) -> None:
    table, reference = IdTable(), dict[int, int]()
    for part in parts:
        keys = np.array(part, dtype=np.int64)
        assert table.find(keys).tolist() == [reference.get(key, -1) for key in part]
        rows = table.insert(keys).tolist()
        assert rows == [reference.setdefault(key, len(reference)) for key in part]
    assert len(table) == len(reference) and table.ids.tolist() == list(reference)
    twin = IdTable()
    twin.insert(np.array([99, 98]))
    twin.load_state_dict(table.state_dict())
    assert twin.ids.tolist() == list(reference)
    assert twin.find(np.array(list(reference), dtype=np.int64)).tolist() == list(reference.values())


def test_growth_moves_no_row() -> None:
    rng = np.random.default_rng(0)
    keys = np.unique(np.concatenate([rng.integers(-(2**63), 2**63 - 1, 50_000), EDGES]))
    rng.shuffle(keys)
    table, whole = IdTable(), IdTable()
    for start in range(0, len(keys), 61):
        table.insert(keys[start : start + 61])
    whole.insert(keys)
    assert np.array_equal(table.ids, keys) and np.array_equal(whole.ids, keys)
    assert np.array_equal(table.find(keys), np.arange(len(keys)))
    assert (table.find(keys ^ 1)[~np.isin(keys ^ 1, keys)] == -1).all()
    assert len(keys) <= table.capacity <= 2 * len(keys)
    assert len(table) <= len(table.slots) * 13 / 16


def test_a_full_table_still_ends_its_search() -> None:
    table = IdTable()
    table.insert(np.arange(table.capacity))
    assert len(table) == table.capacity == 1024
    assert table.find(np.array([-1, 5000, 1023])).tolist() == [-1, -1, 1023]
    assert not table.reserve(0) and table.reserve(1)


def test_states_do_not_follow_and_doubles_are_refused() -> None:
    table = IdTable()
    table.insert(np.array([3, 4]))
    state = table.state_dict()
    table.insert(np.array([5]))
    assert state["ids"].tolist() == [3, 4]
    with pytest.raises(StoreError, match="holds an id twice"):
        table.load_state_dict({"ids": np.array([1, 1])})
    assert table.ids.tolist() == [3, 4, 5]
