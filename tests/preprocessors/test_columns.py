"""What is compiled over columns gives what one event at a time gives, also past the sizes memory begins with."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrec import Feedback, Id, Ids, Impression, Labeled, Number, Schema, Text
from streamrec.batch import Batch
from streamrec.events import Decoded, Event, Item, decode_lines, encode_event
from streamrec.preprocessors import Dedup, Encoder, LabelJoin, Validate
from streamrec.testing._state import first_difference

SCHEMAS = [
    Schema(Id("country"), Id("item"), Number("price", log=True), Ids("tags", limit=3), Id("user"), Number("age")),
    Schema(Id("user")),
    Schema(Ids("tags"), Ids("more", limit=2)),
    Schema(Number("price", scale=2.0)),
    Schema(Id("country"), Text("title"), Ids("tags")),
    Schema(Number("user"), Ids("item"), Id("country")),
]
ENCODERS = [Encoder(schema) for schema in SCHEMAS]

texts = st.one_of(st.sampled_from(["a", "b", "", "a\0b", "\0", "é", "\udcff", "x" * 40]), st.text(max_size=5))
values = st.one_of(
    texts,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(st.one_of(texts, st.integers(0, 3)), max_size=5),
    st.dictionaries(texts, st.floats(), max_size=3),
    st.just([["a"]]),
    st.just([None]),
)
usual = {"country": texts, "price": st.floats(-10, 10), "age": st.integers(0, 99), "tags": st.lists(texts, max_size=4)}
features = st.one_of(
    st.fixed_dictionaries(usual),
    st.dictionaries(st.sampled_from(["country", "price", "age", "tags", "more", "title"]), values, max_size=6),
)
impressions = st.builds(Impression, id=st.just("i"), time=st.floats(0, 1e9), user=texts, item=texts, features=features)


def row(batch: Batch, number: int) -> tuple[Any, ...]:
    at = slice(batch.starts[number], batch.ends[number])
    refs = batch.text_refs[number].tolist() if batch.text_refs.size else []
    columns = batch.ids[at], batch.values[at], batch.fields[at], batch.times[number : number + 1]
    return (
        *((column.dtype.str, column.tobytes()) for column in columns),
        [None if ref < 0 else batch.texts[ref] for ref in refs],
    )


@given(st.lists(impressions, min_size=1, max_size=5), st.sampled_from(range(len(SCHEMAS))))
@settings(deadline=None, max_examples=400)
def test_a_row_alone_is_the_row_among_others_bit_for_bit(shown: list[Impression], schema: int) -> None:
    encoder = ENCODERS[schema]
    batch, problems = encoder(shown)
    for number, one in enumerate(shown):
        kept = encoder([one])
        for alone, its_problems in (encoder.one(one), kept):
            assert row(alone, 0) == row(batch, number)
            assert alone.entries.tolist() == list(range(alone.ends[0]))
            assert [tuple(p)[1:] for p in its_problems] == [tuple(p)[1:] for p in problems if p.row == number]
            for name in ("ids", "values", "fields", "starts", "ends", "times", "text_refs"):
                assert getattr(alone, name).dtype == getattr(batch, name).dtype
        encoder.one(Impression("other", 0.0, "other", "other"))
        assert row(kept.batch, 0) == row(batch, number)


def test_the_row_of_the_usual_types_does_take_the_short_way() -> None:
    shown = Impression("i", 1.0, "u", "p", {"country": "nl", "price": 2, "age": None, "tags": ["a", "b"]})
    first = ENCODERS[0].one(shown).batch
    assert ENCODERS[0].one(Impression("i", 1.0, "u", "p")).batch is first  # all unknown
    assert ENCODERS[0].one(Impression("i", 1.0, "u", "p", {"country": 5})).batch is not first


def test_a_copy_encodes_in_memory_of_its_own() -> None:
    encoder = Encoder(Schema(Id("user"), Ids("tags")))
    twin = copy.deepcopy(encoder)
    mine = encoder.one(Impression("i", 1.0, "u", "p", {"tags": ["a"]})).batch
    expected = row(mine, 0)
    assert row(twin.one(Impression("j", 2.0, "v", "p")).batch, 0) != expected
    assert row(mine, 0) == expected


def test_each_thread_encodes_in_memory_of_its_own() -> None:
    shown = [Impression("i", float(n), f"u{n}", "p", {"tags": [f"t{n % 7}"] * (n % 2)}) for n in range(300)]
    expected = [row(ENCODERS[0]([one]).batch, 0) for one in shown]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            assert list(threads.map(lambda one: row(ENCODERS[0].one(one).batch, 0), shown)) == expected


class Plain:
    """Dedup as a loop over a dictionary."""

    def __init__(self, ttl: float, capacity: int) -> None:
        self.ttl, self.capacity, self.newest, self.evicted = ttl, capacity, -np.inf, 0
        self.seen: OrderedDict[str, float] = OrderedDict()

    def fresh(self, id: str, time: float) -> bool:
        self.newest = max(self.newest, time)
        known = self.seen.get(id)
        if known is not None:
            if self.newest - known <= self.ttl:
                return False
            del self.seen[id]
        if self.newest - time > self.ttl:
            return True
        if len(self.seen) >= self.capacity:
            _, gone = self.seen.popitem(last=False)
            self.evicted += self.newest - gone <= self.ttl
        self.seen[id] = time
        return True


@pytest.mark.parametrize(("ttl", "capacity"), [(50.0, 10**6), (400.0, 3_000), (1e9, 10**6), (1e9, 2_500)])
def test_dedup_over_many_ids_is_a_loop_over_a_dictionary(ttl: float, capacity: int) -> None:
    rng = random.Random(0)
    stream = [
        Impression(f"i{rng.randrange(max(1, n - 4_000), n + 2)}", n / 10 + rng.uniform(-60, 60), "u", "p")
        for n in range(20_000)
    ]
    plain = Plain(ttl, capacity)
    expected = [event for event in stream if plain.fresh(event.id, event.time)]
    dedup, found, at = Dedup(ttl=ttl, capacity=capacity), [], 0
    while at < len(stream):
        some = rng.choice([1, 7, 300, 5_000])
        found += dedup.push(stream[at : at + some])
        at += some
        if rng.random() < 0.3:
            twin = Dedup(ttl=ttl, capacity=capacity)
            twin.load_state_dict(dedup.state_dict())
            dedup = twin
    assert found == expected and dedup.evicted == plain.evicted
    assert len(dedup._ring) <= max(1024, 4 * len(dedup) + 4 * 5_000)


@pytest.mark.parametrize(
    "config",
    [
        {"windows": {"click": 30.0}},
        {"windows": {"click": 30.0, "buy": 200.0}, "lateness": 40.0},
        {"windows": {"click": 300.0, "buy": 300.0, "like": 20.0}, "lateness": 400.0, "capacity": 900},
        {"windows": {"click": 1e6}, "lateness": 1e6},
    ],
)
def test_a_join_of_thousands_gives_the_same_one_by_one_in_columns_and_resumed(config: dict[str, Any]) -> None:
    rng = random.Random(0)
    stream: list[Event] = []
    for n in range(6_000):
        time = n / 5
        if rng.random() < 0.6:
            stream.append(Impression(f"i{n}", time + rng.uniform(-20, 20), "u", "p"))
        else:
            about = f"i{n + rng.randrange(-400, 100)}"
            kind = rng.choice(["click", "buy", "like"])
            stream.append(Feedback(f"f{n}", about, time + rng.uniform(-30, 30), kind))
        if rng.random() < 0.05:
            stream.append(rng.choice(stream))
    one_by_one, whole, resumed = (LabelJoin(**config) for _ in range(3))

    def told(record: Any, kinds: list[str]) -> tuple[Any, ...]:
        _, payload, time, kind, label, last, weight, what = record
        return payload, kinds[kind], label, time, last, weight, what == 2

    expected = [tuple(one) for n, event in enumerate(stream) for one in one_by_one.step(event, n)]
    closed = whole.steps(stream, whole.codes(stream), np.arange(len(stream)))
    kinds = [*whole.kinds, ""]
    found = [told(one, kinds) for one in closed.tolist()]
    assert repr(found) == repr(expected)
    assert np.all(np.diff(closed["event"]) >= 0)
    assert first_difference(whole.state_dict(), one_by_one.state_dict()) is None

    again: list[Any] = []
    at = 0
    while at < len(stream):
        some = stream[at : at + rng.choice([1, 50, 1_700])]
        columns = resumed.steps(some, resumed.codes(some), np.arange(at, at + len(some))).tolist()
        again += [told(one, kinds) for one in columns]
        at += len(some)
        twin = LabelJoin(**config)
        twin.load_state_dict(resumed.state_dict())
        resumed = twin
    assert repr(again) == repr(expected)
    assert first_difference(whole.state_dict(), resumed.state_dict()) is None
    assert repr(whole.drain()) == repr(resumed.drain())
    pushed = LabelJoin(**config)
    labeled = [(one.impression.id, one.kind, one.label) for one in pushed.push(stream)]
    assert labeled == [(stream[payload].id, kind, label) for payload, kind, label, *_ in expected if kind]


decodable = st.one_of(
    st.builds(
        Impression, id=st.text(max_size=3), time=st.floats(-1, 4e11), user=st.text(max_size=6), item=st.just("p")
    ),
    st.builds(
        Impression,
        id=st.just("i"),
        time=st.floats(0, 100),
        user=st.just("u"),
        item=st.just("p"),
        score=st.one_of(st.none(), st.floats(-1, 2)),
    ),
    st.builds(
        Feedback,
        id=st.text(max_size=6),
        impression_id=st.text(max_size=2),
        time=st.floats(0, 1e6),
        kind=st.text(max_size=6),
        value=st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    ),
    st.builds(Labeled, impressions.map(lambda one: Impression("i", one.time, "u", "p")), label=st.floats(0, 2)),
)


@given(st.lists(decodable, max_size=12), st.integers(0, 12))
@settings(deadline=None, max_examples=300)
def test_decoded_events_are_judged_like_all_others(stream: list[Event], cut: int) -> None:
    lines = [encode_event(event) for event in stream]
    events = decode_lines(lines)
    assert events == stream
    quick, slow = Validate(max_id=4, max_ahead=50.0), Validate(max_id=4, max_ahead=50.0)
    parts = events[:cut], events[cut:]
    found: list[Item] = [item for part in parts for item in quick.push(Decoded(part))]
    assert found == [item for part in parts for item in slow.push(list(part))]
    assert quick.state_dict() == slow.state_dict()


def test_lines_are_decoded_together_only_where_each_is_an_event() -> None:
    line = encode_event(Feedback("f", "i", 1.0))
    assert decode_lines([line] * 3) == [Feedback("f", "i", 1.0)] * 3
    for lines in ([line, b"", line], [b" "], [line, b"{"], [line + line], [line + line, b""], [line, b"null"]):
        assert decode_lines(lines) is None
    halves = line.split(b",", 1)
    assert decode_lines([halves[0] + b",", halves[1] + b" "]) is None
    assert decode_lines([halves[0] + b",", halves[1] + b" " + line]) is None
