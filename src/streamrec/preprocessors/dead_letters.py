"""DeadLetters: the newest of what could not be used, and counts of all of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import msgspec

from streamrec.errors import ConfigError
from streamrec.events import DeadLetter
from streamrec.protocols import State

__all__ = ["DeadLetters"]

_MAX_CATEGORIES = 100
_MAX_CATEGORY = 64
_OTHER = "other"


class DeadLetters:
    """Keeps the newest `capacity` dead letters, their bytes and reasons cut at `max_raw`, and counts all of them.

    They are counted by category: the text of the reason before the first ":". The first 100 categories have a count
    of their own, later ones share "other". Each of `listeners` is called with every letter, whole, when it comes: it is
    where to log them, or to send them on.

    >>> letters = DeadLetters(capacity=1)
    >>> for offset in (0, 40):
    ...     letters.add(DeadLetter({"path": "a.jsonl", "offset": offset}, "malformed: JSON is malformed", b"{"))
    >>> [letter.position["offset"] for letter in letters], letters.counts
    ([40], {'malformed': 2})
    """

    def __init__(self, *, capacity: int = 1000, max_raw: int = 4096) -> None:
        if capacity < 0:
            raise ConfigError(f"capacity must be >= 0 letters, got {capacity!r}")
        if max_raw < 0:
            raise ConfigError(f"max_raw must be >= 0 bytes, got {max_raw!r}")
        self.capacity = capacity
        self.max_raw = max_raw
        self.listeners: list[Callable[[DeadLetter], None]] = []
        self._kept: deque[DeadLetter] = deque(maxlen=capacity)
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        """How many letters are kept, at most `capacity`."""
        return len(self._kept)

    def __iter__(self) -> Iterator[DeadLetter]:
        """The kept letters, oldest first."""
        return iter(tuple(self._kept))

    @property
    def counts(self) -> Mapping[str, int]:
        """How many letters there were, by category, also of those no longer kept."""
        return dict(self._counts)

    @property
    def total(self) -> int:
        """How many letters there were."""
        return sum(self._counts.values())

    def add(self, letter: DeadLetter) -> None:
        """Count a letter and keep it, in place of the oldest where there are `capacity`."""
        # a reason may quote the event: half a surrogate pair in it must not make the state impossible to store
        reason = letter.reason[: self.max_raw].encode("utf-8", "replace").decode()
        category = letter.reason[:_MAX_CATEGORY].encode("utf-8", "replace").decode().split(":", 1)[0].strip() or _OTHER
        if category not in self._counts and len(self._counts) >= _MAX_CATEGORIES:
            category = _OTHER
        self._counts[category] = self._counts.get(category, 0) + 1
        self._kept.append(DeadLetter(letter.position, reason, letter.raw[: self.max_raw]))
        for listener in self.listeners:
            listener(letter)

    def state_dict(self) -> State:
        """The kept letters, oldest first, and the counts."""
        return {
            # as JSON: a position is what JSON can hold, which is more than what a state can
            "positions": [msgspec.json.encode(letter.position).decode() for letter in self._kept],
            "reasons": [letter.reason for letter in self._kept],
            "raws": [letter.raw for letter in self._kept],
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from."""
        letters = zip(state["positions"], state["reasons"], state["raws"], strict=True)
        self._kept = deque(
            (DeadLetter(msgspec.json.decode(position), reason, raw) for position, reason, raw in letters),
            maxlen=self.capacity,
        )
        self._counts = dict(state["counts"])
