"""check_stage: what every stage promises."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from streamrec.protocols import Stage
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

__all__ = ["check_stage"]

_MAX_CUTS = 50


def check_stage(make: Callable[[], Stage], events: Sequence[Any]) -> None:
    """Check that a stage gives the same, however its events are cut and wherever it is interrupted.

    `make` returns a new stage, the same each time. `events`: some tens of items in the order of the stream, among them
    what the stage drops or holds back, so that there is something to get wrong.

    Checked: the events and the list stay as they were; two new stages give the same; one push of all equals pushes
    one by one and pushes cut at random, in what they return, in `counts` and in the state, bit for bit; pushing
    nothing does nothing; the state can be stored without pickle, holds the counts, and neither follows later changes
    of the stage nor is changed by a stage that loaded it; a twin that loads it, new or used, goes on as if there had
    been no interruption (at every cut, or at 50 of them); a copy by `copy.deepcopy`, which is also how it comes into
    another process, goes on likewise, and leaves the original alone. Raises `AssertionError` saying what differs.

    >>> from streamrec.events import Feedback
    >>> from streamrec.preprocessors.dedup import Dedup
    >>> click = Feedback(id="c1", impression_id="i1", time=1.0)
    >>> check_stage(lambda: Dedup(ttl=60.0, capacity=10), [click, click])
    """
    events = list(events)
    if len(events) < 2:
        raise AssertionError(f"got {len(events)} events; give check_stage two or more")

    whole = _new(make)
    expected = _push(whole, events, "pushing all events at once")
    ends = _standing(whole)
    pristine = _standing(_new(make))

    # Ways to cut the same events.
    rng = random.Random(0)
    ways: dict[str, list[int]] = {
        "pushing the same again to a new stage": [],
        "pushing one by one": [*range(1, len(events))],
    }
    for number in range(3):
        some = rng.randint(1, min(len(events) - 1, 20))
        ways[f"pushing cut at random, {number}"] = sorted(rng.sample(range(1, len(events)), some))
    for what, cuts in ways.items():
        stage = _new(make)
        found = [out for part in _parts(events, cuts) for out in _push(stage, part, what)]
        _same_output(expected, found, what)
        _same_standing(ends, _standing(stage), what)

    stage = _new(make)
    if _push(stage, [], "pushing no events"):
        raise AssertionError("pushing no events returned something")
    _same_standing(pristine, _standing(stage), "pushing no events")

    # Interruptions. One stage walks through all cuts and hands out its states; what it returned so far is `before`.
    walker = _new(make)
    used = whole  # has seen all events: a state must replace what it remembers
    before: list[Any] = []
    states: list[tuple[int, Any, Any]] = []
    last = 0
    for cut in _spread(len(events)):
        what = f"interrupted after {cut} of {len(events)} events"
        before += _push(walker, events[last:cut], what)
        last = cut
        live = walker.state_dict()
        check_state_is_plain(live)
        saved = copy_state(live)
        states.append((cut, live, saved))
        standing = _standing(walker)
        for twin, name in ((_new(make), "a new stage"), (used, "a used stage")):
            given = copy_state(saved)
            twin.load_state_dict(given)
            _same_standing(standing, _standing(twin), f"{name} that loaded a state, {what}")
            rest = _push(twin, events[cut:], what)
            _same_output(expected, before + rest, f"{name} that went on from a state, {what}")
            _same_standing(ends, _standing(twin), f"{name} that went on from a state, {what}")
            if (difference := first_difference(saved, given)) is not None:
                raise AssertionError(f"a stage changed the state it loaded, {what}: {difference}; copy what is loaded")
    before += _push(walker, events[last:], "the last events")
    _same_output(expected, before, "taking states between pushes")
    _same_standing(ends, _standing(walker), "taking states between pushes")
    for cut, live, saved in states:
        if (difference := first_difference(saved, live)) is not None:
            raise AssertionError(f"the state cut after {cut} events changed later: {difference}; copy what is cut")

    # A copy, taken in the middle: nothing that it remembers is shared, be it by address.
    what = "a copy (copy.deepcopy) that went on"
    original = _new(make)
    before = _push(original, events[: len(events) // 2], what)
    standing = _standing(original)
    twin = copy.deepcopy(original)
    _same_output(expected, before + _push(twin, events[len(events) // 2 :], what), what)
    _same_standing(ends, _standing(twin), what)
    _same_standing(standing, _standing(original), "the original, while its copy went on")


def _new(make: Callable[[], Stage]) -> Stage:
    stage: Any = make()
    if not isinstance(stage, Stage):
        needed = ("push", "counts", "state_dict", "load_state_dict")
        missing = [name for name in needed if not hasattr(stage, name)]
        raise AssertionError(f"a stage needs push, counts, state_dict and load_state_dict; {stage!r} has no {missing}")
    checked: Stage = stage
    return checked


def _push(stage: Stage, events: Sequence[Any], what: str) -> list[Any]:
    """One push, which must leave its input alone and return a list of its own."""
    given = list(events)
    contents = [repr(event) for event in given]
    out: Any = stage.push(given)
    if len(given) != len(events) or any(one is not other for one, other in zip(given, events, strict=True)):
        raise AssertionError(f"{what}: push changed the list it was given; build a new one")
    for before, event in zip(contents, given, strict=True):
        if repr(event) != before:
            raise AssertionError(f"{what}: push changed an event from {before} to {event!r}; events are frozen")
    if not isinstance(out, list):
        raise AssertionError(f"{what}: push must return a list, got a {type(out).__name__}")
    if out is given:
        raise AssertionError(f"{what}: push returned the very list it was given; return a new one")
    return list(out)


def _standing(stage: Stage) -> tuple[dict[str, int], Any]:
    """The counts and the state, which must not change by looking."""
    counts: Any = stage.counts
    if not isinstance(counts, Mapping) or any(type(k) is not str or type(n) is not int for k, n in counts.items()):
        raise AssertionError(f"counts must map reasons to whole numbers, got {counts!r}")
    saved = dict(counts)
    state = copy_state(stage.state_dict())
    if (difference := first_difference(state, copy_state(stage.state_dict()))) is not None:
        raise AssertionError(f"state_dict called twice gives two states: {difference}")
    return saved, state


def _same_standing(expected: tuple[dict[str, int], Any], found: tuple[dict[str, int], Any], what: str) -> None:
    if expected[0] != found[0]:
        raise AssertionError(f"{what}: counts should be {expected[0]}, got {found[0]}; counts are part of the state")
    if (difference := first_difference(expected[1], found[1])) is not None:
        raise AssertionError(f"{what}: the state differs: {difference}")


def _same_output(expected: Sequence[Any], found: Sequence[Any], what: str) -> None:
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if first_difference(_plain(one), _plain(other)) is not None:
            raise AssertionError(f"{what}: output {index} should be {one!r}, got {other!r}")
    if len(expected) != len(found):
        raise AssertionError(f"{what}: expected {len(expected)} outputs, got {len(found)}")


def _plain(value: Any) -> Any:
    """What a stage returns, as nested dicts and lists, so that arrays and nans in it can be compared bit for bit."""
    if isinstance(value, msgspec.Struct):
        return {"": type(value).__name__, **{name: _plain(getattr(value, name)) for name in value.__struct_fields__}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {"": type(value).__name__, **{name: _plain(getattr(value, name)) for name in names}}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _parts(events: Sequence[Any], cuts: Sequence[int]) -> list[Sequence[Any]]:
    return [events[start:end] for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True)]


def _spread(count: int) -> list[int]:
    """Every cut from 0 to `count`, or 50 of them with both ends."""
    if count < _MAX_CUTS:
        return [*range(count + 1)]
    return sorted({round(number * count / (_MAX_CUTS - 1)) for number in range(_MAX_CUTS)})
