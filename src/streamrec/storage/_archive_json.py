"""Features as JSON, whatever is in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

__all__ = ["json_lines", "sound"]

_DEEPEST = 32  # features nested deeper are cut off there


def _plain(value: Any) -> Any:
    """What JSON has in the place of a value that it has not."""
    if isinstance(value, (np.generic, np.ndarray)):  # straight from a computation
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else sound(repr(value))


_encode_lines = msgspec.json.Encoder(enc_hook=_plain).encode_lines


def json_lines(features: list[Any]) -> bytes:
    try:
        return _encode_lines(features)
    except Exception:  # broad on purpose: the values are the user's, and an archive may not stop the stream
        return _encode_lines([_cleaned(one) for one in features])


def _cleaned(value: Any, depth: int = 0) -> Any:
    """A value as something that JSON can hold: half surrogates replaced, what it has not as its `repr`."""
    if value is None or type(value) in (bool, float):
        return value
    if isinstance(value, str):
        return sound(value)
    if type(value) is int and -(2**63) <= value < 2**64:
        return value
    if depth < _DEEPEST:
        if isinstance(value, Mapping):
            return {sound(str(name)): _cleaned(each, depth + 1) for name, each in value.items()}
        if isinstance(value, (list, tuple, set, frozenset, np.ndarray, np.generic)):
            told = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
            return [_cleaned(each, depth + 1) for each in told] if np.iterable(told) else told
    try:
        return sound(repr(value))[:200]
    except Exception:  # broad on purpose, as above: not even that
        return f"a {type(value).__name__}"


def sound(text: str) -> str:
    """A string without half surrogates, which no file may hold."""
    return text.encode("utf-8", "replace").decode()
