"""Filter: only the events you want."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from streamrec.errors import ConfigError
from streamrec.events import Event
from streamrec.protocols import State

__all__ = ["Filter"]


class Filter:
    """Drop the events that `keep` returns false for, counted under `reason`.

    An event on which `keep` raises is dropped too and counted under "filter_error"; `last_error` is the newest such
    exception. `keep` must not remember anything of its own: it is not part of the state.

    >>> from streamrec.events import Feedback
    >>> clicks = Filter(lambda event: event.kind == "click", reason="no_click")
    >>> clicks.push([Feedback(id="f1", impression_id="i1", time=1.0, kind="like")]), clicks.counts
    ([], {'no_click': 1, 'filter_error': 0})
    """

    def __init__(self, keep: Callable[[Event], bool], *, reason: str = "filtered") -> None:
        if not callable(keep):
            raise ConfigError(f"keep must be a function of one event, got {keep!r}")
        if not reason or reason == "filter_error":
            raise ConfigError(f'reason must be a word of its own, not empty and not "filter_error", got {reason!r}')
        self.keep = keep
        self.reason = reason
        self.last_error: Exception | None = None
        self._dropped = 0
        self._errors = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """How many events `keep` refused, under `reason`, and on how many it raised, under `filter_error`."""
        return {self.reason: self._dropped, "filter_error": self._errors}

    def push(self, events: Sequence[Event]) -> list[Event]:
        """The events that `keep` returns true for, in order."""
        keep = self.keep
        kept: list[Event] = []
        for event in events:
            try:
                wanted = bool(keep(event))
            except Exception as error:
                # Broad on purpose: `keep` is the user's, and one odd event may not stop the stream.
                self._errors += 1
                self.last_error = error.with_traceback(None)  # a traceback would keep the caller's variables alive
                continue
            if wanted:
                kept.append(event)
            else:
                self._dropped += 1
        return kept

    def state_dict(self) -> State:
        """The counts."""
        return {"dropped": self._dropped, "errors": self._errors}

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from."""
        self._dropped = state["dropped"]
        self._errors = state["errors"]
