"""Copies that learn apart and are merged are one model again, whatever was learned, expired or admitted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import Batch
from streamrec.models.merging import Copy, merge, swapped
from streamrec.preprocessors import encode

START = 1_700_000_000.0
PLAIN = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price", standardize=True))
LIVING = sr.Schema(sr.Id("user", ttl=400.0), sr.Id("item", admit=3, ttl=900.0), sr.Number("price", standardize=True))
OPTIMIZERS = {  # those that other tests have compiled
    "default": {},
    "SGD": {"optimizer": sr.SGD()},
    "Adagrad": {"optimizer": sr.Adagrad(l2=0.01)},
    "FTRL": {"optimizer": sr.FTRL(lr=0.1, l1=0.01, l2=0.1)},
    "Adam": {"optimizer": sr.Adam()},
}


def batch(rng: np.random.Generator, count: int, since: float = START, schema: sr.Schema = PLAIN) -> Any:
    shown = [
        sr.Impression(
            "i",
            since + n,
            f"u{rng.integers(30) + (since + n - START) // 50}",
            f"p{rng.integers(80)}",
            {"price": float(rng.integers(9))},
        )
        for n in range(count)
    ]
    return encode(schema, shown).batch, (rng.random(count) < 0.4).astype(np.float32)


def probes(schema: sr.Schema, time: float) -> Batch:
    shown = [
        sr.Impression("i", time, f"u{n % 35 + (time - START) // 50 - 10}", f"p{n % 90}", {"price": float(n % 9)})
        for n in range(400)
    ]
    return encode(schema, shown).batch


def rows_of(model: sr.FM) -> dict[int, tuple[float, ...]]:
    """What is known of each id that has not expired."""
    table = np.concatenate([model.weights.detach().numpy(), model.optimizer_rows.numpy()], axis=1)
    ids = model.ids.ids
    alive = np.ones(len(ids), dtype=bool)
    if model._expires:
        alive = model._expiry.array[: len(ids)] >= model._clock[0]
        table = np.append(table[: len(ids)], model._expiry.array[: len(ids), None], axis=1)
    return {int(ids[row]): tuple(table[row]) for row in np.flatnonzero(alive)}


CASES = [(PLAIN, name) for name in OPTIMIZERS] + [(LIVING, "default")]


@pytest.mark.parametrize(("schema", "name"), CASES, ids=[*OPTIMIZERS, "living"])
def test_copies_are_one_model_again(schema: sr.Schema, name: str) -> None:
    rng = np.random.default_rng(1)
    models = [sr.FM(schema, dim=4, **OPTIMIZERS[name]) for _ in range(3)]
    begin = batch(rng, 50, schema=schema)
    for model in models:
        model.learn(*begin)
    copies = [Copy(model) for model in models]
    time, freed = START + 50.0, 0
    for count in (40, 1, 300, 0, 120):  # so long that ids expire and begin anew, here and there
        for number, model in enumerate(models):
            model.learn(*batch(rng, count if number else count // 2, time, schema))
            time += count
        merge(copies)
        expected = rows_of(models[0])
        assert all(rows_of(model) == expected for model in models)
        scores = [model.predict(probes(schema, time)) for model in models]
        assert np.isfinite(scores[0]).all()
        for model, score in zip(models, scores, strict=True):
            np.testing.assert_array_equal(score, scores[0])
            for name in ("bias", "optimizer_bias", "statistics"):
                np.testing.assert_array_equal(getattr(model, name).detach(), getattr(models[0], name).detach())
            np.testing.assert_array_equal(model._sketch, models[0]._sketch)
        freed += sum(len(model.ids.free) for model in models)
    assert (freed > 0) == (schema is LIVING)


def test_a_copy_goes_on_alone_where_the_others_have_learned_nothing() -> None:
    rng = np.random.default_rng(2)
    models = [sr.FM(PLAIN, dim=4) for _ in range(2)]
    copies = [Copy(model) for model in models]
    alone = sr.FM(PLAIN, dim=4)
    for _ in range(3):
        some = batch(rng, 60)
        models[1].learn(*some)
        alone.learn(*some)
        merge(copies)
    for model in models:
        assert rows_of(model) == rows_of(alone)
        np.testing.assert_array_equal(model.predict(probes(PLAIN, START)), alone.predict(probes(PLAIN, START)))


def test_sums_and_statistics_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(3)
    models = [sr.FM(PLAIN, dim=4) for _ in range(3)]
    whole = sr.FM(PLAIN, dim=4)
    copies = [Copy(model) for model in models]
    for _ in range(4):
        for model in models:
            some = batch(rng, 70)
            model.learn(*some)
            whole.learn(*some)
        before = np.asarray(copies[0]._other["bias"][2])
        parts = [one.changes() for one in copies]
        merge(copies)
        joint = before + sum(part["bias"][2] - before for part in parts)  # FTRL's n
        assert models[0].optimizer_bias[1].item() == pytest.approx(float(joint), rel=1e-6)
        np.testing.assert_allclose(models[0].statistics.numpy(), whole.statistics.numpy(), rtol=1e-9, atol=1e-9)


def test_what_others_have_learned_is_published_as_changed() -> None:
    rng = np.random.default_rng(4)
    models = [sr.FM(PLAIN, dim=4) for _ in range(2)]
    copies = [Copy(model) for model in models]
    models[0].mark(published=True)
    models[1].learn(*batch(rng, 30))
    merge(copies)
    assert set(models[0].changes(published=True)["ids"].values.tolist()) == set(models[0].ids.ids.tolist())
    assert not len(copies[0].changes()["ids"])


@pytest.mark.parametrize("count", [2, 8])
def test_what_a_copy_gets_does_not_grow_with_their_number(count: int) -> None:
    rng = np.random.default_rng(5)
    models = [sr.FM(PLAIN, dim=4) for _ in range(count)]
    copies = [Copy(model) for model in models]
    for model in models:
        model.learn(*batch(rng, 400))
    parts = [one.changes() for one in copies]
    rows = len(np.unique(np.concatenate([part["ids"] for part in parts])))
    assert all(len(part["ids"]) > 0.9 * rows for part in parts)
    merges = [one.merge(parts, number) for number, one in enumerate(copies)]
    swaps, got = [next(one) for one in merges], [0] * count
    while swaps:
        for number, swap in enumerate(swaps):
            assert [len(one.give[number]) for one in swaps] == swap.want and swap.want[number] == 0
            got[number] += sum(swap.want)
        came, swaps = swapped(swaps), []
        for one, rows_for_it in zip(merges, came, strict=True):
            with suppress(StopIteration):
                swaps.append(one.send(rows_for_it))
    assert rows // 2 <= min(got) and max(got) <= 2 * rows
    assert all(rows_of(model) == rows_of(models[0]) for model in models)
