"""Expect: what is dropped or taken as unknown, and under which reason."""

from __future__ import annotations

import math
from typing import Any

import pytest

import streamrec as sr
from streamrec.errors import ConfigError
from streamrec.testing import check_stage

RULES: dict[str, Any] = {
    "ranges": {"price": (0, 100)},
    "allowed": {"country": {"de", "fr"}, "tags": ["a", "b"]},
    "required": ["title"],
}
GOOD = {"title": "t", "price": 5, "country": "de", "tags": ["a"]}
CASES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"price": 100}, None),
    ({"price": None, "country": None, "tags": []}, None),
    ({"title": None}, "title_missing"),
    ({"price": 100.1}, "price_out_of_range"),
    ({"price": math.nan}, "price_out_of_range"),
    ({"price": "5"}, "price_out_of_range"),
    ({"country": "xx"}, "country_not_allowed"),
    ({"country": {"a": []}}, "country_not_allowed"),
    ({"tags": ["a", "c"]}, "tags_not_allowed"),
    ({"tags": [["a"]]}, "tags_not_allowed"),
    ({"title": None, "price": -1}, "title_missing"),
]


def shown(change: dict[str, Any], number: int = 0) -> sr.Impression:
    return sr.Impression(f"i{number}", float(number), "u", "p", {**GOOD, **change})


@pytest.mark.parametrize(("change", "reason"), CASES)
def test_an_impression_is_kept_or_counted_under_one_reason(change: dict[str, Any], reason: str | None) -> None:
    for event in (shown(change), sr.Labeled(shown(change), 1.0)):
        expect = sr.Expect(**RULES)
        assert expect.push([event]) == ([] if reason else [event])
        assert {name for name, count in expect.counts.items() if count} == ({reason} if reason else set())


def test_a_value_may_be_taken_as_unknown() -> None:
    expect = sr.Expect(ranges=RULES["ranges"], allowed=RULES["allowed"], otherwise="unknown")
    wrong = {"price": -1, "country": "xx"}
    [one, labeled] = expect.push([shown(wrong), sr.Labeled(shown(wrong), 0.5, "buy", 2.0)])
    assert one == sr.Impression("i0", 0.0, "u", "p", {"title": "t", "tags": ["a"]})
    assert labeled == sr.Labeled(one, 0.5, "buy", 2.0)
    assert expect.counts == {"price_out_of_range": 2, "country_not_allowed": 2, "tags_not_allowed": 0}


def test_users_and_items_too_and_feedback_passes() -> None:
    expect = sr.Expect(allowed={"item": ["p"]}, required=["user"])
    click = sr.Feedback("f", "i", 0.0)
    other = sr.Impression("i2", 0.0, "u", "other")
    assert expect.push([shown({}), click, other]) == [shown({}), click]


def test_it_is_a_stage() -> None:
    events: list[Any] = [shown(change, n) for n, (change, _) in enumerate(CASES) if change.get("price") == 100]
    events += [shown({"price": float(10 * n)}, n) for n in range(20)] + [sr.Feedback("f", "i0", 1.0)]
    check_stage(lambda: sr.Expect(**RULES), events)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranges": {"price": (2, 1)}},
        {"ranges": {"price": (math.nan, 1)}},
        {"allowed": {"country": "de"}},
        {"required": "title"},
        {"otherwise": "keep"},
        {"otherwise": "unknown", "required": ["title"]},
        {"otherwise": "unknown", "allowed": {"user": ["u"]}},
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        sr.Expect(**wrong)
