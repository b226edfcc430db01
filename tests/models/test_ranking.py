"""Ranking with an FM: the parts of a row make the row, and the top of a catalogue is the top of a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.models import ranking
from streamrec.preprocessors import encode

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("genres"), sr.Number("price", standardize=True))


def shown(count: int) -> list[sr.Impression]:
    return [
        sr.Impression(f"i{n}", float(n), f"u{n % 5}", f"p{n % 9}", {"genres": ["a", f"g{n % 4}"], "price": n % 7})
        for n in range(count)
    ]


def learned(dim: int) -> sr.FM:
    model = sr.FM(SCHEMA, dim=dim)
    batch = encode(SCHEMA, shown(200)).batch
    model.learn(batch, np.array([n % 3 == 0 for n in range(200)], dtype=np.float32))
    return model


@pytest.mark.parametrize("dim", [0, 1, 5, 16])
def test_whole_rows_have_the_logits_of_forward(dim: int) -> None:
    model = learned(dim)
    unseen = sr.Impression("", 0.0, "nobody", "nothing", {"genres": ["new"], "price": 3.0})
    batch = encode(SCHEMA, [*shown(40), unseen]).batch
    found = model.parts(batch)
    assert found.shape == (41, dim + 1) and found.dtype == np.float32
    nothing = np.zeros(dim + 1, dtype=np.float32)
    logits = ranking.logits(model, nothing, found, np.arange(41))
    np.testing.assert_allclose(logits, model(batch).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ranking.probabilities(logits), model.predict(batch), atol=1e-6)


def test_reading_writes_nothing_and_no_place_is_made_up() -> None:
    model = learned(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.parts(encode(SCHEMA, shown(3)).batch)
    assert model.parts(encode(SCHEMA, []).batch).shape == (0, 5)
    for place in (-1, 3):
        with pytest.raises(IndexError, match=f"from 0 to 2, got 0 to {place}|got -1 to"):
            ranking.logits(model, found[0], found, np.array([0, place]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_finite_is_the_bias() -> None:
    model = learned(4)
    items = np.zeros((3, 5), dtype=np.float32)
    items[0], items[1, 4] = np.nan, np.inf
    logits = ranking.logits(model, np.ones(5, dtype=np.float32), items, np.arange(3))
    assert logits[0] == logits[1] == np.float32(model.bias.item()) and logits[2] == logits[0] + 1


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_top_is_the_top_of_a_stable_sort(data: st.DataObject) -> None:
    # few distinct values, so that there are ties
    values = data.draw(st.lists(st.integers(-3, 3), max_size=400))
    items = np.zeros((len(values), 3), dtype=np.float32)
    items[:, 2] = values
    k = data.draw(st.integers(0, len(values) + 2))
    skipped = np.array(sorted(data.draw(st.sets(st.integers(0, max(len(values) - 1, 0)), max_size=5))), dtype=np.int64)
    skipped = skipped[skipped < len(values)]
    left = np.delete(np.arange(len(values)), skipped)
    expected = left[np.argsort(-items[left, 2], kind="stable")[:k]]
    places, logits = ranking.top(sr.FM(SCHEMA, dim=4), np.zeros(3, dtype=np.float32), items, k, skipped)
    assert places.tolist() == expected.tolist()
    assert logits.tolist() == items[expected, 2].tolist()


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_top_of_many_is_exact(order: str) -> None:
    rng = np.random.default_rng(0)
    model, items = learned(16), rng.normal(size=(20_000, 17)).astype(np.float32)
    shared = rng.normal(size=17).astype(np.float32)
    logits = ranking.logits(model, shared, items, np.arange(len(items)))
    if order != "random":
        items = items[np.argsort(logits if order == "rising" else -logits)]
        logits = ranking.logits(model, shared, items, np.arange(len(items)))
    places, found = ranking.top(model, shared, items, 100, np.empty(0, dtype=np.int64))
    assert places.tolist() == np.argsort(-logits, kind="stable")[:100].tolist()
    products = items[places, :16] @ shared[:16] + items[places, 16]
    np.testing.assert_allclose(found, products + shared[16] + model.bias.item(), atol=1e-4)


def stable(logits: np.ndarray, k: int | None) -> list[int]:
    return np.argsort(-logits, kind="stable")[:k].tolist()


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([-3.0, -0.0, 0.0, 1e-40, 2.0, 3e38]), max_size=300), st.integers(0, 310) | st.none())
def test_best_and_in_order_are_the_top_of_a_stable_sort(values: list[float], k: int | None) -> None:
    model = sr.FM(SCHEMA, dim=4)
    items = np.zeros((max(len(values), 1), 3), dtype=np.float32)
    items[: len(values), 2] = values
    places = np.arange(len(values))[::-1].copy()
    expected = stable(items[places, 2], k)
    where, logits = ranking.best(model, np.zeros(3, dtype=np.float32), items, places, k)
    assert where.dtype == np.int64 and where.tolist() == expected
    assert logits.tolist() == items[places[expected], 2].tolist()
    assert ranking.in_order(items[places, 2], k)[0].tolist() == expected


def test_best_of_no_such_place_is_an_error() -> None:
    model, items = sr.FM(SCHEMA, dim=4), np.zeros((40, 3), dtype=np.float32)
    for wrong in (-1, 40):
        for k in (1, None):
            with pytest.raises(IndexError, match="places must be from 0 to 39, got"):
                ranking.best(model, items[0], items, np.array([*range(39), wrong]), k)


def hard(name: str, rows: int, width: int) -> np.ndarray:
    """Whole numbers, so that float32 adds them exactly in any order, and many are equal; and what is worse."""
    rng = np.random.default_rng(len(name))
    items = rng.integers(-9, 10, size=(rows, width)).astype(np.float32)
    if name == "outliers":
        items[rng.integers(rows, size=20), rng.integers(width, size=20)] = 2.0**14
    elif name == "not finite":
        items[::97, 0], items[5::331, width - 1], items[7::500] = np.nan, np.inf, -np.inf
    elif name == "huge":
        items[::401] *= np.float32(2.0**120)
    elif name == "tiny":
        items *= np.float32(2.0**-140)  # subnormal
    elif name == "constant":
        items[:] = 3.0
    elif name == "hidden":  # one tile of large numbers, whose codes tell nothing about the small ones among them
        items[300:500] *= 2.0**10
        items[301] = 12.0
    return items


@pytest.mark.parametrize("dim", [0, 1, 5, 16])
@pytest.mark.parametrize(
    "name", ["plain", "outliers", "not finite", "huge", "tiny", "constant", "hidden", "rising", "falling"]
)
def test_top_by_codes_is_exact(name: str, dim: int) -> None:
    rows, model = 1_900, sr.FM(SCHEMA, dim=dim)  # not a multiple of a tile
    items = hard(name, rows, dim + 1)
    rng = np.random.default_rng(dim)
    none = np.empty(0, dtype=np.int64)
    for shared in (
        rng.integers(-9, 10, size=dim + 1).astype(np.float32),
        np.zeros(dim + 1, dtype=np.float32),
        np.full(dim + 1, 2.0**100, dtype=np.float32),
        np.full(dim + 1, np.nan, dtype=np.float32),
    ):
        logits = ranking.logits(model, shared, items, np.arange(rows))
        if name in ("rising", "falling"):
            items = items[np.argsort(logits if name == "rising" else -logits, kind="stable")]
            logits = ranking.logits(model, shared, items, np.arange(rows))
        codes = ranking.coded(items)
        for k in (1, 7, rows // 17):
            places, found = ranking.top(model, shared, items, k, none, codes)
            assert places.tolist() == stable(logits, k)
            assert found.tobytes() == logits[places].tobytes()
            skipped = np.sort(places)[: k // 2 + 1]
            left = np.delete(np.arange(rows), skipped)
            places, _ = ranking.top(model, shared, items, k, skipped, codes)
            assert places.tolist() == left[stable(logits[left], k)].tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 16, 40]), st.floats(0.3, 30), st.integers(1, 60))
def test_nothing_is_hidden_by_the_codes(seed: int, dim: int, tails: float, k: int) -> None:
    rng = np.random.default_rng(seed)
    items = (rng.standard_t(tails, size=(1_500, dim + 1)) * np.exp(rng.normal(size=dim + 1))).astype(np.float32)
    shared = rng.standard_t(tails, size=dim + 1).astype(np.float32)
    model = sr.FM(SCHEMA, dim=dim)
    logits = ranking.logits(model, shared, items, np.arange(len(items)))
    _, found = ranking.top(model, shared, items, k, np.empty(0, dtype=np.int64), ranking.coded(items))
    sizes = np.abs(items[:, :dim].astype(np.float64)) @ np.abs(shared[:dim].astype(np.float64)) + np.abs(items[:, dim])
    # as the best of all, but for the order in which float32 numbers are added
    np.testing.assert_allclose(found, np.sort(logits)[::-1][:k], rtol=1e-5, atol=1e-5 * float(sizes.max()))


def test_codes_are_near_and_of_these_items() -> None:
    items = np.random.default_rng(0).normal(size=(1_000, 6)).astype(np.float32)
    codes = ranking.coded(items)
    assert codes.codes.dtype == np.int8 and codes.codes.shape == (4, 6, 256) and codes.steps.shape == (4, 6)
    near = (codes.codes * codes.steps[:, :, None]).transpose(0, 2, 1).reshape(-1, 6)
    assert (np.abs(near[:1_000] - items) <= 0.501 * np.repeat(codes.steps, 256, axis=0)[:1_000]).all()
    assert (near[1_000:] == 0).all()
    with pytest.raises(sr.ConfigError, match=r"500 items have other codes than \(4, 6, 256\): pass coded\(items\)"):
        ranking.top(sr.FM(SCHEMA, dim=5), items[0], items[:500], 1, np.empty(0, dtype=np.int64), codes)
    assert ranking.coded(items[:0]).codes.shape == (0, 6, 256)


def test_parameters_elsewhere_are_an_error_with_the_cure() -> None:
    with pytest.raises(sr.ConfigError, match=r"the parameters are on meta; call model.cpu\(\)"):
        sr.FM(SCHEMA, dim=4).to("meta").parts(encode(SCHEMA, shown(1)).batch)
