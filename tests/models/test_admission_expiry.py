from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.batch import Batch
from streamrec.errors import ConfigError, StoreError
from streamrec.models import FM, FTRL, SGD, Adagrad, IdTable
from streamrec.models.fm import SKETCH, _id_of_new
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE, Changed
from streamrec.schema import Id, Ids, Number, Schema
from streamrec.testing import check_model
from streamrec.testing._state import first_difference

SCHEMA = Schema(Id("user", admit=3), Id("item", ttl=10.0), Ids("tags", admit=2, ttl="1m"), Number("price"))
DIM, LR = 4, 0.1


def shown(event: tuple[float, int, int, list[int]]) -> sr.Impression:
    time, user, item, tags = event
    features = {"tags": [f"t{tag}" for tag in tags], "price": 2.0}
    return sr.Impression(id="i", time=time, user=f"u{user}", item=f"p{item}", features=features)


class Reference:
    """The same model as a dictionary, one id at a time, in float64; it counts exactly and forgets at once."""

    def __init__(self, model: FM) -> None:
        self.model = model
        self.rows: dict[int, tuple[np.ndarray, float]] = {}
        self.seen: dict[int, int] = {}
        self.expires: dict[int, float] = {}
        self.bias, self.clock = 0.0, -math.inf

    def first(self, key: int) -> tuple[np.ndarray, float]:
        model = FM(SCHEMA, dim=DIM, seed=self.model.seed, init=self.model.init)
        model.begin(np.array([key]))
        return model.factors[0].detach().double().numpy(), 0.0

    def entries(self, batch: Batch, row: int) -> list[tuple[int, int, float, int]]:
        """Of each: its id, the id whose row counts, its value and field."""
        found = []
        for at in range(batch.starts[row], batch.ends[row]):
            key, field = int(batch.ids[at]), int(batch.fields[at])
            spec: Any = SCHEMA.fields[field] if field < len(SCHEMA) else None
            if self.expires.get(key, math.inf) < self.clock:
                self.rows.pop(key), self.expires.pop(key)
            counts = key
            if key not in self.rows and getattr(spec, "admit", 1) > 1:
                counts = _id_of_new(spec.name, SCHEMA.seed)
            found.append((key, counts, float(batch.values[at]), field))
        return found

    def step(self, batch: Batch, row: int, label: float | None) -> float:
        entries = self.entries(batch, row)
        held = [self.rows.get(counts) or self.first(counts) for _, counts, _, _ in entries]
        xs = [x for _, _, x, _ in entries]
        total = sum(v * x for (v, _), x in zip(held, xs, strict=True))
        squares = sum((v * x) ** 2 for (v, _), x in zip(held, xs, strict=True))
        logit = self.bias + sum(w * x for (_, w), x in zip(held, xs, strict=True)) + (total**2 - squares).sum() / 2
        p = 1 / (1 + math.exp(-logit))
        if label is None:
            return p
        g = p - label
        self.bias -= LR * g
        now = max(self.clock, float(batch.times[row]))
        for key, counts, x, field in entries:
            spec: Any = SCHEMA.fields[field] if field < len(SCHEMA) else None
            base = self.rows.get(counts) or self.first(counts)
            target = counts
            if counts != key:
                self.seen[key] = self.seen.get(key, 0) + 1
                if self.seen[key] >= spec.admit:
                    target = key
            v, w = base
            self.rows[target] = (v - LR * g * x * (total - v * x), w - LR * g * x)
            if target == key:
                ttl = getattr(spec, "ttl", None)
                self.expires[target] = math.inf if ttl is None else now + ttl
        self.clock = now
        return p


events = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 1.0, 4.0, 11.0, 70.0]),  # how much later than the event before
        st.integers(0, 3),
        st.integers(0, 4),
        st.lists(st.integers(0, 5), max_size=3, unique=True),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


def cut(stream: list[Any]) -> tuple[Batch, np.ndarray, np.ndarray]:
    time, rows, ops, labels = 1.7e9, [], [], []
    for later, user, item, tags, clicked, learns in stream:
        time += later
        rows.append(shown((time, user, item, tags)))
        ops.append(SCORE | LEARN if learns else SCORE)
        labels.append(float(clicked))
    return encode(SCHEMA, rows).batch, np.array(ops, dtype=np.int8), np.array(labels, dtype=np.float32)


def new_model() -> FM:
    return FM(SCHEMA, dim=DIM, optimizer=SGD(lr=LR), init=0.3)


@settings(max_examples=100)
@given(events, st.integers(1, 7))
def test_it_is_the_dictionary_however_calls_are_cut(stream: list[Any], size: int) -> None:
    batch, ops, labels = cut(stream)
    whole, parts, reference = new_model(), new_model(), Reference(new_model())
    rows = np.arange(len(batch))
    ones = np.ones(len(batch), dtype=np.float32)
    scores = whole.step(batch, rows, ops, labels, ones)
    pieces = [slice(at, at + size) for at in range(0, len(batch), size)]
    cuts = np.concatenate([parts.step(batch, rows[p], ops[p], labels[p], ones[p]) for p in pieces])
    expected = [reference.step(batch, row, labels[row] if ops[row] & LEARN else None) for row in rows]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    np.testing.assert_array_equal(scores, cuts)
    assert first_difference(whole.state_dict(), parts.state_dict()) is None
    # what is read in other ways is the same
    np.testing.assert_allclose(torch.sigmoid(whole.forward(batch)).detach(), whole.predict(batch), atol=1e-6)
    part = whole.parts(batch)
    logits = part[:, DIM] + whole.bias.item()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), whole.predict(batch), atol=1e-6)
    # and so is what is saved, published, copied or sent elsewhere
    twin, scorer = new_model(), new_model()
    twin.load_state_dict(whole.state_dict())
    assert first_difference(whole.state_dict(), twin.state_dict()) is None
    scorer.load_state_dict(whole.published())
    for other in (twin, scorer, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):  # noqa: S301
        np.testing.assert_array_equal(other.predict(batch), whole.predict(batch))
    if len(batch) > 1 and (ops & LEARN).any():
        for model in (whole, twin):
            model.step(batch, rows, np.full(len(batch), SCORE | LEARN, dtype=np.int8), labels, ones)
        assert first_difference(whole.state_dict(), twin.state_dict()) is None


@settings(max_examples=60)
@given(events, events, st.booleans())
def test_changes_since_the_mark_make_the_one_the_other(before: list[Any], after: list[Any], published: bool) -> None:
    model, reader = new_model(), new_model()
    learned = [(*event[:5], True) for event in before + after]
    batch, ops, labels = cut(learned)
    ones = np.ones(len(batch), dtype=np.float32)

    def learn(first: int, last: int) -> None:
        model.step(batch, np.arange(first, last), ops[first:last], labels[first:last], ones[first:last])

    def state() -> Any:
        return model.published() if published else model.state_dict()

    learn(0, len(before))
    base = state()
    reader.load_state_dict(base)
    model.mark(published)
    learn(len(before), len(batch))
    model.mark(not published)  # the other mark has nothing to do with it
    changes = model.changes(published)
    resolved = {k: c.applied_to(base[k]) if isinstance(c, Changed) else c for k, c in changes.items()}
    assert first_difference(state(), resolved) is None
    reader.load_changes(changes)
    np.testing.assert_array_equal(reader.predict(batch), model.predict(batch))
    assert len(reader.ids) <= len(model.ids)
    if not published:
        assert first_difference(model.state_dict(), reader.state_dict()) is None
        reader.step(batch, np.arange(len(batch)), ops, labels, ones)
        model.step(batch, np.arange(len(batch)), ops, labels, ones)
        assert first_difference(model.state_dict(), reader.state_dict()) is None


def test_an_admitted_id_goes_on_from_the_row_it_shared() -> None:
    schema = Schema(Id("user", admit=2, ttl="7d"))
    model = FM(schema, dim=4, optimizer=Adagrad(lr=0.1), linear_optimizer=FTRL(lr=0.1))

    def batch(user: str) -> Batch:
        return encode(schema, [sr.Impression(id="i", time=0.0, user=user, item="")]).batch

    one = np.ones(1, dtype=np.float32)
    strangers = [batch(f"u{n}") for n in range(50)]
    for each in strangers:
        model.learn(each, one)
    assert len(model.ids) == 1, "they share one row"
    assert len({float(model.predict(each)[0]) for each in strangers}) == 1
    before = model.predict(strangers[0])
    model.learn(strangers[0], one)
    assert len(model.ids) == 2 and model.predict(strangers[0]) > before
    assert model.predict(strangers[1]) > before, "of what is shared, only the bias has moved"
    assert model.predict(strangers[0]) > model.predict(strangers[1])


def test_an_id_that_returns_starts_clean() -> None:
    schema = Schema(Id("item", ttl=100.0))
    model = FM(schema, dim=2, optimizer=Adagrad(lr=0.5), init=0.1)

    def learn(item: str, time: float, label: float) -> None:
        batch = encode(schema, [sr.Impression(id="i", time=time, user="", item=item)]).batch
        model.learn(batch, np.array([label], dtype=np.float32))

    for n in range(20):
        learn("old", float(n), 1.0)
    learn("other", 119.0, 1.0)
    assert len(model.ids) == 2, "seen 100 s ago: not more"
    learn("other", 119.5, 1.0)
    learn("old", 120.0, 0.0)
    fresh = FM(schema, dim=2, optimizer=Adagrad(lr=0.5), init=0.1)
    item = encode(schema, [sr.Impression(id="i", time=0.0, user="", item="old")]).batch.ids
    fresh.begin(item)
    row = int(model.ids.find(item)[0])
    assert 0 < abs(model.linear[row].item()) <= 0.51, "one step of Adagrad, from nothing"
    assert torch.equal(model.factors[row], fresh.factors[0]), "alone in its event, an id's factors do not move"
    assert len(model.ids) == 2


def test_rows_stay_bounded_while_ids_never_end() -> None:
    schema = Schema(Id("user", admit=2, ttl=50.0), Id("item", ttl=20.0))
    model = FM(schema, dim=4, optimizer=SGD(lr=0.1))
    rng = np.random.default_rng(0)
    most = 0
    for start in range(0, 60_000, 1000):
        ids = np.arange(start, start + 1000)
        rows = [
            sr.Impression(id="i", time=n / 10, user=f"u{n // 3 + int(rng.integers(30))}", item=f"p{n}") for n in ids
        ]
        batch = encode(schema, rows).batch
        model.learn(batch, (ids % 3 == 0).astype(np.float32))
        most = max(most, len(model.ids))
    # 200 items live at a time, and what expired waits until the hand has come round: half a table of events
    assert most < 900 and model.ids.used < 900 and len(model.weights) <= 1024
    assert len(model.ids.free) == model.ids.used - len(model.ids)


def test_the_sketch_is_as_exact_as_it_says() -> None:
    schema = Schema(Id("item", admit=2))
    model = FM(schema, dim=0, optimizer=SGD(lr=0.1))
    rng = np.random.default_rng(1)
    once = np.unique(rng.integers(-(2**63), 2**63 - 1, SKETCH // 8 - 1001))
    starts = np.arange(len(once))
    columns = (np.ones(len(once), np.float32), np.zeros(len(once), np.int32), starts, starts + 1)
    model.learn(Batch(once, *columns), np.zeros(len(once), np.float32))
    early = len(model.ids) - 1
    assert early < 0.05 * len(once), "seen once, and admitted as if twice"
    twice = once[:1000]
    starts = starts[:1000]
    columns = (columns[0][:1000], columns[1][:1000], starts, starts + 1)
    model.learn(Batch(twice, *columns), np.zeros(1000, np.float32))
    assert (model.ids.find(twice) >= 0).all(), "no sighting is forgotten before the counters are halved"


def test_the_contract_holds() -> None:
    rng = np.random.default_rng(3)
    rows = [
        shown((n / 4, int(rng.integers(9)), int(rng.integers(9)), rng.choice(9, 2, replace=False).tolist()))
        for n in range(80)
    ]
    labels = (rng.random(80) < 0.5).astype(np.float32)
    check_model(lambda: FM(SCHEMA, dim=2, optimizer=FTRL(lr=0.1)), encode(SCHEMA, rows).batch, labels)


def test_a_batch_without_times_is_refused_where_ids_expire() -> None:
    model = new_model()
    batch = encode(SCHEMA, [shown((0.0, 1, 1, []))]).batch
    blind = Batch(batch.ids, batch.values, batch.fields, batch.starts, batch.ends)
    with pytest.raises(ConfigError, match="need their event times"):
        model.learn(blind, np.ones(1, dtype=np.float32))
    assert model.predict(blind).shape == (1,), "scoring needs none"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=120))
def test_released_rows_go_to_new_ids(steps: list[tuple[bool, int]]) -> None:
    """Against a dictionary and a list of free rows; ids crowd, so that searches run over gaps."""
    table, rows, free = IdTable(), dict[int, int](), list[int]()
    used = 0
    for inserts, number in steps:
        key = (number % 5) + (number // 5) * 2**40
        if inserts:
            if key not in rows:
                rows[key] = free.pop() if free else used
                used = max(used, rows[key] + 1)
            assert table.insert(np.array([key])).tolist() == [rows[key]]
        else:
            table.release(np.array([key]))
            if key in rows:
                free.append(rows.pop(key))
    assert len(table) == len(rows) and table.free.tolist() == free and table.used == used
    every = [n % 5 + (n // 5) * 2**40 for n in range(41)]
    assert table.find(np.array(every)).tolist() == [rows.get(key, -1) for key in every]
    twin = IdTable()
    twin.load_state_dict(table.state_dict())
    assert twin.find(np.array(every)).tolist() == table.find(np.array(every)).tolist()
    assert twin.free.tolist() == free


def test_ids_are_released_while_the_table_is_being_moved() -> None:
    rng = np.random.default_rng(5)
    keys = np.unique(rng.integers(-(2**63), 2**63 - 1, 30_000))
    rng.shuffle(keys)
    table = IdTable()
    while not len(table.old):
        table.insert(keys[len(table) : len(table) + 10])
    there = keys[: len(table)]
    gone, stay = there[:5000], there[5000:]
    table.release(gone)
    assert len(table.old) and (table.find(gone) == -1).all()
    before = table.find(stay)
    assert (before >= 0).all()
    table.insert(gone[:100])
    while len(table.old):
        table.keep_up(100)
    assert np.array_equal(table.find(stay), before) and (table.find(gone[100:]) == -1).all()
    assert (table.find(gone[:100]) >= 0).all() and len(table) == len(stay) + 100


@pytest.mark.parametrize("free", [[2], [-1], [0, 0]])
def test_free_rows_that_are_none_are_refused(free: list[int]) -> None:
    with pytest.raises(StoreError, match="frees a row that is none"):
        IdTable().load_state_dict({"ids": np.array([4, 5]), "free": np.array(free)})
