"""`FM.one`: an event at a time is `step` and `predict`, bit for bit, however the row comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.events import Impression
from streamrec.models import FM, FTRL, Adagrad
from streamrec.preprocessors import Encoder
from streamrec.protocols import LEARN, SCORE
from streamrec.schema import Id, Ids, Number, Schema
from streamrec.testing._state import copy_state, first_difference

PLAIN = Schema(Id("user"), Id("item"), Ids("genres"), Number("price", standardize=True))
POLICED = Schema(Id("user", admit=2, ttl=40.0), Id("item", ttl=15.0), Ids("genres"), Number("price", standardize=True))


def shown(number: int) -> Impression:
    features: dict[str, Any] = {"genres": ["a", "bc", "d"][: number % 4], "price": float(number % 9)}
    if number % 10 == 3:
        features = {"price": None, "genres": None}
    return Impression(f"i{number}", float(number // 4), f"u{number * 379 % 700}", f"p{number % 33}", features)


def state(model: FM) -> Any:
    return copy_state(model.state_dict())


@pytest.mark.parametrize("schema", [PLAIN, POLICED])
@pytest.mark.parametrize("reused", [True, False])
def test_it_is_step_with_one_operation(schema: Schema, reused: bool) -> None:
    encoder = Encoder(schema)
    ours, theirs = (FM(schema, dim=4, optimizer=Adagrad(lr=0.05), linear_optimizer=FTRL(lr=0.2)) for _ in range(2))
    row = np.zeros(1, dtype=np.int64)
    for number in range(1500):
        batch = encoder([shown(number)]).batch
        label, weight = float(number % 3 == 0), (1.0, 0.5, 3.0)[number % 3]
        learns = number % 5 > 0
        op = np.array([SCORE | LEARN if learns else SCORE], dtype=np.int8)
        floats = np.array([label], dtype=np.float32), np.array([weight], dtype=np.float32)
        expected = theirs.step(batch, row, op, *floats)[0]
        mine = encoder.one(shown(number)).batch if reused else batch
        score = ours.one(mine, label, weight) if learns else ours.one(mine)
        assert type(score) is float and np.float32(score).tobytes() == expected.tobytes()
        assert score == ours.predict(batch)[0] or learns
    assert first_difference(state(theirs), state(ours)) is None
    assert ours.ids.used > (550 if schema is PLAIN else 40)  # so that the tables have grown on the way


def test_scoring_changes_nothing() -> None:
    encoder, model = Encoder(PLAIN), FM(PLAIN, dim=4)
    model.one(encoder.one(shown(1)).batch, 1.0)
    before = state(model)
    for number in range(50):
        model.one(encoder.one(shown(number)).batch)
    assert first_difference(before, state(model)) is None


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    encoder, model = Encoder(PLAIN), FM(PLAIN, dim=4)
    batch = encoder.one(shown(1)).batch
    model.one(batch, 1.0)
    before = model.weights.detach().clone()
    score = model.one(batch, float("nan"))
    assert 0 < score < 1 and model.left_out == 1
    assert model.weights.detach().numpy().tobytes() == before.numpy().tobytes()


def test_it_follows_the_model_when_that_moves() -> None:
    encoder, model = Encoder(PLAIN), FM(PLAIN, dim=4)
    for number in range(40):
        model.one(encoder.one(shown(number)).batch, float(number % 2))
    batch = encoder.one(shown(7)).batch
    known = model.one(batch)
    other = FM(PLAIN, dim=4)
    assert other.one(batch) != known
    other.load_state_dict(model.state_dict())
    assert other.one(batch) == known
    model.double()
    with pytest.raises(ConfigError, match=r"call model\.float\(\)"):
        model.one(batch)
    model.float()
    assert model.one(batch) == known


def test_columns_that_are_no_blocks_of_memory_are_taken_too() -> None:
    whole, model = Encoder(PLAIN)([shown(n) for n in range(6)]).batch, FM(PLAIN, dim=4)
    model.learn(whole, np.ones(6, dtype=np.float32))
    wide = np.zeros((len(whole.ids), 2), dtype=np.int64)
    wide[:, 0] = whole.ids
    apart = Batch(wide[:, 0], whole.values, whole.fields, whole.starts, whole.ends, times=whole.times)
    assert model.one(apart.take([3])) == model.predict(whole)[3]


def test_more_or_fewer_than_one_row_are_refused() -> None:
    whole, model = Encoder(POLICED)([shown(n) for n in range(3)]).batch, FM(POLICED, dim=4)
    for rows in ([], [0, 1]):
        with pytest.raises(ConfigError, match=rf"takes a batch of one row.* got {len(rows)} rows"):
            model.one(whole.take(rows))
    timeless = Batch(whole.ids, whole.values, whole.fields, whole.starts, whole.ends).take([0])
    with pytest.raises(ConfigError, match="got 1 rows and 0 times"):
        model.one(timeless)
