from __future__ import annotations

import json
from typing import Any

import pytest

from streamrec.errors import SchemaError
from streamrec.schema import Id, Ids, Number, Schema, Text

FULL = Schema(
    Id("user"), Ids("tags", limit=9), Number("price", log=True, scale=2.0, standardize=True), Text("title"), seed=5
)


def test_it_is_its_fields_in_order() -> None:
    assert FULL.names == ("user", "tags", "price", "title")
    assert len(FULL) == 4 and list(FULL) == list(FULL.fields)
    assert eval(repr(FULL)) == FULL  # noqa: S307
    assert hash(FULL) == hash(Schema(*FULL.fields, seed=5))
    assert Schema(*FULL.fields) != FULL and Schema(*FULL.fields[::-1], seed=5) != FULL and FULL != "schema"


def test_it_goes_through_json() -> None:
    assert Schema.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL
    for broken in ({}, {"fields": [{"field": "image", "name": "x"}], "seed": 0}, {"fields": 3, "seed": 0}):
        with pytest.raises(SchemaError, match="not a saved schema"):
            Schema.from_dict(broken)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Schema(), "at least one field"),
        (lambda: Schema(Id("a"), Ids("b"), Number("a"), Text("b")), "share a name: a, b"),
        (lambda: Schema("user"), "got 'user'"),
        (lambda: Schema(Id("")), r"needs a name, got Id\(name=''\)"),
        (lambda: Schema(Id(3)), r"needs a name, got Id\(name=3\)"),
        (lambda: Schema(Id("a"), seed=-1), "seed .*-1"),
        (lambda: Schema(Id("a"), seed=2**64), "seed .*18446744073709551616"),
        (lambda: Ids("a", limit=0), r"Ids\('a'\): limit .*0"),
        (lambda: Number("a", scale=0.0), r"Number\('a'\): scale .*0.0"),
        (lambda: Number("a", scale=float("nan")), "scale .*nan"),
    ],
)
def test_what_cannot_work_is_named(make: Any, named: str) -> None:
    with pytest.raises(SchemaError, match=named):
        make()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Schema(Id("user"), Id("page")), "'item' is only here; 'page' is only there"),
        (Schema(Id("user"), Ids("item")), r"'item' is Id\(name='item'\) here and Ids\(name='item'\) there"),
        (Schema(Id("user"), Id("item"), seed=3), "the seed is 0 here and 3 there"),
        (Schema(Id("item"), Id("user")), "the order is user, item here and item, user there"),
    ],
)
def test_differences_are_named(other: Schema, named: str) -> None:
    mine = Schema(Id("user"), Id("item"))
    mine.require(Schema(Id("user"), Id("item")), what="the checkpoint")
    with pytest.raises(SchemaError, match=f"that of the checkpoint: {named}. Use the same fields"):
        mine.require(other, what="the checkpoint")
