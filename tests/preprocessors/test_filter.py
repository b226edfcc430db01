from __future__ import annotations

from typing import Any

import pytest

from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback
from streamrec.preprocessors.filter import Filter
from streamrec.testing import check_stage

EVENTS: list[Event] = [Feedback(id=str(n), impression_id="i1", time=float(n)) for n in range(20)]


def even(event: Event) -> bool:
    assert isinstance(event, Feedback)
    if event.id == "13":
        raise ValueError("unlucky")
    return int(event.id) % 2 == 0


def test_filter_keeps_the_contract_of_stages() -> None:
    check_stage(lambda: Filter(even), EVENTS)


def test_filter_drops_and_counts_and_never_stops_the_stream() -> None:
    odd_out = Filter(even, reason="odd")
    assert odd_out.push(EVENTS) == EVENTS[::2]
    assert odd_out.counts == {"odd": 9, "filter_error": 1}
    assert isinstance(odd_out.last_error, ValueError)


def test_what_keep_returns_is_taken_as_true_or_false() -> None:
    class Undecided:
        def __bool__(self) -> bool:
            raise TypeError("neither")

    answers: list[Any] = [1, "", None, [0], Undecided()]
    keep = Filter(lambda event: answers[int(event.id)])  # type: ignore[union-attr]
    assert keep.push(EVENTS[:5]) == [EVENTS[0], EVENTS[3]]
    assert keep.counts == {"filtered": 2, "filter_error": 1}


def test_an_interrupt_is_no_error_of_the_filter() -> None:
    def interrupted(event: Event) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Filter(interrupted).push(EVENTS)


def test_what_cannot_work_is_refused() -> None:
    none: Any = None
    with pytest.raises(ConfigError, match="function of one event"):
        Filter(none)
    for reason in ("", "filter_error"):
        with pytest.raises(ConfigError, match="reason"):
            Filter(even, reason=reason)
