"""A state and the changes made to it since, as one state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamrec.errors import ConfigError, DamagedError
from streamrec.protocols import Changed, State, room_for

__all__ = ["resolve"]

_ABSENT = object()


def resolve(states: Sequence[State]) -> dict[str, Any]:
    """The last of these states, each of them but the first holding changes of the one before.

    The first one's arrays may become part of it. Raises `DamagedError` where a change fits nothing.

    >>> first = {"step": 1, "weights": np.zeros(3)}
    >>> resolve([first, {"step": 2, "weights": Changed(np.array([1]), np.array([5.0]), length=3)}])
    {'step': 2, 'weights': array([0., 5., 0.])}
    """
    found: dict[str, Any] = _resolve(states, "")
    return found


def _resolve(values: Sequence[Any], path: str) -> Any:
    """What the last of these values at one path stands for."""
    last = values[-1]
    if isinstance(last, Mapping):
        return {key: _resolve([_inside(one, key) for one in values], f"{path}/{key}") for key in last}
    if isinstance(last, list) and not {dict, list, Changed}.isdisjoint(map(type, last)):
        return [_resolve([_inside(one, at) for one in values], f"{path}/{at}") for at in range(len(last))]
    if isinstance(last, Changed):
        first = next((at for at in reversed(range(len(values))) if not isinstance(values[at], Changed)), 0)
        return _applied(values[first], values[first + 1 :], path)
    return last


def _inside(value: Any, key: Any) -> Any:
    try:
        return value[key] if isinstance(value, (Mapping, list)) else _ABSENT
    except LookupError:
        return _ABSENT


def _applied(before: Any, changes: Sequence[Changed], path: str) -> Any:
    if not hasattr(before, "dtype") or np.ndim(before) == 0:
        raise DamagedError(f"{path} changes what is no array before")
    used, most = len(before), max(change.length for change in changes)
    room = before if most <= used else room_for(before, most)
    for change in changes:
        try:
            change.put(room, used)
        except ConfigError as error:
            raise DamagedError(f"{path} does not fit what it changes: {error}") from error
        used = change.length
    return room[:used]
