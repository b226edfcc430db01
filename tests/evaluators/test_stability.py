"""PSI of the fields of a schema: against plain counts, by how often it errs, and what shifts it sees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.evaluators import psi
from streamrec.preprocessors import encode
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

SCHEMA = sr.Schema(sr.Id("item"), sr.Ids("genres"), sr.Number("price", log=True), sr.Text("title"), sr.Hour())


def shown(seed: int, count: int, **changed: Any) -> Any:
    """Impressions of one distribution, but for what is `changed`: a function of the number and the generator."""
    rng = np.random.default_rng(seed)
    usual: dict[str, Any] = {
        "item": lambda n: f"p{int(min(rng.pareto(1.0), 500))}",
        "genres": lambda n: [f"g{one}" for one in rng.integers(6, size=rng.integers(4))],
        "price": lambda n: None if rng.random() < 0.1 else float(np.exp(rng.normal(3, 1))),
        "title": lambda n: "word " * int(rng.integers(2, 9)),
    }
    made = {name: changed.get(name, usual[name]) for name in usual}
    rows = [{name: make(n) for name, make in made.items()} for n in range(count)]
    impressions = [sr.Impression(f"i{n}", 60.0 * n, "u", row.pop("item"), row) for n, row in enumerate(rows)]
    return encode(SCHEMA, impressions).batch


CHANGES = {
    "item": lambda n: f"new{n % 40}",
    "genres": lambda n: [f"g{n % 3}"],
    "price": lambda n: float(20 + n % 15),
    "title": lambda n: "word",
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_shift_is_found_in_the_field_that_has_it(field: str) -> None:
    watch = sr.PSI(SCHEMA, window=1_000)
    assert watch.update(shown(0, 3_000)) == []
    [found] = watch.update(shown(1, 1_000, **{field: CHANGES[field]}))
    assert (found.field, found.impressions, found.time) == (field, 4_000, 60.0 * 999) and found.psi > 0.25
    # and the next window is what later ones are compared to
    changed = {field: CHANGES[field]}
    assert watch.update(shown(2, 3_000, **changed)) == []
    assert [one.field for one in watch.update(shown(3, 1_000))] == [field]


@pytest.mark.parametrize(("field", "none"), [("price", None), ("genres", []), ("title", None)])
def test_missing_values_are_a_shift(field: str, none: Any) -> None:
    watch = sr.PSI(SCHEMA, window=1_000)
    watch.update(shown(0, 1_000))
    assert [one.field for one in watch.update(shown(1, 1_000, **{field: lambda n: none}))] == [field]


def test_numbers_are_counted_by_quantiles_and_by_the_quantiles_themselves() -> None:
    schema = sr.Schema(sr.Number("x"))
    sets = [[0.0] * 60 + [1.0] * 40, [0.0] * 40 + [1.0] * 50 + [7.0] * 10]
    batch = [encode(schema, [sr.Impression("i", 0.0, "u", "p", {"x": x}) for x in one]).batch for one in sets]
    watch = sr.PSI(schema, window=100)
    assert watch.update(batch[0]) == [] and math.isnan(watch.values["x"])
    watch.update(batch[1])
    # below 0, at 0, between, at 1, above 1, unknown
    assert watch.values["x"] == pytest.approx(psi([0, 60, 0, 40, 0, 0], [0, 40, 0, 50, 10, 0]))


def test_steady_streams_are_steady() -> None:
    # 4 bins / window is 0.02 to 0.04; a threshold of 0.25 is far away
    largest = 0.0
    for seed in range(20):
        watch = sr.PSI(SCHEMA, window=1_000)
        assert watch.update(shown(seed, 3_000)) == []
        largest = max(largest, *watch.values.values())
    assert 0 < largest < 0.1


def test_neither_cuts_nor_a_saved_state_change_a_bit() -> None:
    first, second = shown(0, 1_000), shown(1, 700, price=CHANGES["price"], title=CHANGES["title"])
    whole = sr.PSI(SCHEMA, window=300)
    expected = [*whole.update(first), *whole.update(second)]
    pieces, found = sr.PSI(SCHEMA, window=300), []
    for batch in (first, second):
        for begin in range(0, len(batch), 77):
            state = pieces.state_dict()
            check_state_is_plain(state)
            pieces = pieces.fresh()
            pieces.load_state_dict(copy_state(state))
            for row in range(begin, min(begin + 77, len(batch))):
                found += pieces.update(batch.take([row]))
    assert found == expected != []
    assert first_difference(whole.state_dict(), pieces.state_dict()) is None
    with pytest.raises(sr.ConfigError, match="the saved PSI watches item, genres, price, title, this one x"):
        sr.PSI(sr.Schema(sr.Number("x"))).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("options", "said"), [({"window": 1}, "window must be"), ({"threshold": 0.0}, "threshold"), ({"bins": 1}, "bins")]
)
def test_what_cannot_work_is_said(options: Any, said: str) -> None:
    with pytest.raises(sr.ConfigError, match=said):
        sr.PSI(SCHEMA, **options)


def test_psi() -> None:
    rng = np.random.default_rng(2)
    same = [np.bincount(rng.integers(10, size=2_000), minlength=10) for _ in range(2)]
    other = np.bincount(np.minimum(rng.integers(13, size=2_000), 9), minlength=10)
    assert psi(*same) < 0.05 < 0.1 < psi(same[0], other)
    assert psi(same[0], other) == pytest.approx(psi(other, same[0]))
    assert math.isnan(psi([0, 0], [1, 2]))
    with pytest.raises(sr.ConfigError, match="the same bins"):
        psi([1, 2], [1, 2, 3])
