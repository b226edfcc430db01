from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrec.events import DeadLetter, Event, Feedback, Impression, Labeled, decode_event, encode_event

text = st.text(max_size=8)
time = st.floats(allow_nan=False, allow_infinity=False)
known = st.dictionaries(
    text, st.none() | st.booleans() | time | text | st.lists(text, max_size=3) | st.dictionaries(text, time, max_size=2)
)
impressions = st.builds(Impression, id=text, time=time, user=text, item=text, features=known, score=st.none() | time)
feedback = st.builds(Feedback, id=text, impression_id=text, time=time, kind=text, value=st.none() | time)
labeled = st.builds(Labeled, impressions, label=time, kind=text, weight=time)


@given(impressions | feedback | labeled)
def test_an_event_goes_through_json(event: Event) -> None:
    line = encode_event(event)
    assert b"\n" not in line
    assert decode_event(line) == event


def test_the_forms_on_the_wire() -> None:
    impression = Impression(
        id="i1", time=1700000000.0, user="u1", item="p9", features={"genres": ["a", "b"], "price": 19.9}
    )
    wire = {"type": "impression", "id": "i1", "time": 1700000000.0, "user": "u1", "item": "p9"}
    wire["features"] = {"genres": ["a", "b"], "price": 19.9}
    assert decode_event(json.dumps(wire).encode()) == impression
    assert json.loads(encode_event(impression)) == {**wire, "score": None}
    wire = {"type": "feedback", "id": "f1", "impression_id": "i1", "time": 12.5, "kind": "click", "value": None}
    assert decode_event(json.dumps(wire).encode()) == Feedback(id="f1", impression_id="i1", time=12.5)
    dead = DeadLetter(position={"line": 3}, reason="broken", raw=b"\xff")
    assert json.loads(encode_event(dead)) == {
        "type": "dead_letter",
        "position": {"line": 3},
        "reason": "broken",
        "raw": "/w==",
    }


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"type":"visit"}',
        b'{"type":"impression","id":"i1"}',
        b'{"type":"impression","id":1,"time":0,"user":"u","item":"p"}',
        b'{"type":"impression","id":"i","time":"now","user":"u","item":"p"}',
        b'{"type":"impression","id":"i","time":NaN,"user":"u","item":"p"}',
        b'{"type":"feedback","id":"\xff","impression_id":"i1","time":0}',
        b'{"type":"dead_letter","position":{},"reason":"x"}',
    ],
)
def test_what_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):  # a ValidationError is a DecodeError
        decode_event(line)


def test_events_are_frozen_and_share_nothing() -> None:
    one, other = (Impression(id="i", time=0.0, user="u", item="p") for _ in range(2))
    with pytest.raises(AttributeError):
        one.time = math.inf  # type: ignore[misc]
    assert one.features is not other.features
