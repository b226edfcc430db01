"""States under test: are they plain, are they the same, and a copy to compare with later."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from streamrec.protocols import Changed

__all__ = ["check_state_is_plain", "copy_state", "first_difference", "same_state"]

_SCALARS = (str, bytes, int, float, bool, type(None))
_ARRAY_KINDS = "biufc"


def check_state_is_plain(state: object) -> None:
    """Fail unless `state` can be stored as it is: nested mappings with string keys, and lists, of plain leaves.

    The leaves are numpy arrays of numbers or booleans, torch tensors, strings, bytes, integers of 64 bits, floats,
    booleans and None. Raises `AssertionError` naming the first place that holds something else.

    >>> check_state_is_plain({"seen": {1, 2}})
    Traceback (most recent call last):
        ...
    AssertionError: state['seen'] is a set, which cannot be stored without pickle; use a list or a numpy array
    """
    if not isinstance(state, Mapping):
        raise AssertionError(f"a state is a mapping with string keys, got a {type(state).__name__}")
    _check_plain(state, "state")


def same_state(a: object, b: object) -> bool:
    """Whether two states are equal bit for bit: types, dtypes, shapes, nan and the sign of zero included.

    >>> same_state({"mean": float("nan")}, {"mean": float("nan")}), same_state({"n": 1}, {"n": 1.0})
    (True, False)
    """
    return first_difference(a, b) is None


def first_difference(a: object, b: object, where: str = "state") -> str | None:
    """Where two states differ and how, for a message; None where they are equal bit for bit.

    >>> first_difference({"n": [1, 2]}, {"n": [1, 3]})
    "state['n'][1] is 2 in one and 3 in the other"
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        only = sorted(set(map(repr, a)) ^ set(map(repr, b)))
        if only:
            return f"{where} has the key {only[0]} in one and not in the other"
        for key in a:
            found = first_difference(a[key], b[key], f"{where}[{key!r}]")
            if found is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{where} has {len(a)} entries in one and {len(b)} in the other"
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            found = first_difference(left, right, f"{where}[{index}]")
            if found is not None:
                return found
        return None
    if isinstance(a, Changed) and isinstance(b, Changed):
        return first_difference(vars(a), vars(b), where)
    if _bits(a) == _bits(b):
        return None
    return f"{where} is {_short(a)} in one and {_short(b)} in the other"


def copy_state(state: Any) -> Any:
    """A deep copy that shares no memory with `state`, in plain dicts and lists, as if it had been stored."""
    if isinstance(state, Mapping):
        return {key: copy_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copy_state(value) for value in state]
    if isinstance(state, np.ndarray):
        return state.copy()
    if _is_tensor(state):
        return state.detach().clone()
    if isinstance(state, Changed):
        return Changed(state.rows.copy(), copy_state(state.values), state.length)
    return state


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if type(key) is not str:
                raise AssertionError(f"{where} has the key {key!r}, a {type(key).__name__}; the keys are strings")
            _check_plain(inner, f"{where}[{key!r}]")
    elif type(value) is list:
        for index, inner in enumerate(value):
            _check_plain(inner, f"{where}[{index}]")
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in _ARRAY_KINDS:
            raise AssertionError(
                f"{where} is a numpy array of {value.dtype}; arrays hold numbers or booleans, strings go in a list"
            )
    elif type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise AssertionError(f"{where} is {value}, which does not fit in 64 bits; keep it as a string or an array")
    elif isinstance(value, Changed):
        _check_plain(vars(value), where)
    elif type(value) not in _SCALARS and not _is_tensor(value):
        name = type(value).__name__
        if isinstance(value, np.generic):
            cure = "use .item() or a numpy array"
        elif isinstance(value, tuple):
            cure = "use a list"
        else:
            cure = "use a list or a numpy array"
        raise AssertionError(f"{where} is a {name}, which cannot be stored without pickle; {cure}")


def _is_tensor(value: object) -> bool:
    # by name, so that checking a part without tensors does not load torch
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__)


def _bits(value: Any) -> object:
    """Something equal exactly where the bits of a leaf are."""
    if isinstance(value, np.ndarray):
        content: object = value.tolist() if value.dtype.hasobject else value.tobytes()
        return "array", value.dtype.str, value.shape, content
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    if _is_tensor(value):
        flat = value.detach().cpu().contiguous().flatten()
        # through bytes: numpy does not know bfloat16; torch is loaded, as here is one of its tensors
        # (an empty tensor may have strides that cannot be viewed so)
        content = flat.view(sys.modules["torch"].uint8).numpy().tobytes() if flat.numel() else b""
        return "tensor", str(value.dtype), tuple(value.shape), content
    if isinstance(value, float):
        return type(value), struct.pack("<d", value)
    return type(value), value


def _short(value: object) -> str:
    if isinstance(value, np.ndarray) or _is_tensor(value):
        text = f"{type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}: {value}"  # type: ignore[attr-defined]
    else:
        text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
