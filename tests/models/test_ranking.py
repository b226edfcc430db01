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
    found = ranking.parts(model, batch)
    assert found.shape == (41, dim + 1) and found.dtype == np.float32
    nothing = np.zeros(dim + 1, dtype=np.float32)
    logits = ranking.logits(model, nothing, found, np.arange(41))
    np.testing.assert_allclose(logits, model(batch).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ranking.probabilities(logits), model.predict(batch), atol=1e-6)


def test_reading_writes_nothing_and_no_place_is_made_up() -> None:
    model = learned(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ranking.parts(model, encode(SCHEMA, shown(3)).batch)
    assert ranking.parts(model, encode(SCHEMA, []).batch).shape == (0, 5)
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
    places, logits = ranking.top(sr.FM(SCHEMA, dim=2), np.zeros(3, dtype=np.float32), items, k, skipped)
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


def test_parameters_elsewhere_are_an_error_with_the_cure() -> None:
    with pytest.raises(sr.ConfigError, match=r"the parameters are on meta: call model.cpu\(\)"):
        ranking.parts(sr.FM(SCHEMA, dim=4).to("meta"), encode(SCHEMA, shown(1)).batch)
