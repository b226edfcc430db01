"""TextCache: each text is encoded once, not once an event."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.models.text_encoder import TextEncoder, normalised

__all__ = ["TextCache"]

OVERHEAD = 300
"""Bytes that a text takes beside its vector and itself."""


class TextCache:
    """The vectors of texts by one encoder, each computed once and kept, the least recently used given up first.

    Kept in float16 by default, rounded once: a text has one vector, whether it was there or not.
    """

    def __init__(self, encoder: TextEncoder, *, max_bytes: int = 1 << 30, dtype: str = "float16") -> None:
        if dtype not in ("float16", "float32"):
            raise ConfigError(f"dtype must be float16 or float32, got {dtype!r}")
        if max_bytes < 1 << 16:
            raise ConfigError(f"max_bytes must be {1 << 16} at least, got {max_bytes!r}")
        self.encoder, self.max_bytes, self.dtype = encoder, max_bytes, np.dtype(dtype)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], NDArray[np.generic]] = OrderedDict()
        self._bytes = 0
        self._counts = dict.fromkeys(("hits", "misses", "evicted", "renewed"), 0)

    @property
    def hidden(self) -> int:
        """How long a vector is."""
        return self.encoder.hidden

    @property
    def counts(self) -> Mapping[str, int]:
        """Texts asked for that were there, and that were not; vectors given up; vectors made again by `renew`."""
        return dict(self._counts)

    @property
    def hit_rate(self) -> float:
        """The share of texts asked for that were there; nan before the first."""
        asked = self._counts["hits"] + self._counts["misses"]
        return self._counts["hits"] / asked if asked else float("nan")

    def __len__(self) -> int:
        return len(self._kept)

    def vectors(self, texts: Sequence[str | None]) -> NDArray[np.float32]:
        """float32 `(n, hidden)`: the texts' vectors; those that are not there are computed, and kept."""
        found = np.zeros((len(texts), self.hidden), dtype=np.float32)
        encoder = self.encoder
        version = encoder.version
        missing: dict[str, list[int]] = {}
        with self._lock:
            for n, text in enumerate(texts):
                key = (version, normalised(text)) if text else (version, "")
                if not key[1]:
                    continue
                vector = self._kept.get(key)
                if vector is None:
                    missing.setdefault(key[1], []).append(n)
                    self._counts["misses"] += 1
                else:
                    self._kept.move_to_end(key)
                    found[n] = vector
                    self._counts["hits"] += 1
        if missing:
            with np.errstate(over="ignore"):
                made = np.nan_to_num(encoder.embed(list(missing)).astype(self.dtype))
            for (text, places), vector in zip(missing.items(), made, strict=True):
                self._keep((version, text), vector)
                found[places] = vector
        return found

    def _keep(self, key: tuple[str, str], vector: NDArray[np.generic]) -> None:
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = vector.copy()
            self._bytes += vector.nbytes + len(key[1]) + OVERHEAD
            while self._bytes > self.max_bytes:
                (_, text), old = self._kept.popitem(last=False)
                self._bytes -= old.nbytes + len(text) + OVERHEAD
                self._counts["evicted"] += 1

    def renew(self, encoder: TextEncoder, budget: int) -> int:
        """Compute `budget` texts at most by an encoder to come, those used last first; how many were left to do.

        Nothing that `vectors` gives changes before `switch`. To be called by a thread of the caller's, again and again.
        """
        if encoder.hidden != self.hidden:
            raise ConfigError(f"vectors of {encoder.hidden} numbers cannot take the place of {self.hidden}")
        version = encoder.version
        with self._lock:
            old = dict.fromkeys(text for kept, text in reversed(self._kept) if kept != version)
            todo = [text for text in old if (version, text) not in self._kept][:budget]
        if todo:
            for text, vector in zip(todo, encoder.embed(todo).astype(self.dtype), strict=True):
                self._keep((version, text), vector)
                self._counts["renewed"] += 1
        return len(todo)

    def switch(self, encoder: TextEncoder) -> None:
        """From now on, vectors are by this encoder: those that `renew` has made, and new ones."""
        if encoder.hidden != self.hidden:
            raise ConfigError(f"vectors of {encoder.hidden} numbers cannot take the place of {self.hidden}")
        self.encoder = encoder
