from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from streamrec.batch import Batch
from streamrec.errors import ConfigError, SchemaError
from streamrec.events import Impression
from streamrec.models import FM, FTRL, SGD, Adagrad, Adam
from streamrec.preprocessors import encode
from streamrec.schema import Id, Ids, Number, Schema
from streamrec.testing import check_model

FIELDS = Schema(Id("a"), Id("b"), Ids("c"), Number("d"))
STANDARD = Schema(Id("user"), Id("item"), Ids("genres"), Number("price", standardize=True))

# Each pair and number of factors is compiled once: few of them.
PAIRS = [
    (SGD(lr=0.1, l2=0.01), SGD(lr=0.05)),
    (Adagrad(lr=0.05), FTRL(lr=0.2)),
    (FTRL(lr=0.1, l1=0.001, l2=0.01), Adam(lr=0.01)),
    (Adam(lr=0.01), Adagrad(lr=0.1, l2=0.01)),
    (Adagrad(lr=0.05, l2=0.01, row_wise=True), Adagrad(lr=0.1, row_wise=True)),
]
by_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(type(o).__name__ for o in pair))


def rows_of(*rows: tuple[list[int], list[float]]) -> Batch:
    ends = np.cumsum([len(ids) for ids, _ in rows])
    return Batch(
        np.array([i for ids, _ in rows for i in ids], dtype=np.int64),
        np.array([x for _, values in rows for x in values], dtype=np.float32),
        np.zeros(ends[-1], dtype=np.int32),
        ends - [len(ids) for ids, _ in rows],
        ends,
    )


def random_rows(count: int, seed: int = 0, most: int = 30) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Rows of 1 to 7 distinct ids with values of both signs, labels, weights."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.choice(most, size=rng.integers(1, 8), replace=False)
        rows.append(((ids * 7919 - 50_000).tolist(), rng.normal(size=len(ids)).round(2).tolist()))
    labels = (rng.random(count) < 0.4).astype(np.float32)
    return rows_of(*rows), labels, rng.uniform(0.2, 2.0, count).astype(np.float32)


def stream(count: int, seed: int = 0) -> tuple[Batch, np.ndarray]:
    """Encoded impressions with standardised prices, some unknown."""
    rng = np.random.default_rng(seed)
    shown = [
        Impression(
            id=str(n),
            time=0.0,
            user=f"u{rng.integers(20)}",
            item=f"p{rng.integers(30)}",
            features={
                "genres": [f"g{g}" for g in rng.choice(9, rng.integers(0, 4), replace=False)],
                "price": None if n % 5 == 0 else float(rng.normal(20.0, 4.0)),
            },
        )
        for n in range(count)
    ]
    return encode(STANDARD, shown).batch, (rng.random(count) < 0.3).astype(np.float32)


def state_of(model: FM) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def brute_force(model: FM, batch: Batch) -> np.ndarray:
    """Rendle 2010, eq. 1, as it stands: a sum over all pairs, in float64."""
    logits = []
    rows = model.ids.find(batch.ids)
    for start, end in zip(batch.starts, batch.ends, strict=True):
        w = model.weights.detach().double().numpy()[rows[start:end]]
        assert (rows[start:end] >= 0).all()
        x = batch.values[start:end].astype(np.float64)
        logit = float(model.bias.detach()[0]) + w[:, -1] @ x
        for i in range(len(x)):
            for j in range(i + 1, len(x)):
                logit += w[i, :-1] @ w[j, :-1] * x[i] * x[j]
        logits.append(logit)
    return np.array(logits)


# -- against autograd --------------------------------------------------------------------------------------------------


class Twin:
    """An FM learned by autograd and `torch.optim`, with an optimizer of its own for each row, as only rows in the
    batch move and each counts its own steps."""

    def __init__(self, model: FM, ids: np.ndarray) -> None:
        self.rule, self.linear_rule = model.optimizer, model.linear_optimizer
        vectors = model.weights.detach()[model.ids.find(ids)].double()
        self.factors = {int(i): v[:-1].clone().requires_grad_() for i, v in zip(ids, vectors, strict=True)}
        self.linear = {int(i): v[-1:].clone().requires_grad_() for i, v in zip(ids, vectors, strict=True)}
        self.bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        self.optimizers = {id(p): self.optimizer(self.rule, p) for p in self.factors.values()}
        self.optimizers |= {id(p): self.optimizer(self.linear_rule, p) for p in [self.bias, *self.linear.values()]}

    @staticmethod
    def optimizer(rule: Any, parameter: torch.Tensor) -> torch.optim.Optimizer:
        if isinstance(rule, SGD):
            return torch.optim.SGD([parameter], lr=rule.lr, weight_decay=rule.l2)
        if isinstance(rule, Adagrad):
            return torch.optim.Adagrad([parameter], lr=rule.lr, weight_decay=rule.l2, eps=rule.eps)
        return torch.optim.Adam([parameter], lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps)

    def learn(self, ids: np.ndarray, values: np.ndarray, label: float, weight: float) -> float:
        x = torch.from_numpy(values.astype(np.float64))
        v = torch.stack([self.factors[int(i)] for i in ids])
        logit = self.bias + torch.cat([self.linear[int(i)] for i in ids]) @ x
        for i in range(len(ids)):
            for j in range(i):
                logit = logit + v[i] @ v[j] * x[i] * x[j]
        target = torch.tensor([label], dtype=torch.float64)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="sum") * weight
        used = [self.bias, *(part[int(i)] for i in ids for part in (self.factors, self.linear))]
        for parameter in used:
            parameter.grad = None
        loss.backward()
        for parameter in used:
            if parameter.numel() and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.numel():
                self.optimizers[id(parameter)].step()
        return float(torch.sigmoid(logit.detach()))


@pytest.mark.parametrize(
    ("dim", "rule", "linear"),
    [
        (4, SGD(lr=0.1, l2=0.01), SGD(lr=0.05)),
        (4, Adam(lr=0.01), Adam(lr=0.02, beta1=0.8, beta2=0.99)),
        (4, Adam(lr=0.01), Adagrad(lr=0.1, l2=0.01)),
        (16, Adagrad(lr=0.05, l2=0.01, eps=1e-6), Adagrad(lr=0.05, l2=0.1)),
        (0, SGD(lr=0.1), Adagrad(lr=0.1)),
    ],
    ids=repr,
)
def test_kernels_equal_autograd(dim: int, rule: Any, linear: Any) -> None:
    batch, labels, weights = random_rows(50)
    model = FM(FIELDS, dim=dim, optimizer=rule, linear_optimizer=linear, init=0.2, seed=3)
    ids = np.unique(batch.ids)
    model.begin(ids)
    twin = Twin(model, ids)
    for row in range(len(batch)):
        start, end = batch.starts[row], batch.ends[row]
        before = model.weights.detach().clone()
        score = model.predict(batch.take([row]))[0]
        model.learn(batch.take([row]), labels[row : row + 1], weights[row : row + 1])
        found = twin.learn(batch.ids[start:end], batch.values[start:end], labels[row], weights[row])
        assert abs(score - found) < 1e-5
        others = np.setdiff1d(np.arange(len(ids)), model.ids.find(batch.ids[start:end]))
        assert torch.equal(before[others], model.weights.detach()[others])
    for i in ids:
        learned = model.weights.detach()[int(model.ids.find(np.array([i]))[0])]
        np.testing.assert_allclose(learned[:dim], twin.factors[int(i)].detach(), atol=1e-5)
        np.testing.assert_allclose(learned[dim:], twin.linear[int(i)].detach(), atol=1e-5)
    np.testing.assert_allclose(model.bias.detach(), twin.bias.detach(), atol=1e-5)
    assert model.left_out == 0


class McMahan:
    """FTRL-proximal for one vector of weights, in float64: McMahan et al. 2013, algorithm 1."""

    def __init__(self, rule: FTRL, start: np.ndarray) -> None:
        self.rule, self.n, self.w = rule, np.zeros(len(start)), start.astype(np.float64)
        self.z = -self.w * (rule.beta / rule.lr + rule.l2) - rule.l1 * np.sign(self.w)

    def learn(self, g: np.ndarray) -> None:
        sigma = (np.sqrt(self.n + g**2) - np.sqrt(self.n)) / self.rule.lr
        self.z += g - sigma * self.w
        self.n += g**2
        eta = (self.rule.beta + np.sqrt(self.n)) / self.rule.lr + self.rule.l2
        self.w = np.where(abs(self.z) <= self.rule.l1, 0.0, -(self.z - np.sign(self.z) * self.rule.l1) / eta)


def test_ftrl_is_algorithm_1_of_mcmahan_2013() -> None:
    dim = 4
    rule, linear = FTRL(lr=0.15, beta=0.7, l1=0.002, l2=0.03), FTRL(lr=0.2, beta=1.0, l1=0.15, l2=0.1)
    batch, labels, weights = random_rows(200, seed=1)
    model = FM(FIELDS, dim=dim, optimizer=rule, linear_optimizer=linear, init=0.2)
    ids = np.unique(batch.ids)
    fresh = FM(FIELDS, dim=dim, optimizer=rule, linear_optimizer=linear, init=0.2)
    fresh.begin(ids)
    factors = {int(i): McMahan(rule, v.numpy()) for i, v in zip(ids, fresh.factors.detach(), strict=True)}
    flat = {int(i): McMahan(linear, np.zeros(1)) for i in ids}
    bias = McMahan(linear, np.zeros(1))
    for row in range(len(batch)):
        at = slice(batch.starts[row], batch.ends[row])
        keys, x = batch.ids[at].tolist(), batch.values[at].astype(np.float64)
        v, w = np.array([factors[i].w for i in keys]), np.array([flat[i].w[0] for i in keys])
        sums = x @ v
        logit = bias.w[0] + w @ x + ((sums**2).sum() - ((v * x[:, None]) ** 2).sum()) / 2
        g = (1 / (1 + np.exp(-logit)) - labels[row]) * weights[row]
        assert abs(model.predict(batch.take([row]))[0] - 1 / (1 + np.exp(-logit))) < 1e-5
        bias.learn(np.array([g]))
        for i, value, vector in zip(keys, x, v, strict=True):
            flat[i].learn(np.array([g * value]))
            factors[i].learn(g * value * (sums - vector * value))
        model.learn(batch.take([row]), labels[row : row + 1], weights[row : row + 1])
    found = model.ids.find(ids)
    learned = model.weights.detach().numpy()[found]
    np.testing.assert_allclose(learned[:, :dim], [factors[int(i)].w for i in ids], atol=1e-5)
    np.testing.assert_allclose(learned[:, dim], [flat[int(i)].w[0] for i in ids], atol=1e-5)
    exact_zeros = [flat[int(i)].w[0] == 0.0 for i in ids]
    assert any(exact_zeros) and not all(exact_zeros)
    assert (learned[:, dim] == 0.0).tolist() == exact_zeros


@pytest.mark.parametrize("dim", [0, 4])
def test_row_wise_adagrad_keeps_the_mean_square_of_a_rows_gradient(dim: int) -> None:
    rule = Adagrad(lr=0.1, l2=0.02, eps=1e-6, row_wise=True)
    batch, labels, weights = random_rows(200, seed=1)
    model = FM(FIELDS, dim=dim, optimizer=rule, linear_optimizer=PAIRS[-1][1], init=0.2)
    model.begin(batch.ids)
    assert model.optimizer_rows.shape[1] == 2
    v = model.factors.detach().double().numpy().copy()
    n = np.zeros(len(v))
    for row in range(len(batch)):
        at = slice(batch.starts[row], batch.ends[row])
        rows, x = model.ids.find(batch.ids[at]), batch.values[at].astype(np.float64)
        g = (float(model.predict(batch.take([row]))[0]) - labels[row]) * weights[row] * x[:, None]
        g = g * (x @ v[rows] - v[rows] * x[:, None]) * (len(rows) > 1) + rule.l2 * v[rows]
        n[rows] += (g**2).mean(axis=1) if dim else 0.0
        v[rows] -= rule.lr * g / (np.sqrt(n[rows])[:, None] + rule.eps)
        model.learn(batch.take([row]), labels[row : row + 1], weights[row : row + 1])
    np.testing.assert_allclose(model.factors.detach(), v, atol=1e-4)
    np.testing.assert_allclose(model.optimizer_rows[: len(n), 0], n, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("near", [0, 8192])
def test_looking_ahead_sees_what_the_event_before_brought(near: int) -> None:
    batch = rows_of(([5, 9], [1.0, 1.0]), ([9, 5, 7], [1.0, -1.0, 1.0]), ([7], [1.0]), ([5, 7], [2.0, 1.0]))
    whole, single = FM(FIELDS, dim=4, seed=1), FM(FIELDS, dim=4, seed=1)
    if near:  # from so many rows on, the loop looks ahead
        for model in (whole, single):
            model.begin(np.arange(100, 100 + near))
    order, labels = np.array([0, 1, 1, 2, 3, 0, 3]), np.array([1, 0, 1, 1, 0, 0, 1], dtype=np.float32)
    ops = np.array([3, 1, 3, 2, 3, 1, 3], dtype=np.int8)
    ones = np.ones(7, dtype=np.float32)
    scores = whole.step(batch, order, ops, labels, ones)
    for k in range(7):
        part = slice(k, k + 1)
        score = single.step(batch, order[part], ops[part], labels[part], ones[part])
        assert not ops[k] & 1 or score[0] == scores[k]
    assert state_of(whole) == state_of(single)


@pytest.mark.parametrize("dim", [0, 4])
def test_gradients_are_the_closed_forms(dim: int) -> None:
    """Rendle 2010, eq. 4: 1, x_i, and x_i Σ_j v_jf x_j - v_if x_i²; times p - y for the log loss."""
    batch = rows_of(([5, 9, -4], [1.0, -0.5, 2.0]))
    x = batch.values.astype(np.float64)
    model = FM(FIELDS, dim=dim, optimizer=SGD(lr=1.0), init=0.3)
    model.begin(batch.ids)
    v = model.factors.detach().double().numpy().copy()
    expected = np.concatenate([x[:, None] * (x @ v) - v * x[:, None] ** 2, x[:, None]], axis=1)

    model.forward(batch).sum().backward()
    assert model.weights.grad is not None and model.bias.grad is not None
    np.testing.assert_allclose(model.weights.grad[:3], expected, atol=1e-5)
    assert not model.weights.grad[3:].any() and model.bias.grad.item() == 1.0

    before, p = model.weights.detach().clone(), float(model.predict(batch)[0])
    model.learn(batch, np.ones(1, dtype=np.float32))
    step = (before - model.weights.detach())[:3].numpy()
    np.testing.assert_allclose(step, (p - 1.0) * expected, atol=1e-5)
    np.testing.assert_allclose(model.bias.detach(), [1.0 - p], atol=1e-6)


@pytest.mark.parametrize("dim", [0, 4, 16])
def test_forward_predict_and_the_sum_over_all_pairs_agree(dim: int) -> None:
    batch, labels, _ = random_rows(100, seed=2)
    model = FM(FIELDS, dim=dim, init=0.3)
    unseen = torch.sigmoid(model.forward(batch)).detach().numpy()
    np.testing.assert_allclose(unseen, model.predict(batch), atol=1e-6)
    model.learn(batch, labels)
    logits = model.forward(batch).detach().numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), model.predict(batch), atol=1e-6)
    np.testing.assert_allclose(logits, brute_force(model, batch), atol=1e-5)
    shuffled = np.random.default_rng(0).permutation(len(batch))
    assert np.array_equal(model.predict(batch.take(shuffled)), model.predict(batch)[shuffled])


# -- event by event ----------------------------------------------------------------------------------------------------


@by_pair
def test_a_batch_of_256_equals_256_of_one(pair: tuple[Any, Any]) -> None:
    batch, labels = stream(256)
    whole, single = (FM(STANDARD, dim=4, optimizer=pair[0], linear_optimizer=pair[1]) for _ in range(2))
    rows, ops = np.arange(256), np.full(256, 3, dtype=np.int8)
    ones = np.ones(256, dtype=np.float32)
    scores = whole.step(batch, rows, ops, labels, ones)
    one_by_one = []
    for row in rows:
        one_by_one.append(single.predict(batch.take([row]))[0])
        single.learn(batch.take([row]), labels[row : row + 1])
    assert scores.tobytes() == np.array(one_by_one, dtype=np.float32).tobytes()
    assert state_of(whole) == state_of(single)


@by_pair
def test_contract(pair: tuple[Any, Any]) -> None:
    batch, labels = stream(60)
    check_model(lambda: FM(STANDARD, dim=4, optimizer=pair[0], linear_optimizer=pair[1]), batch, labels)


def test_contract_of_logistic_regression_and_of_the_defaults() -> None:
    batch, labels = stream(60)
    check_model(lambda: FM(STANDARD, dim=0, optimizer=SGD(lr=0.1), linear_optimizer=Adagrad(lr=0.1)), batch, labels)
    check_model(lambda: FM(STANDARD), batch, labels)


def test_numbers_are_standardised_by_what_came_before_and_unknown_ones_never() -> None:
    schema = Schema(Number("price", standardize=True), Number("raw"))
    rng = np.random.default_rng(0)
    prices = [None if n % 3 == 0 else float(p) for n, p in enumerate(rng.normal(20.0, 4.0, 60))]
    batch = encode(
        schema,
        [Impression(id="", time=0.0, user="", item="", features={"price": p, "raw": 7.0}) for p in prices],
    ).batch
    model = FM(schema, dim=0, optimizer=SGD(lr=0.1), linear_optimizer=Adagrad(lr=0.1))
    known: list[float] = []
    for row, price in enumerate(prices):
        shown = batch.take([row])
        w, b = dict(zip(model.ids.ids.tolist(), model.linear.tolist(), strict=True)), model.bias.item()
        x = 1.0  # "unknown" is an id of its own
        if price is not None:
            spread = np.std(known) if len(known) > 1 else 0.0
            x = (price - np.mean(known)) / spread if spread else 0.0
        at = shown.entries
        logit = b + w.get(int(batch.ids[at[0]]), 0.0) * x + w.get(int(batch.ids[at[1]]), 0.0) * 7.0
        assert abs(model.predict(shown)[0] - 1 / (1 + np.exp(-logit))) < 1e-5
        assert abs(model.forward(shown).item() - logit) < 1e-5
        model.learn(shown, np.array([row % 2], dtype=np.float32))
        if price is not None:
            known.append(price)
    count, mean, squares = model.statistics[0].tolist()
    assert count == len(known)
    np.testing.assert_allclose([mean, np.sqrt(squares / count)], [np.mean(known), np.std(known)])
    assert not model.statistics[1].any()
    assert torch.equal(model.published()["statistics"], model.statistics)
    assert model.published()["statistics"].data_ptr() != model.statistics.data_ptr()


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_growth_keeps_everything_and_no_two_ids_share_a_row() -> None:
    rng = np.random.default_rng(0)
    ids = np.unique(np.concatenate([rng.integers(-(2**63), 2**63 - 1, 50_000), [0, -1, -(2**63), 2**63 - 1]]))
    rng.shuffle(ids)
    count = len(ids)
    batch = Batch(ids, np.ones(count, np.float32), np.zeros(count, np.int32), np.arange(count), np.arange(count) + 1)
    labels = (rng.random(count) < 0.5).astype(np.float32)
    grown, whole = FM(FIELDS, dim=4), FM(FIELDS, dim=4)
    for start in range(0, count, 97):
        grown.learn(batch.take(slice(start, start + 97)), labels[start : start + 97])
    whole.learn(batch, labels)
    assert state_of(grown) == state_of(whole)
    assert sorted(grown.ids.find(ids).tolist()) == list(range(count))
    assert grown.weights.shape[0] == grown.ids.capacity == grown.optimizer_rows.shape[0]


def test_begin_gives_rows_as_learning_would() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(-(2**62), 2**62, 5000)
    for pair in PAIRS[1:3]:
        begun, lazy = (FM(FIELDS, dim=4, optimizer=pair[0], linear_optimizer=pair[1]) for _ in range(2))
        for model in (begun, lazy):
            model.learn(rows_of(([1], [1.0])), np.ones(1, dtype=np.float32))
        begun.begin(ids)
        begun.begin(ids[:10])
        assert len(begun.ids) == 5001
        batch = rows_of(*[([int(i), 1], [1.0, 1.0]) for i in ids[:300]])
        assert np.array_equal(begun.predict(batch), lazy.predict(batch))
        for model in (begun, lazy):
            model.learn(batch, np.ones(300, dtype=np.float32))
        assert np.array_equal(begun.predict(batch), lazy.predict(batch))


# -- saving ------------------------------------------------------------------------------------------------------------


@by_pair
def test_published_without_the_optimizers_memory_and_learned_on(pair: tuple[Any, Any]) -> None:
    batch, labels = stream(200)
    model, scorer = (FM(STANDARD, dim=4, optimizer=pair[0], linear_optimizer=pair[1]) for _ in range(2))
    model.learn(batch, labels)
    published = model.published()
    assert not [name for name in published if "optimizer" in name]
    scorer.load_state_dict(dict(published))
    assert np.array_equal(model.predict(batch), scorer.predict(batch))
    # Vowpal Wabbit's issue 1234: FTRL went on from z = 0, which is weight 0, at the first touch
    before = scorer.weights.detach().clone()
    scorer.learn(batch.take([0]), labels[:1], np.full(1, 1e-6, dtype=np.float32))
    reach = max(pair[0].lr, pair[1].lr) if any(isinstance(o, (Adam, Adagrad)) for o in pair) else 1e-3
    assert (scorer.weights.detach() - before).abs().max() <= reach * 1.01
    if all(isinstance(o, (SGD, FTRL)) for o in pair):
        np.testing.assert_allclose(scorer.predict(batch), model.predict(batch), atol=1e-3)


def test_ftrl_goes_on_from_published_weights() -> None:
    batch, labels = stream(200)
    rule = FTRL(lr=0.1, l1=0.001, l2=0.01)
    model, scorer = (FM(STANDARD, dim=4, optimizer=rule, linear_optimizer=rule) for _ in range(2))
    for _ in range(5):
        model.learn(batch, labels)
    scorer.load_state_dict(dict(model.published()))
    scorer.learn(batch, labels, np.full(len(batch), 1e-7, dtype=np.float32))
    np.testing.assert_allclose(scorer.weights.detach(), model.weights.detach(), atol=1e-5)
    np.testing.assert_allclose(scorer.bias.detach(), model.bias.detach(), atol=1e-5)


def test_what_does_not_fit_is_refused_and_nothing_changed() -> None:
    batch, labels = stream(20)
    model = FM(STANDARD, dim=4, optimizer=PAIRS[0][0], linear_optimizer=PAIRS[0][1])
    model.learn(batch, labels)
    before = state_of(model)
    other = FM(STANDARD, dim=16, optimizer=Adagrad(), linear_optimizer=SGD())
    with pytest.raises(SchemaError, match=r"\(0, 17\).*dim=4 needs 5 columns"):
        model.load_state_dict(other.state_dict())
    adagrad = FM(STANDARD, dim=4)
    with pytest.raises(ConfigError, match=r"\(0, 6\).*SGD\(.*SGD\(.*needs 0 columns"):
        model.load_state_dict(adagrad.state_dict())
    fewer = FM(Schema(Id("user")), dim=4, optimizer=PAIRS[0][0], linear_optimizer=PAIRS[0][1])
    told = "has 1 fields with 3 statistics each, but this schema has 4 with 3: user, item, genres, price; use the"
    with pytest.raises(SchemaError, match=told):
        model.load_state_dict(fewer.state_dict())
    with pytest.raises(RuntimeError, match="statistics"):
        model.load_state_dict({name: value for name, value in model.state_dict().items() if name != "statistics"})
    assert state_of(model) == before


@pytest.mark.parametrize(
    "optimizer", [None, SGD(lr=0.3, l2=0.1), Adagrad(eps=1e-4), Adagrad(row_wise=True), FTRL(l1=1.0), Adam(beta1=0.5)]
)
def test_config_round_trip(optimizer: Any) -> None:
    model = FM(STANDARD, dim=4, optimizer=optimizer, linear_optimizer=Adagrad(l2=0.01), init=0.1, seed=2**63 - 1)
    twin = FM.from_config(model.config())
    assert twin.config() == model.config() and twin.schema == model.schema
    assert (twin.optimizer, twin.linear_optimizer) == (model.optimizer, model.linear_optimizer)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dim": -1}, "dim .*-1"),
        ({"dim": 5000}, "dim .*5000"),
        ({"init": 2.0}, "init .*2.0"),
        ({"init": float("nan")}, "init .*nan"),
        ({"seed": -3}, "seed .*-3"),
        ({"seed": 2**63}, f"seed .*{2**63}"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        FM(FIELDS, **arguments)


def test_calls_that_do_not_fit_are_refused() -> None:
    batch, labels = stream(4)
    model = FM(STANDARD, dim=4)
    with pytest.raises(ConfigError, match="4 rows need as many labels and weights, got 3 and 4"):
        model.learn(batch, labels[:3])
    rows, ops = np.arange(4), np.ones(4, dtype=np.int8)
    with pytest.raises(ConfigError, match="equally long, got rows from 0 to 3, and 4, 3, 4 and 4 of them"):
        model.step(batch, rows, ops[:3], labels, labels)
    for bad in (rows + 1, rows - 1):
        with pytest.raises(ConfigError, match="rows must be from 0 to 3"):
            model.step(batch, bad, ops, labels, labels)
    assert len(model.ids) == 0


# -- absurd numbers ----------------------------------------------------------------------------------------------------

WILD = [
    (SGD(lr=1e6, l2=1.0), SGD(lr=1e6, l2=1.0)),
    (Adagrad(lr=1e6), FTRL(lr=1e6, beta=0.0, l2=1e-30)),
    (FTRL(lr=1e-12, beta=1e6), Adam(lr=1e6)),
    (Adam(lr=1e6, eps=1e-30), Adagrad(lr=1e6, l2=1e6, eps=1e-30)),
    (Adagrad(lr=1e6, l2=1e6, eps=1e-30, row_wise=True), Adagrad(lr=1e6, eps=1e-30, row_wise=True)),
]


@pytest.mark.parametrize("pair", WILD, ids=repr)
def test_no_nan_is_ever_stored(pair: tuple[Any, Any]) -> None:
    rng = np.random.default_rng(0)
    model = FM(STANDARD, dim=4, optimizer=pair[0], linear_optimizer=pair[1], init=1.0)
    sizes = [0.0, 1e-38, 1e-25, 1e-10, 1.0, 1e4, 1e9, 1e18, 1e30, 3e38, np.inf, -np.inf, np.nan]
    odd = 0
    for _ in range(400):
        n = int(rng.integers(1, 6))
        ids = rng.choice(8, n, replace=False).astype(np.int64)
        values = rng.choice(sizes, n).astype(np.float32) * rng.choice([-1, 1], n).astype(np.float32)
        fields = rng.integers(0, 4, n).astype(np.int32)
        batch = Batch(ids, values, fields, np.array([0]), np.array([n]))
        label = rng.choice([0.0, 1.0, 1.0, 1e30, np.nan], 1).astype(np.float32)
        weight = rng.choice([*sizes, 1.0, 1.0, 1.0], 1).astype(np.float32)
        before, left_out = state_of(model), model.left_out
        p = model.predict(batch)
        assert 0.0 < p[0] < 1.0
        model.learn(batch, label, weight)
        if model.left_out > left_out:
            after = state_of(model)
            assert {k: v for k, v in before.items() if k != "left_out"} == {
                k: v for k, v in after.items() if k != "left_out"
            }
        bad = not (np.isfinite(values).all() and np.isfinite(label).all() and np.isfinite(weight).all())
        odd += bad
        assert not bad or model.left_out > left_out
        for tensor in (model.weights, model.bias, model.optimizer_rows, model.optimizer_bias, model.statistics):
            assert torch.isfinite(tensor).all()
    assert odd <= model.left_out < 400


def test_huge_values_of_logistic_regression_stay_finite() -> None:
    model = FM(FIELDS, dim=0, optimizer=SGD(lr=0.1), linear_optimizer=Adagrad(lr=0.1))
    batch = rows_of(([1], [1e30]), ([2], [float("inf")]), ([3], [float("nan")]), ([4], [1.0]))
    for _ in range(10):
        model.learn(batch, np.ones(4, dtype=np.float32), np.full(4, 1e30, dtype=np.float32))
    assert torch.isfinite(model.weights).all() and torch.isfinite(model.optimizer_rows).all()
    assert model.left_out >= 20 and sorted(model.ids.ids.tolist()) == [1, 4]
    twin = FM.from_config(model.config())
    twin.load_state_dict(model.state_dict())
    assert twin.left_out == model.left_out


# -- as a torch module -------------------------------------------------------------------------------------------------


class Hybrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fm = FM(FIELDS, dim=4)
        self.dense = nn.Linear(3, 1)

    def forward(self, batch: Batch, dense: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fm(batch) + self.dense(dense)[:, 0]
        return logits


def test_in_a_hybrid_it_learns_by_autograd_and_is_saved_with_it() -> None:
    batch, labels, _ = random_rows(40)
    hybrid, twin = Hybrid(), Hybrid()
    assert {name for name, _ in hybrid.named_parameters()} == {"fm.weights", "fm.bias", "dense.weight", "dense.bias"}
    hybrid.fm.begin(batch.ids)
    dense = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(hybrid.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(hybrid(batch, dense), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    kernel = hybrid.fm.predict(batch)  # over the same memory
    np.testing.assert_allclose(kernel, torch.sigmoid(hybrid.fm(batch)).detach(), atol=1e-6)
    twin.load_state_dict(hybrid.state_dict())
    assert torch.equal(twin(batch, dense), hybrid(batch, dense))
    assert np.array_equal(twin.fm.predict(batch), kernel)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_has_memory_of_its_own(clone: Any) -> None:
    batch, labels, _ = random_rows(40)
    model = FM(FIELDS, dim=4)
    model.learn(batch, labels)
    before = model.predict(batch)
    twin = clone(model)
    assert np.array_equal(twin.predict(batch), before)
    twin.learn(batch, labels)
    assert np.array_equal(model.predict(batch), before)
    logits = twin(batch).detach().numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), twin.predict(batch), atol=1e-6)
    model.learn(batch, labels)
    assert state_of(twin) == state_of(model)


def test_other_devices_and_types_are_told_apart() -> None:
    batch, labels, _ = random_rows(10)
    model = FM(FIELDS, dim=4)
    model.learn(batch, labels)
    before = model.predict(batch)
    model.double()
    with pytest.raises(ConfigError, match=r"float64; call model.float\(\), or use forward\(\)"):
        model.predict(batch)
    assert model(batch).dtype == torch.float64
    model.float()
    assert model.statistics.dtype == torch.float64
    assert np.array_equal(model.predict(batch), before)
    model.to("meta")
    with pytest.raises(ConfigError, match="the parameters are on meta"):
        model.learn(batch, labels)


def test_threads_predict_at_the_same_time() -> None:
    batch, labels = stream(500)
    model = FM(STANDARD, dim=4)
    model.learn(batch, labels)
    expected = model.predict(batch)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(model.predict, [batch] * 40):
            assert np.array_equal(found, expected)
