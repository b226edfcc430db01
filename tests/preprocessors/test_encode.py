from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.preprocessors import Encoder, encode
from streamrec.schema import Id, Ids, Number, Schema, Text

SCHEMA = Schema(
    Id("user"), Ids("tags", limit=5), Number("price", log=True), Id("country"), Text("title"), Number("age", scale=10.0)
)
ENCODER = Encoder(SCHEMA)


def shown(user: Any = "u", **features: Any) -> Impression:
    return Impression(id="i", time=0.0, user=user, item="p", features=features)


def row(batch: Batch, number: int = 0) -> list[tuple[int, float, int]]:
    at = slice(batch.starts[number], batch.ends[number])
    return list(zip(batch.ids[at].tolist(), batch.values[at].tolist(), batch.fields[at].tolist(), strict=True))


def texts_of(batch: Batch, number: int = 0) -> list[str | None]:
    return [batch.texts[ref] if ref >= 0 else None for ref in batch.text_refs[number]]


def id_of(field: str, value: bytes, seed: int = 0) -> int:
    hashed = xxhash.xxh64_intdigest(value, xxhash.xxh64_intdigest(field.encode(), seed))
    return hashed - 2**64 if hashed >= 2**63 else hashed


def one(field: Any, value: Any) -> tuple[list[tuple[int, float]], list[str]]:
    """What one value of one field becomes, and the reasons of its problems."""
    encoded = encode(Schema(field), [shown(x=value)])
    assert all(problem.row == 0 and problem.field == "x" for problem in encoded.problems)
    return [(i, v) for i, v, _ in row(encoded.batch)], [problem.reason for problem in encoded.problems]


text = st.text(max_size=12) | st.text(st.characters(codec=None), max_size=4)  # lone surrogates too
text |= st.sampled_from(["", "\0", "a\0", "\0\0b", "\ud800", "é", "\udcc3\udca9", "\ud83d\ude00", "😀", "5", "True"])
number = st.none() | st.floats() | st.integers(-(10**400), 10**400) | st.booleans()
member = text | st.integers() | st.booleans() | st.none() | st.floats() | st.binary(max_size=2)
anything = member | number | st.lists(member, max_size=3) | st.dictionaries(text, number, max_size=3)
features = st.fixed_dictionaries(
    {},
    optional={
        "tags": st.lists(text, max_size=7)
        | st.lists(member, max_size=7)
        | st.dictionaries(text | st.integers(0, 9), number, max_size=7)
        | anything,
        "price": number | anything,
        "country": text | anything,
        "title": text | anything,
        "age": number | anything,
        "not asked for": anything,
    },
)
impressions = st.builds(lambda user, known: shown(user, **known), text, features)


@settings(max_examples=150, deadline=None)
@given(st.lists(impressions, max_size=6))
def test_a_row_is_the_same_alone_and_in_any_batch(stream: list[Impression]) -> None:
    whole = ENCODER(stream)
    assert len(whole.batch) == len(stream)
    for number, impression in enumerate(stream):
        alone = ENCODER([impression])
        assert row(alone.batch) == row(whole.batch, number)
        assert texts_of(alone.batch) == texts_of(whole.batch, number)
        assert [(p.field, p.reason) for p in alone.problems] == [
            (p.field, p.reason) for p in whole.problems if p.row == number
        ]
    batch = whole.batch
    assert (batch.ids.dtype, batch.values.dtype, batch.fields.dtype) == (np.int64, np.float32, np.int32)
    assert np.isfinite(batch.values).all()
    for start, end in zip(batch.starts, batch.ends, strict=True):
        assert len(set(batch.ids[start:end].tolist())) == end - start >= 4
    assert len(set(batch.texts)) == len(batch.texts)
    again = encode(SCHEMA, stream)
    assert again.batch.ids.tobytes() == batch.ids.tobytes() and again.batch.values.tobytes() == batch.values.tobytes()


@given(text, text)
def test_two_strings_have_two_ids(a: str, b: str) -> None:
    batch = encode(Schema(Id("x")), [shown(x=a), shown(x=b)]).batch
    assert (batch.ids[0] == batch.ids[1]) == (a == b)
    assert batch.ids[0] == id_of("x", a.encode("utf-8", "surrogatepass"))


def test_the_id_rule() -> None:
    batch = encode(Schema(Id("user"), Id("item"), seed=7), [shown("u1")]).batch
    assert row(batch) == [(id_of("user", b"u1", 7), 1.0, 0), (id_of("item", b"p", 7), 1.0, 1)]
    for value in (5, "5", np.int32(5), np.uint64(5)):
        assert one(Id("x"), value) == ([(id_of("x", b"5"), 1.0)], [])
        assert one(Ids("x"), [value]) == ([(id_of("x", b"5"), 1.0)], [])
    for value in (True, "True", np.bool_(True)):
        assert one(Id("x"), value) == ([(id_of("x", b"True"), 1.0)], [])
    assert one(Id("x"), 2**80) == ([(id_of("x", str(2**80).encode()), 1.0)], [])
    assert one(Id("x"), np.str_("a")) == one(Id("x"), "a")


def test_unknown_is_no_text() -> None:
    unknown, problems = one(Id("x"), None)
    assert problems == []
    assert row(encode(Schema(Id("x")), [shown()]).batch)[0][:2] == unknown[0]
    for value in ("", "None", "null", "unknown", "\xff", "\uffff", "\ufffd", "\0"):
        assert one(Id("x"), value)[0] != unknown
    for value in (1.5, b"a", ["a"], {"a": 1}, math.nan, object(), 10**5000):
        found, problems = one(Id("x"), value)
        assert found == unknown and len(problems) == 1 and problems[0].startswith("not an id: ")
        assert len(problems[0]) < 120


def test_numbers() -> None:
    known, unknown = id_of("x", b""), id_of("x", b"\xff")
    assert one(Number("x"), 2.5) == ([(known, 2.5)], [])
    assert one(Number("x"), True) == ([(known, 1.0)], [])
    assert one(Number("x"), np.float32(0.5)) == one(Number("x"), 0.5)
    assert one(Number("x"), np.int8(3)) == one(Number("x"), 3)
    assert one(Number("x", scale=4.0), -2) == ([(known, -0.5)], [])
    for x in (-5.0, 0.0, 7.0):
        expected = np.float32(math.copysign(math.log1p(abs(x)), x) / 2)
        assert one(Number("x", log=True, scale=2.0), x) == ([(known, expected)], [])
    assert one(Number("x"), 1e300) == ([(known, float(np.float32(1e30)))], [])
    assert one(Number("x"), 10**300)[0] == [(known, float(np.float32(1e30)))]
    assert one(Number("x"), None) == ([(unknown, 1.0)], [])
    for value in (math.nan, math.inf, -math.inf, 10**400, 10**5000, "2.5", [1.0], 1j, object()):
        found, problems = one(Number("x"), value)
        assert found == [(unknown, 1.0)] and len(problems) == 1 and "not a finite number" in problems[0]


def test_an_unknown_number_is_told_from_a_known_one_by_its_field() -> None:
    schema = Schema(Id("user"), Number("a"), Number("b", standardize=True))
    batch = encode(schema, [shown(a=1.0), shown(b=1.0)]).batch
    assert batch.fields.tolist() == [0, 1, 2 + 3, 0, 1 + 3, 2]
    assert (batch.fields % len(schema)).tolist() == [0, 1, 2, 0, 1, 2]


def test_lists_and_mappings() -> None:
    a, b, five = (id_of("x", value) for value in (b"a", b"b", b"5"))
    third = float(np.float32(2 / 3)), float(np.float32(1 / 3))
    assert one(Ids("x"), ["a", "b"]) == ([(a, 0.5), (b, 0.5)], [])
    assert one(Ids("x"), ("a", "b", "a")) == ([(a, third[0]), (b, third[1])], [])
    assert one(Ids("x"), [5, "5", "a"]) == ([(five, third[0]), (a, third[1])], [])
    assert one(Ids("x"), "a") == ([(a, 1.0)], [])
    assert one(Ids("x"), {"a": 2, "b": -0.5}) == ([(a, 2.0), (b, -0.5)], [])
    assert one(Ids("x"), {5: 1.0, "5": 0.5}) == ([(five, 1.5)], [])
    assert one(Ids("x"), {"a": np.float32(0.5), "b": np.int64(2)}) == ([(a, 0.5), (b, 2.0)], [])
    for nothing in (None, [], {}, set()):
        assert one(Ids("x"), nothing) == ([], [])
    assert one(Ids("x"), ["a", None, 1.5]) == ([(a, 1.0)], ["not an id: None; left out", "not an id: 1.5; left out"])
    for bad in (math.nan, math.inf, 10**400, 1e31, "1", None):
        found, problems = one(Ids("x"), {"a": bad, "b": 1.0})
        assert found == [(b, 1.0)] and len(problems) == 1 and "not a finite weight" in problems[0]
    for bad in (5, 1.5, object(), b"ab"):
        found, problems = one(Ids("x"), bad)
        assert found == [] and len(problems) == 1 and "not a list or mapping" in problems[0]


def test_limits_are_reported() -> None:
    many = [f"t{n}" for n in range(100_000)]
    found, problems = one(Ids("x", limit=10), many)
    assert len(found) == 10 and problems == ["100000 values, over the limit of 10; the first 10 were used"]
    assert found[0] == (id_of("x", b"t0"), pytest.approx(0.1))
    assert len(one(Ids("x", limit=100_000), many)[0]) == 100_000
    assert len(one(Ids("x", limit=3), dict.fromkeys(many, 1.0))[0]) == 3
    mega = "x" * 1_000_000
    assert one(Id("x"), mega) == ([(id_of("x", mega.encode()), 1.0)], [])


def test_a_set_is_encoded_alike_in_every_process() -> None:
    code = (
        "from streamrec import Ids, Impression, Schema; from streamrec.preprocessors import encode;"
        "shown = Impression(id='', time=0.0, user='', item='', features={'x': {f't{n}' for n in range(50)}});"
        "print(encode(Schema(Ids('x', limit=20)), [shown]).batch.ids.tolist())"
    )
    seen = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1


def test_texts() -> None:
    schema = Schema(Text("title"), Text("query"))
    batch, problems = encode(schema, [shown(title="a", query="b"), shown(query="a"), shown(title=5, query="")])
    assert [texts_of(batch, n) for n in range(3)] == [["a", "b"], [None, "a"], [None, ""]]
    assert len(batch.ids) == 0 and len(batch) == 3 and len(batch.texts) == 3
    assert batch.text_refs.dtype == np.int32
    assert problems == [(2, "title", "not a text: 5; taken as unknown")]


def test_nothing_in_nothing_out() -> None:
    encoded = ENCODER([])
    assert len(encoded.batch) == 0 and len(encoded.batch.ids) == 0 and not encoded.problems
    assert encoded.batch.text_refs.shape == (0, 1)


@pytest.mark.parametrize("several", [False, True])
def test_features_that_add_what_they_are_asked_for_are_not_added_to(several: bool) -> None:
    schema = Schema(Id("user"), Id("country"), Id("device"), Ids("tags"), Number("price"))
    encoder = Encoder(schema)
    plain = {"country": "de", "tags": ["a"]}
    features: Any = defaultdict(lambda: "made up", plain)
    found = encoder([Impression("i", 0.0, "u", "p", features)] * (2 if several else 1)).batch
    assert dict(features) == plain
    expected = encoder([Impression("i", 0.0, "u", "p", plain)]).batch
    assert row(found) == row(expected)


def test_the_input_stays_as_it_was() -> None:
    rng = random.Random(0)
    stream = [shown(str(n), tags=[str(rng.random())], price=n, title="t") for n in range(20)]
    before = repr(stream)
    ENCODER(stream)
    assert repr(stream) == before
