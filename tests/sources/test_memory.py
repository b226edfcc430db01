from __future__ import annotations

import pytest

from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Feedback
from streamrec.sources import Memory
from streamrec.testing import check_source

ITEMS = [Feedback(id=f"f{n}", impression_id="i1", time=float(n)) for n in range(9)]


def test_memory_keeps_the_contract_of_sources() -> None:
    check_source(lambda: Memory([*ITEMS, DeadLetter({}, "malformed: x"), ITEMS[0]]))


def test_memory_gives_its_items_and_their_share() -> None:
    source = Memory(iter(ITEMS))
    assert len(source) == 9 and source.fraction() == 0.0
    assert source.read(6) == ITEMS[:6]
    assert source.fraction() == pytest.approx(2 / 3)
    assert source.read(6) == ITEMS[6:] and source.read(6) == []
    assert source.position() == {"index": 9} and source.fraction() == 1.0


def test_memory_of_nothing() -> None:
    source = Memory([])
    assert source.read(1) == [] and source.fraction() is None


def test_later_changes_of_the_list_change_nothing() -> None:
    items = list(ITEMS)
    source = Memory(items)
    items.clear()
    assert source.read(100) == ITEMS


@pytest.mark.parametrize("position", [{}, {"index": -1}, {"index": 10}, {"index": 1.0}, {"index": True}, {"path": "a"}])
def test_seek_refuses_what_is_no_position(position: dict[str, object]) -> None:
    with pytest.raises(SourceError, match="9 events in memory"):
        Memory(ITEMS).seek(position)


def test_read_refuses_a_limit_below_one() -> None:
    with pytest.raises(ConfigError, match="got 0"):
        Memory(ITEMS).read(0)
