from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.errors import ConfigError
from streamrec.events import DeadLetter, Feedback, Impression, Item, Labeled, decode_event, encode_event
from streamrec.preprocessors.validate import Validate
from streamrec.testing import check_stage

DAY = 86400.0


def shown(**other: Any) -> Impression:
    return Impression(**{"id": "i1", "time": 1.7e9, "user": "u1", "item": "p1", **other})


def clicked(**other: Any) -> Feedback:
    return Feedback(**{"id": "f1", "impression_id": "i1", "time": 1.7e9, **other})


def labeled(**other: Any) -> Labeled:
    return Labeled(**{"impression": shown(), "label": 1.0, **other})


class Odd:
    def __repr__(self) -> str:
        raise ValueError("no repr")


nan, inf = float("nan"), float("inf")
GOOD: list[Any] = [
    shown(), shown(time=0.0), shown(time=5), shown(score=0.5), shown(score=1), shown(user="", item=""),
    shown(id="ä" * 1024, user="用户"), shown(features={"a": 1, "b": ["c"]}), shown(features=MappingProxyType({"a": 1})),
    shown(time=253402300799.0), clicked(), clicked(kind="buy", value=-3.5), clicked(id="é", value=2), clicked(time=1),
    labeled(), labeled(label=0), labeled(label=0.25, weight=0.0, kind="buy"), labeled(impression=shown(user="ü")),
    DeadLetter({}, "malformed: x"),
]  # fmt: skip
TIMES: list[Any] = [nan, inf, -inf, -1.0, 1.7e12, 253402300800.0, 10**400, "1", None, True, np.float64(1.0), Odd()]
NO_IDS: list[Any] = [5, None, b"x", np.str_("x"), "\ud800", ["x"], np.zeros(3)]
BAD: list[tuple[Any, str]] = [
    *[(make(time=time), "bad time") for make in (shown, clicked) for time in TIMES],
    *[(shown(**{name: value}), "bad id") for name in ("id", "user", "item") for value in NO_IDS],
    *[(clicked(**{name: value}), "bad id") for name in ("id", "impression_id", "kind") for value in NO_IDS],
    *[(shown(**{name: "x" * 1025}), "id too long") for name in ("id", "user", "item")],
    *[(clicked(**{name: "x" * 1025}), "id too long") for name in ("id", "impression_id", "kind")],
    (shown(id="x" * 1_000_000), "id too long"), (labeled(kind="x" * 1025), "id too long"),
    (shown(id=""), "bad id"), (clicked(id=""), "bad id"), (clicked(impression_id=""), "bad id"),
    *[(shown(score=score), "bad score") for score in (nan, inf, -0.1, 1.1, "0.5", True, np.float32(0.5))],
    *[(clicked(value=value), "bad value") for value in (nan, inf, -inf, "3", 10**400, -(10**5000))],
    *[(labeled(label=label), "bad label") for label in (nan, 2.0, -1.0, None, "1", True)],
    *[(labeled(weight=weight), "bad weight") for weight in (nan, inf, -1.0, None, 10**400)],
    *[(shown(features=features), "bad features") for features in (None, [("a", 1)], {1: 2}, {"a": 1, None: 2})],
    *[(labeled(impression=other), "bad event") for other in (clicked(), None, DeadLetter({}, "x"), labeled())],
    *[(labeled(kind=value), "bad id") for value in NO_IDS],
    (labeled(impression=shown(time=nan)), "bad time"),
    *[(event, "bad event") for event in (None, "i1", {"id": "i1"}, Odd(), Impression)],
]  # fmt: skip


@pytest.mark.parametrize("event", GOOD, ids=lambda event: repr(event)[:60])
def test_good_events_go_on_as_they_are(event: Any) -> None:
    (out,) = Validate().push([event])
    assert out is event


@pytest.mark.parametrize(("event", "category"), BAD)
def test_a_bad_event_is_a_dead_letter_in_its_place(event: Any, category: str) -> None:
    validate = Validate()
    before, letter, after = validate.push([shown(), event, clicked()])
    assert isinstance(before, Impression) and isinstance(after, Feedback)
    assert isinstance(letter, DeadLetter) and letter.position == {}
    assert letter.reason.split(":")[0] == category and len(letter.reason) < 300
    assert validate.counts == {}
    letter.reason.encode()
    encode_event(letter)


def test_the_cure_for_milliseconds_is_told() -> None:
    (letter,) = Validate().push([shown(time=1.7e12)])
    assert isinstance(letter, DeadLetter)
    assert "times are POSIX seconds; divide milliseconds by 1000" in letter.reason
    assert decode_event(letter.raw) == shown(time=1.7e12)


def test_what_cannot_be_encoded_is_kept_as_its_repr() -> None:
    (letter,) = Validate().push([shown(id=5, user="x" * 9000, features={"a": object})])
    assert isinstance(letter, DeadLetter)
    assert letter.raw.startswith(b"Impression(id=5, ") and len(letter.raw) == 4096
    (letter,) = Validate().push([shown(time=Odd())])
    assert isinstance(letter, DeadLetter) and letter.raw == b""


def test_max_id_is_in_characters() -> None:
    validate = Validate(max_id=3)
    assert [type(out) for out in validate.push([shown(id="äöü"), shown(id="abcd")])] == [Impression, DeadLetter]


def verdicts(times: list[float], **settings: float) -> list[bool]:
    validate = Validate(**settings)  # type: ignore[arg-type]
    return [isinstance(validate.push([clicked(time=time)])[0], Feedback) for time in times]


@pytest.mark.parametrize(
    ("days", "good"),
    [
        ([100, 0, 100, 107, 114], [1, 1, 1, 1, 1]),  # the first as it is; late ones always; a week at a time
        ([0, 8, 1, 2], [1, 0, 1, 1]),  # one sender's wrong clock
        ([0, 8, 8, 9], [1, 0, 1, 1]),  # two agree: the stream was away for eight days
        ([0, 8, 14, 9], [1, 0, 1, 1]),
        ([0, 8, 30, 8, 8], [1, 0, 0, 0, 1]),  # two that do not agree
        ([0, 9, 1, 9, 9.5], [1, 0, 1, 0, 1]),  # not directly: a good one stood between
    ],
)
def test_far_ahead_needs_two_in_a_row(days: list[float], good: list[int]) -> None:
    assert verdicts([1e9 + day * DAY for day in days]) == [bool(verdict) for verdict in good]


def test_the_far_ahead_reason_and_its_limit() -> None:
    out = Validate(max_ahead=10.0).push([clicked(time=0.0), clicked(time=10.0), clicked(time=20.5), labeled()])
    assert [type(item) for item in out] == [Feedback, Feedback, DeadLetter, DeadLetter]
    assert isinstance(out[2], DeadLetter) and out[2].reason.startswith("far ahead: 20.5 is 10 seconds after")
    assert verdicts([0.0, 1e11], max_ahead=inf) == [True, True]


def test_what_is_bad_in_itself_is_not_between_two_that_agree() -> None:
    between: list[Item] = [shown(id=""), DeadLetter({}, "malformed: x")]
    items = [shown(time=0.0), shown(time=9e9), *between, shown(time=9e9)]
    assert isinstance(Validate().push(items)[-1], Impression)


def test_validate_keeps_the_contract_of_stages() -> None:
    some_bad = [
        event for event, _ in BAD[1::5] if type(event) is not Odd and type(getattr(event, "time", 0)) is not Odd
    ]
    check_stage(Validate, [*GOOD, *some_bad, *GOOD[:3]])


jumps: Callable[[float], Feedback] = lambda time: clicked(time=time)  # noqa: E731


@given(st.lists(st.sampled_from([0.0, 1.0, 9.0, 20.0, 25.0, 40.0, nan, -1.0]).map(jumps), min_size=2, max_size=20))
def test_contract_over_jumping_times(stream: list[Feedback]) -> None:
    check_stage(lambda: Validate(max_ahead=10.0), stream)


@pytest.mark.parametrize("arguments", [{"max_id": 0}, {"max_ahead": 0.0}, {"max_ahead": nan}])
def test_what_cannot_work_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Validate(**arguments)
