"""TextCache: each text is encoded once, not once an event."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._keyed_table import EMPTY
from streamrec.errors import ConfigError
from streamrec.hashing import packed
from streamrec.models import _text_rows as loops
from streamrec.models._text_memory import TextMemory
from streamrec.models.text_encoder import TextEncoder

__all__ = ["TextCache"]

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
LARGEST_HALF = 65504.0


class TextCache:
    """The vectors of texts by one encoder, each computed once and kept, the least recently used given up first.

    A text is found by the encoder's version and its normal form, so that a changed encoder never serves an old vector:
    its version is looked at in every call. `max_bytes` bound all of it, texts and tables included: with vectors of 384
    numbers in float16, a text takes some 950 bytes. `dtype`: "float16", rounded once, so that a text has one vector
    whether it was there or not, or "float32".

    `path`: a file that keeps them, mapped into memory and shared by all processes of this machine that open it. It has
    its size from the first of them. A process may be killed at any time, and two may store at once: what was stored
    first is the text's vector. Where the disk has torn a row, it is computed again and counted.

    A new encoder takes over by `renew`, again and again from a thread of yours, and then `switch`.

    Raises `ConfigError` where an argument cannot work, `StoreError` where the file cannot be used.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        max_bytes: int = 1 << 30,
        path: str | os.PathLike[str] | None = None,
        dtype: str = "float16",
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ConfigError(f"dtype must be float16 or float32, got {dtype!r}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise ConfigError(f"max_bytes must be a whole number, got {max_bytes!r}")
        if encoder.pooling == "none":
            raise ConfigError('a cache keeps one vector a text, and pooling="none" gives none: use "mean" or "cls"')
        self._dtype = np.dtype(dtype)
        self._encoder = encoder
        self._memory = TextMemory(encoder.hidden, self._dtype, max_bytes, None if path is None else os.fspath(path))
        self._counting = threading.Lock()
        self._counts = dict.fromkeys(("hits", "misses", "renewed"), 0)
        self._coming = ""

    @property
    def encoder(self) -> TextEncoder:
        """By whom the vectors are."""
        return self._encoder

    @property
    def hidden(self) -> int:
        """How many numbers a vector has."""
        return self._encoder.hidden

    @property
    def bytes(self) -> int:
        """Of all that is kept and has room here."""
        return self._memory.layout.size

    @property
    def capacity(self) -> int:
        """How many vectors there is room for, where texts have 80 bytes on average."""
        return self._memory.layout.rows

    def __len__(self) -> int:
        """How many vectors there are, by whichever encoder."""
        return len(self._memory)

    @property
    def counts(self) -> Mapping[str, int]:
        """Of this process: texts asked for that were there and that were not (those that say nothing are neither),
        vectors given up, vectors made by `renew`, rows that were found torn."""
        return {**self._counts, "evicted": self._memory.evicted, "damaged": self._memory.damaged}

    @property
    def hit_rate(self) -> float:
        """The share of texts asked for that were there; nan before the first."""
        asked = self._counts["hits"] + self._counts["misses"]
        return self._counts["hits"] / asked if asked else float("nan")

    def vectors(self, texts: Sequence[str | None], *, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """float32 `(n, hidden)`: the texts' vectors; those that are not there are computed, and kept.

        `out`: an array of that shape, without gaps, to write them to and return; a new one otherwise, whose memory the
        system takes longer to give than the look-ups take. Raises `ConfigError` for one of another shape or type.
        """
        encoder = self._encoder
        shape = (len(texts), encoder.hidden)
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.carray:
            raise ConfigError(f"out must be float32 of shape {shape}, C-contiguous, got {out.dtype} of {out.shape}")
        data, spans = self._read(texts, encoder)
        keys = np.empty((len(texts), 2), dtype=np.uint64)
        while True:
            version = encoder.version
            loops.fetch_all(data, spans, *_seeds(version), keys)
            with self._memory.reading():
                found = self._memory.find(spans, keys)
                self._memory.copy(found, out)
            missing = np.flatnonzero(found == EMPTY)
            if not len(missing) or self._compute(encoder, version, data, spans, keys, missing, out):
                break
        said = int(np.count_nonzero(found != loops.NOTHING))
        with self._counting:
            self._counts["misses"] += len(missing)
            self._counts["hits"] += said - len(missing)
        return out

    def _read(self, texts: Sequence[str | None], encoder: TextEncoder) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The texts' normal forms in one buffer, and where each begins and ends."""
        try:  # to look at each text for whether it is one, or too long, would take longer than all that follows
            given, cuts = packed(texts)  # type: ignore[arg-type]
        except TypeError:
            given, cuts = packed([text or "" for text in texts])
        data = np.frombuffer(given, dtype=np.uint8)
        forms, spans, most = loops.normal_forms(data, cuts, len(texts))
        if most > encoder.longest:  # bytes, which are more than characters or as many
            cut = [text[: encoder.longest] if text else "" for text in texts]
            if cut != list(texts):
                return self._read(cut, encoder)
        return (forms if len(forms) else data), spans

    def _compute(
        self,
        encoder: TextEncoder,
        version: str,
        data: NDArray[np.uint8],
        spans: NDArray[np.int64],
        keys: NDArray[np.uint64],
        missing: NDArray[np.int64],
        out: NDArray[np.float32],
    ) -> bool:
        """Compute and keep these of the texts, and write their vectors to `out`; false where the encoder has changed
        meanwhile."""
        _, firsts, which = np.unique(keys[missing], axis=0, return_index=True, return_inverse=True)
        distinct = missing[firsts]
        texts = [data[begin:end].tobytes().decode("utf-8") for begin, end in spans[distinct].tolist()]
        made = self._rounded(encoder.embed(texts))
        if encoder.version != version:
            return False
        kept = self._kept(version)
        self._memory.store(data, spans[distinct], keys[distinct], made, int(kept[0]), kept)
        out[missing] = made.astype(np.float32)[which.reshape(-1)]
        return True

    def _rounded(self, vectors: NDArray[np.float32]) -> NDArray[Any]:
        if self._dtype == np.float32:
            return vectors
        return np.clip(np.nan_to_num(vectors), -LARGEST_HALF, LARGEST_HALF).astype(np.float16)

    def _kept(self, version: str) -> NDArray[np.uint64]:
        """The versions that are of use, the given one first."""
        return np.array([_seeds(one)[0] for one in (version, self._encoder.version, self._coming) if one], np.uint64)

    def by(self, encoder: TextEncoder) -> TextCache:
        """The same cache, its memory and its counts, for vectors by another encoder of as many numbers."""
        self._require_like(encoder)
        made = copy.copy(self)
        made._encoder, made._coming = encoder, ""
        return made

    def renew(self, encoder: TextEncoder, budget: int) -> int:
        """Compute at most `budget` of the texts here by an encoder to come, and say how many; 0 when all are done.

        Those used last and most come first. `vectors` gives what it gave until `switch`; other threads may ask for them
        meanwhile. Texts longer than 4 KiB are not kept, and are computed when they are asked for.
        """
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ConfigError(f"budget must be a number of texts, 1 at least, got {budget!r}")
        return next(self.renewals(encoder, budget), 0)

    def renewals(self, encoder: TextEncoder, budget: int, embed: Embed | None = None) -> Iterator[int]:
        """All of the texts here, as `renew` computes them, `budget` at a time; all rows are looked through once, not
        once a `budget`. `embed`: who computes in the encoder's place, what it would."""
        self._require_like(encoder)
        version = self._coming = encoder.version
        seeds, kept = _seeds(version), self._kept(version)
        memory, embed = self._memory, encoder.embed if embed is None else embed
        while True:
            # without the lock, for it takes long: what is no more so is found below
            rows = np.flatnonzero(_may_be_renewed(memory.rows, seeds[0]))
            if not len(rows):
                return
            recency, popularity = memory.rows["used"][rows], memory.rows["uses"][rows]
            rows = rows[np.argsort(-(_ranks(recency) + _ranks(popularity)), kind="stable")]
            for start in range(0, len(rows), budget):
                chosen = rows[start : start + budget]
                with memory.reading():
                    # what has been given up since is left out
                    chosen = chosen[_may_be_renewed(memory.rows[chosen], seeds[0])]
                    owners = memory.rows[["high", "low"]][chosen]
                    used, uses = memory.rows["used"][chosen], memory.rows["uses"][chosen]
                    texts = [memory.text(row) for row in chosen.tolist()]
                if not texts:
                    continue
                history = np.stack([used, uses.astype(np.int64)], axis=1)
                data, spans = self._read(texts, encoder)
                keys = np.empty((len(texts), 2), dtype=np.uint64)
                loops.fetch_all(data, spans, *seeds, keys)
                _, first = np.unique(keys, axis=0, return_index=True)
                with memory.reading():
                    new = first[memory.find(spans[first], keys[first]) == EMPTY]
                if len(new):
                    made = self._rounded(embed([texts[n] for n in new.tolist()]))
                    memory.store(data, spans[new], keys[new], made, int(seeds[0]), kept, history[new])
                with memory.writing():
                    same = memory.rows[["high", "low"]][chosen] == owners
                    memory.rows["renewed"][chosen[same]] = seeds[0]
                if len(new):
                    with self._counting:
                        self._counts["renewed"] += len(new)
                    yield len(new)

    def switch(self, encoder: TextEncoder) -> None:
        """From now on vectors are by this encoder: those that `renew` has made, and new ones. Those by the encoder
        before are the first to be given up."""
        self._require_like(encoder)
        self._encoder, self._coming = encoder, ""

    def _require_like(self, encoder: TextEncoder) -> None:
        if encoder.hidden != self.hidden or encoder.pooling == "none":
            raise ConfigError(
                f"vectors of {encoder.hidden} numbers cannot take the place of {self.hidden}: "
                "they need a cache of their own"
            )

    def flush(self) -> None:
        """Have a file written to the disk now: without it the system does so in its own time, whatever becomes of this
        process."""
        self._memory.flush()


def _seeds(version: str) -> tuple[np.uint64, np.uint64]:
    return np.uint64(int(version[:16], 16)), np.uint64(int(version[16:], 16))


def _may_be_renewed(rows: NDArray[Any], version: np.uint64) -> NDArray[np.bool_]:
    live = (rows["live"] == 1) & (rows["version"] != version) & (rows["renewed"] != version)
    kept: NDArray[np.bool_] = live & (rows["length"] <= loops.LONGEST)
    return kept


def _ranks(values: NDArray[Any]) -> NDArray[np.int64]:
    """int64 `(n,)`: the place of each among the distinct values, in order."""
    ranks: NDArray[np.int64] = np.unique(values, return_inverse=True)[1].reshape(-1)
    return ranks
