"""What stands for the open impressions of a join, to be saved."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.events import Impression

__all__ = ["pack", "unpack"]


def pack(payloads: list[Any]) -> NDArray[np.int64] | bytes:
    if all(isinstance(payload, (int, np.integer)) for payload in payloads):
        return np.array(payloads, dtype=np.int64)
    if all(isinstance(payload, Impression) for payload in payloads):
        # MessagePack: JSON would turn the nan of a feature into null.
        return msgspec.msgpack.encode(payloads, enc_hook=_plain)
    found = ", ".join(sorted({type(payload).__name__ for payload in payloads}))
    raise ConfigError(f"payloads must be all 64-bit integers or all Impressions to be saved, got {found}")


def unpack(packed: NDArray[np.int64] | bytes) -> list[Any]:
    if isinstance(packed, bytes):
        return msgspec.msgpack.decode(packed, type=list[Impression])
    unpacked: list[Any] = packed.tolist()
    return unpacked


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):  # a feature straight from a computation
        return value.tolist()
    raise TypeError(f"cannot save a feature of type {type(value).__name__}: use strings, numbers, lists or mappings")
