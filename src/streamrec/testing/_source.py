"""check_source: what every source promises."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from streamrec.events import DeadLetter, Feedback, Impression, Item, Labeled, place_of
from streamrec.protocols import Source

__all__ = ["check_source"]

_ITEMS = (Impression, Feedback, Labeled, DeadLetter)
_LIMITS = (1, 2, 3, 7, 1_000_000)
_MAX_ITEMS = 10_000
_MAX_CUTS = 200


def check_source(make: Callable[[], Source]) -> None:
    """Check that a source is resumable at every item.

    `make` returns a new source at its beginning; each must hold the same items, some tens of them (at most 10 000).

    Checked: every read limit gives the same items and is kept; the end gives an empty list again and again; a position
    is JSON, stays what it was, and taking it changes nothing; a new source that seeks to a position goes on with
    exactly what had not been read (at every item, or at 200 of them); so does one that seeks back and forth. Where
    `read` gives a `Placed` list, its places are JSON, and those of dead letters are their positions.
    A source that has a `close` method is closed. Raises `AssertionError` saying what was expected and what came.

    >>> from streamrec.events import Feedback
    >>> from streamrec.sources import Memory
    >>> check_source(lambda: Memory([Feedback(id=str(n), impression_id="i1", time=1.0 * n) for n in range(10)]))
    """
    opened: list[Source] = []

    def new() -> Source:
        source: Any = make()
        opened.append(source)
        if not isinstance(source, Source):
            missing = [name for name in ("read", "position", "seek") if not hasattr(source, name)]
            raise AssertionError(f"a source needs the methods read, position and seek; {source!r} has no {missing}")
        checked: Source = source
        return checked

    try:
        _check(new)
    finally:
        for source in opened:
            close = getattr(source, "close", None)
            if close is not None:
                close()


def _check(new: Callable[[], Source]) -> None:
    expected = _rest(new(), 64)
    if len(expected) < 2:
        raise AssertionError(f"the source gave {len(expected)} items; give check_source one of two or more")
    for limit in _LIMITS:
        _same(expected, _rest(new(), limit), f"read with limit {limit} instead of 64")

    # The positions after each single read, and after reads of mixed limits.
    rng = random.Random(0)
    marks = _positions(new(), lambda: 1, expected)
    for _ in range(3):
        marks += _positions(new(), lambda: rng.choice(_LIMITS[:-1]), expected)
    if len(marks) > _MAX_CUTS:
        marks = [marks[0], *rng.sample(marks[1:-1], _MAX_CUTS - 2), marks[-1]]

    for number, (count, saved) in enumerate(marks):
        source = new()
        _seek(source, saved)
        limit = _LIMITS[number % len(_LIMITS)]
        again = _saved(source)
        _same(expected[count:], _rest(source, limit), f"resumed at {saved}, after {count} items")
        if again != saved:  # another way to say the same place is fine, if it is the same place
            _seek(source, again)
            _same(expected[count:], _rest(source, limit), f"resumed at {again}, as told after seek({saved})")

    # One source, sent back and forth, from its end and from amid what it has read ahead.
    source = new()
    source.read(3)
    order = marks[:]
    rng.shuffle(order)
    for count, saved in order:
        _seek(source, saved)
        _same(expected[count : count + 2], _upto(source, 2), f"the same source went to {saved}, after {count} items")
    _seek(source, marks[0][1])
    _same(expected, _rest(source, 5), f"the same source went back to its beginning, {marks[0][1]}")


def _positions(source: Source, limit: Callable[[], int], expected: Sequence[Item]) -> list[tuple[int, str]]:
    """How many items were read and the position, as JSON, after each read; and those before and at the end."""
    count, kept, marks = 0, source.position(), [(0, _saved(source))]
    while items := _read(source, limit()):
        _same(expected[count : count + len(items)], items, f"read on from item {count}, taking the position each time")
        if json.loads(json.dumps(kept)) != json.loads(marks[-1][1]):
            raise AssertionError(f"a position changed from {marks[-1][1]} to {kept!r} when the source read on")
        count, kept = count + len(items), source.position()
        marks.append((count, _saved(source)))
    if count != len(expected):
        raise AssertionError(f"the source ended after {count} of {len(expected)} items when its position was taken")
    marks.append((count, _saved(source)))
    return marks


def _saved(source: Source) -> str:
    """The position as JSON, as a checkpoint keeps it."""
    position = source.position()
    try:
        text = json.dumps(position, sort_keys=True, allow_nan=False)
        same = json.loads(text) == position
    except (TypeError, ValueError) as error:
        raise AssertionError(f"a position must be what JSON can hold, got {position!r}: {error}") from error
    if not same:
        raise AssertionError(f"the position {position!r} comes back from JSON as {text}; use string keys, and lists")
    if json.dumps(source.position(), sort_keys=True) != text:
        raise AssertionError(f"position() gave {text}, then {source.position()!r}, with no read between")
    return text


def _seek(source: Source, saved: str) -> None:
    position = json.loads(saved)
    source.seek(position)
    if position != json.loads(saved):
        raise AssertionError(f"seek changed the position it was given, from {saved} to {position!r}")


def _read(source: Source, limit: int) -> list[Item]:
    items: Any = source.read(limit)
    if not isinstance(items, list):
        raise AssertionError(f"read must return a list, got a {type(items).__name__}")
    if len(items) > limit:
        raise AssertionError(f"read(limit={limit}) returned {len(items)} items")
    for item in items:
        if not isinstance(item, _ITEMS):
            raise AssertionError(f"read must return Impressions, Feedbacks, Labeleds and DeadLetters, got {item!r}")
    for index, item in enumerate(items):
        place: Any = place_of(items, index)
        if place is not None and json.loads(json.dumps(place)) != place:
            raise AssertionError(f"the place of an item must be what JSON can hold, got {place!r}")
        if place is not None and isinstance(item, DeadLetter) and place != item.position:
            raise AssertionError(f"a dead letter at {item.position!r} cannot have the place {place!r}")
    return items


def _rest(source: Source, limit: int) -> list[Item]:
    """All that is left, where the end must stay the end."""
    items: list[Item] = []
    while more := _read(source, limit):
        items += more
        if len(items) > _MAX_ITEMS:
            raise AssertionError(
                f"the source gave more than {_MAX_ITEMS} items; give check_source a small one that ends"
            )
    for _ in range(3):
        if more := _read(source, limit):
            raise AssertionError(f"read returned {len(more)} items after the empty list that says there are none left")
    return items


def _upto(source: Source, count: int) -> list[Item]:
    items: list[Item] = []
    while len(items) < count and (more := _read(source, count - len(items))):
        items += more
    return items


def _same(expected: Sequence[Item], items: Sequence[Item], when: str) -> None:
    for index, (one, other) in enumerate(zip(expected, items, strict=False)):
        # repr as well: a nan differs from itself
        if type(one) is not type(other) or (one != other and repr(one) != repr(other)):
            raise AssertionError(f"{when}: item {index} should be {one!r}, got {other!r}")
    if len(expected) != len(items):
        raise AssertionError(f"{when}: expected {len(expected)} items, got {len(items)}")
