"""What frozen layers made of a row, kept in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from streamrec.models._packed import Tokens

__all__ = ["Activations"]

_OVERHEAD = 400
"""Bytes of a tensor, a key and their place in a dictionary, beside the numbers."""


class Activations:
    """The hidden states of rows, by the version of the layers that made them and the row's tokens; the least recently
    used go first. Several threads may ask at once."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = self.hits = self.misses = 0
        self._held: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(
        self, version: str, rows: Sequence[Tokens], make: Callable[[Sequence[Tokens]], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Those of these rows, which are distinct and in the order in which `make` wants those that are missing."""
        keys = [(version, row.key) for row in rows]
        with self._lock:
            found = [self._held.get(key) for key in keys]
            for key, one in zip(keys, found, strict=True):
                if one is not None:
                    self._held.move_to_end(key)
            missing = [place for place, one in enumerate(found) if one is None]
            self.hits += len(rows) - len(missing)
            self.misses += len(missing)
        if missing:
            for place, one in zip(missing, make([rows[place] for place in missing]), strict=True):
                found[place] = one
            with self._lock:
                for place in missing:
                    self._put(keys[place], found[place])
        return [one for one in found if one is not None]

    def _put(self, key: tuple[str, bytes], value: Tensor | None) -> None:
        if value is None or key in self._held:
            return
        self._held[key] = value
        self.bytes += _size(key, value)
        while self.bytes > self.capacity:
            self.bytes -= _size(*self._held.popitem(last=False))

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._held.clear()
            self.bytes = 0


def _size(key: tuple[str, bytes], value: Tensor) -> int:
    return value.numel() * value.element_size() + len(key[1]) + _OVERHEAD
