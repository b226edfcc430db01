"""Pseudonyms and what is taken out: what gets past the door, and that keys never do."""

from __future__ import annotations

import hmac
from hashlib import blake2b
from typing import Any

import pytest

import streamrec as sr
from streamrec.errors import ConfigError
from streamrec.preprocessors.privacy import network, prefix, steps
from streamrec.testing import check_stage
from streamrec.testing._state import copy_state

ONE, TWO = b"the first secret key", b"the second secret key"


def shown(user: str = "u1", time: float = 0.0, **features: Any) -> sr.Impression:
    return sr.Impression("i1", time, user, "p9", features)


def test_a_pseudonym_is_a_keyed_hash() -> None:
    stage = sr.Pseudonymize(ONE, fields=["user", "email"])
    [one, labeled, click] = stage.push(
        [shown(email="a@b"), sr.Labeled(shown(), 0.5, "buy", 2.0), sr.Feedback("f", "i1", 1.0)]
    )
    assert isinstance(one, sr.Impression) and isinstance(labeled, sr.Labeled)
    expected = blake2b(b"u1", digest_size=16, key=ONE, person=b"user").hexdigest()
    assert hmac.compare_digest(one.user, expected) and labeled.impression.user == expected
    assert one.features["email"] == stage.pseudonym("a@b", time=0.0, field="email") != stage.pseudonym("a@b", time=0.0)
    assert labeled == sr.Labeled(shown(expected), 0.5, "buy", 2.0) and click == sr.Feedback("f", "i1", 1.0)


def test_lists_and_weights() -> None:
    stage = sr.Pseudonymize(ONE, fields=["friends"])
    [one] = stage.push([shown(friends=["u2", "u3"])])
    [other] = stage.push([shown(friends={"u2": 0.5, "u3": 0.25})])
    assert isinstance(one, sr.Impression) and isinstance(other, sr.Impression)
    assert one.user == "u1" and [*other.features["friends"]] == one.features["friends"]
    assert one.features["friends"][0] == stage.pseudonym("u2", time=0.0, field="friends")


def test_keys_are_rotated_by_event_time() -> None:
    stage = sr.Pseudonymize({0.0: ONE, 1000.0: TWO})
    users = [stage.pseudonym("u1", time=time) for time in (-5.0, 0.0, 999.9, 1000.0, 5000.0)]
    assert users[0] == users[1] == users[2] == sr.Pseudonymize(ONE).pseudonym("u1", time=0.0)
    assert users[3] == users[4] == sr.Pseudonymize(TWO).pseudonym("u1", time=0.0) != users[0]
    assert stage.pseudonyms("u1") == [users[0], users[3]]


def test_a_run_goes_on_with_its_keys_and_a_new_one_but_not_with_others() -> None:
    state = sr.Pseudonymize(ONE).state_dict()
    sr.Pseudonymize({0.0: ONE, 1000.0: TWO}).load_state_dict(state)
    for other in (sr.Pseudonymize(TWO), sr.Pseudonymize(ONE, fields=["email"])):
        with pytest.raises(ConfigError, match="other keys or fields"):
            other.load_state_dict(state)


def test_keys_are_in_no_state_and_no_repr() -> None:
    stage = sr.Pseudonymize(ONE)
    stage.push([shown()])
    assert ONE.decode() not in repr(stage) + repr(copy_state(stage.state_dict()))


def test_what_is_dropped_and_what_is_coarse() -> None:
    redact = sr.Redact(
        drop=["email"], coarsen={"zip": prefix(3), "age": steps(10), "ip": network(24), "lat": steps(0.5)}
    )
    [one] = redact.push([shown(email="a@b", zip="10115", age=39, ip="192.0.2.77", lat=52.7, other=None)])
    assert isinstance(one, sr.Impression)
    assert one.features == {"zip": "101", "age": 30, "ip": "192.0.2.0/24", "lat": 52.5, "other": None}
    [six] = redact.push([shown(ip="2001:db8:1:2::3")])
    assert isinstance(six, sr.Impression) and six.features == {"ip": "2001:db8:1::/48"}


def test_what_cannot_be_made_coarse_goes() -> None:
    redact = sr.Redact(coarsen={"age": steps(10), "ip": network(24)})
    assert redact.push([shown(age="old", ip="nowhere", x=1)]) == [shown(x=1)] and redact.counts == {"redact_error": 2}


def test_only_what_is_wanted_stays() -> None:
    assert sr.Redact(only=["x"]).push([shown(x=1, y=2), sr.Labeled(shown(y=2), 1.0)]) == [
        shown(x=1),
        sr.Labeled(shown(), 1.0),
    ]


def test_they_are_stages() -> None:
    events: list[Any] = [shown(f"u{n % 3}", 10.0 * n, age=n if n % 4 else "old") for n in range(20)]
    events += [sr.Feedback("f", "i1", 300.0), sr.Labeled(shown(age=3), 1.0)]
    check_stage(lambda: sr.Pseudonymize({0.0: ONE, 100.0: TWO}, fields=["user", "age"], capacity=2), events)
    check_stage(lambda: sr.Redact(coarsen={"age": steps(10)}), events)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sr.Pseudonymize(b"short"),
        lambda: sr.Pseudonymize({}),
        lambda: sr.Pseudonymize({0.0: b"short"}),
        lambda: sr.Pseudonymize(ONE, fields=[]),
        lambda: sr.Pseudonymize(ONE, fields="user"),
        lambda: sr.Pseudonymize(ONE, fields=["item"]),
        lambda: sr.Pseudonymize(ONE, capacity=0),
        lambda: sr.Redact(drop="email"),
        lambda: sr.Redact(drop=["user"]),
        lambda: sr.Redact(coarsen={"age": 10}),  # type: ignore[dict-item]
        lambda: steps(0),
        lambda: network(40),
        lambda: prefix(-1),
    ],
)
def test_settings_that_cannot_work(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
