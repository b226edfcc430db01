"""Dense: modules of torch learn in batches of a step, resume in the middle, and equal a loop written by hand."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.testing import check_model
from streamrec.testing._state import copy_state, first_difference
from streamrec.trainers import Cosine, Dense, JoinedEvents

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price"))


class Net(nn.Module):
    """Hashed embeddings, two layers, dropout: what mini-batches are for."""

    def __init__(self, schema: sr.Schema = SCHEMA, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.schema = schema
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.EmbeddingBag(64, 4, mode="sum")
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, batch: sr.Batch) -> torch.Tensor:
        where = batch.entries
        ids = torch.from_numpy(batch.ids[where] % 64)
        lengths = batch.ends - batch.starts
        offsets = torch.from_numpy(np.cumsum(lengths) - lengths)
        values = torch.from_numpy(batch.values[where])
        return self.layers(self.embed(ids, offsets, per_sample_weights=values))[:, 0]


class Hybrid(nn.Module):
    """An FM whose logit gets a scale and an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.schema = SCHEMA
        self.fm = sr.FM(SCHEMA, dim=4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: sr.Batch) -> torch.Tensor:
        return self.fm(batch) * self.scale


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def shown(count: int = 400, seed: int = 0) -> list[sr.Labeled]:
    rng = random.Random(seed)
    examples = []
    for n in range(count):
        user, item = rng.randrange(20), rng.randrange(20)
        one = sr.Impression(f"i{n}", 1000.0 + n, f"u{user}", f"p{item}", {"price": rng.random()})
        label = float(rng.random() < (0.8 if (user + item) % 2 else 0.1))
        examples.append(sr.Labeled(one, label, weight=1.0 + n % 3))
    return examples


def rows_of(examples: list[sr.Labeled]) -> LabeledRows:
    labels = np.array([one.label for one in examples], dtype=np.float32)
    weights = np.array([one.weight for one in examples], dtype=np.float32)
    return LabeledRows(encode(SCHEMA, [one.impression for one in examples]).batch, labels, weights)


ROWS = rows_of(shown())


def difference(one: Any, other: Any) -> str | None:
    return first_difference(copy_state(one.state_dict()), copy_state(other.state_dict()))


def test_steps_are_those_of_a_loop_by_hand() -> None:
    model = Dense(Net(dropout=0.0), optimizer=adam, batch_size=64, clip=0.05)
    model.learn(*ROWS)
    assert model.steps == 6 and model.held == 400 - 6 * 64
    net = Net(dropout=0.0)
    optimizer, clipped = adam(net.parameters()), 0
    for at in range(0, 384, 64):
        some = ROWS.take(slice(at, at + 64))
        optimizer.zero_grad()
        labels, weights = torch.from_numpy(some.labels), torch.from_numpy(some.weights)
        loss = nn.functional.binary_cross_entropy_with_logits(net(some.batch), labels, weight=weights, reduction="sum")
        (loss / weights.sum()).backward()
        clipped += int(nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.05)
        optimizer.step()
    assert clipped
    for name, value in net.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    scores = torch.sigmoid(net(ROWS.batch)).detach().numpy()
    np.testing.assert_allclose(model.predict(ROWS.batch), scores, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "accumulate": 3}])
def test_neither_cuts_nor_a_break_change_a_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    def make() -> Dense:
        return Dense(Net(), optimizer=adam, batch_size=32, **settings)

    whole = make()
    whole.learn(*ROWS)
    rng = random.Random(1)
    parts, at = make(), 0
    store = sr.Store(tmp_path)
    while at < 400:
        end = min(400, at + rng.randrange(1, 90))
        parts.learn(*ROWS.take(slice(at, end)))
        at = end
        store.checkpoints.write(parts.state_dict())
        found = store.checkpoints.read()
        assert found is not None
        before, parts = parts, make()
        parts.load_state_dict(found[1])
        assert difference(parts, before) is None
    assert difference(parts, whole) is None
    for copied in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):  # noqa: S301  # our own
        copied.learn(*ROWS)
        assert difference(copied, whole) is not None
    again = copy.deepcopy(parts)
    again.learn(*ROWS)
    whole.learn(*ROWS)
    assert difference(again, whole) is None


def test_parts_of_a_step_change_only_rounding() -> None:
    models = [Dense(Net(dropout=0.0), optimizer=adam, batch_size=50, accumulate=n) for n in (1, 4)]
    for model in models:
        model.learn(*ROWS)
    for name, value in models[0].module.state_dict().items():
        torch.testing.assert_close(models[1].module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_is_used_and_learns() -> None:
    def fast(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.05)

    exact, rounded = (Dense(Net(), optimizer=fast, batch_size=50, bf16=bf16) for bf16 in (False, True))
    losses = []
    for model in (exact, rounded):
        for _ in range(15):
            model.learn(*ROWS)
        loss = sr.LogLoss()
        loss.update(ROWS.labels, model.predict(ROWS.batch))
        losses.append(loss.compute())
    assert losses[0] != losses[1] and max(losses) < 0.64
    assert rounded.module.state_dict()["layers.0.weight"].dtype == torch.float32


def test_a_hybrid_with_an_fm_is_a_model_by_contract() -> None:
    def make() -> Dense:
        return Dense(Hybrid(), optimizer=lambda p: torch.optim.Adagrad(p, lr=0.1), batch_size=4)

    check_model(make, ROWS.batch.take(slice(30)), ROWS.labels[:30])
    grown = make()
    for n in range(0, 1200, 100):  # the table grows under the optimizer
        examples = [sr.Impression(f"i{k}", 0.0, f"u{k}", "p1", {}) for k in range(n, n + 100)]
        grown.learn(encode(SCHEMA, examples).batch, np.ones(100, dtype=np.float32))
    assert grown.module.fm.ids.used >= 1200  # type: ignore[union-attr]
    assert grown.predict(ROWS.batch).min() > 0.5


class Lossy(Net):
    """A loss of its own: away from the label, squared."""

    def loss(self, rows: LabeledRows) -> torch.Tensor:
        return (torch.sigmoid(self(rows.batch)) - torch.from_numpy(rows.labels)) ** 2


class Explosive(Net):
    """Its second batch is not a number."""

    calls = 0

    def forward(self, batch: sr.Batch) -> torch.Tensor:
        self.calls += self.training
        return super().forward(batch) * (float("nan") if self.training and self.calls == 2 else 1.0)


def test_a_module_may_have_a_loss_of_its_own() -> None:
    models = [Dense(kind(dropout=0.0), optimizer=adam, batch_size=20) for kind in (Lossy, Net)]
    squares = []
    for model in models:
        for _ in range(10):
            model.learn(*ROWS)
        squares.append(float(np.mean((model.predict(ROWS.batch) - ROWS.labels) ** 2)))
    assert difference(*models) is not None and squares[0] < 0.25


def test_a_step_that_is_not_finite_is_left_out_and_counted() -> None:
    model = Dense(Explosive(), optimizer=adam, batch_size=100)
    model.learn(*ROWS)
    assert model.left_out == 100 and model.steps == 4 and np.isfinite(model.predict(ROWS.batch)).all()
    trainer = sr.BatchTrainer(model=Dense(Explosive(), optimizer=adam, batch_size=100))
    report = trainer.run(JoinedEvents(sr.Memory(shown()), schema=SCHEMA))
    assert report.counts["left_out"] == 100 and report.counts["learned"] == 300


class Gone:
    """Rows that fail when so many reads were done."""

    def __init__(self, rows: Any, reads: int) -> None:
        self.rows, self.left = rows, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rows, name)

    def read(self, limit: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return self.rows.read(limit)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_batch_training_that_broke_ends_as_one_that_did_not(tmp_path: Path, stop: int) -> None:
    def source() -> Any:
        return JoinedEvents(sr.Memory(shown(600)), schema=SCHEMA)

    def trainer(store: Path | None) -> sr.BatchTrainer:
        return sr.BatchTrainer(
            model=Dense(Net(), optimizer=adam, batch_size=48, accumulate=2, clip=1.0),
            epochs=3,
            window=100,
            shuffle=True,
            validation=0.2,
            patience=3,
            store=store,
            checkpoint_seconds=1e-9,
        )

    whole = trainer(None)
    report = whole.run(source())
    assert report.counts["learned"] == 480 * 3 and whole.model.steps % 10 == 0  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path).run(Gone(source(), stop))
    resumed = trainer(tmp_path)
    assert resumed.run(source()).metrics == report.metrics
    assert difference(resumed.model, whole.model) is None
    scorer = sr.Scorer(str(tmp_path), model=lambda: Dense(Net(), optimizer=adam))
    np.testing.assert_array_equal(
        scorer.score([one.impression for one in shown(20)]), whole.model.predict(ROWS.batch.take(slice(20)))
    )
    stream = sr.OnlineTrainer(model=Dense(Net(), optimizer=adam, batch_size=48, accumulate=2, clip=1.0), store=tmp_path)
    stream.run(sr.Memory(shown(100, seed=5)))  # batch first, then the stream
    whole.model.learn(*rows_of(shown(100, seed=5)))
    assert difference(stream.model, whole.model) is None


def test_a_schedule_sets_the_rate() -> None:
    rates: list[float] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    rows = JoinedEvents(sr.Memory(shown()), schema=SCHEMA)
    rows.fraction = lambda: len(rates) * 50 / 400  # type: ignore[method-assign]
    model = Dense(Net(), optimizer=lambda p: Noting(p, lr=0.1), batch_size=50)
    sr.BatchTrainer(model=model, window=50, schedule=Cosine()).run(rows)
    assert rates == pytest.approx([0.1 * Cosine()(n / 8) for n in range(8)]) and model.rate == 1.0
    assert model.optimizer.param_groups[0]["lr"] == 0.1


def test_what_dense_refuses() -> None:
    good: dict[str, Any] = {"optimizer": adam}
    for module, settings, message in (
        (nn.Linear(1, 1), {}, "must be an nn.Module with a schema"),
        (Net(), {"batch_size": 0}, "batch_size must be >= 1"),
        (Net(), {"accumulate": 0}, "accumulate must be >= 1"),
        (Net(), {"clip": 0.0}, "clip must be a norm > 0"),
        (Net(), {"seed": -1}, "seed must be >= 0"),
        (Net().requires_grad_(False), {}, "no parameter of the module wants a gradient"),
    ):
        with pytest.raises(sr.ConfigError, match=message):
            Dense(module, **good, **settings)
    model = Dense(Net(), optimizer=adam, batch_size=10)
    with pytest.raises(sr.ConfigError, match="400 rows need as many labels"):
        model.learn(ROWS.batch, ROWS.labels[:5])
    with pytest.raises(sr.ConfigError, match="the state was cut with"):
        model.load_state_dict(Dense(Net(), optimizer=adam, batch_size=11).state_dict())

    class Wide(Net):
        def forward(self, batch: sr.Batch) -> torch.Tensor:
            return super().forward(batch)[:, None]

    with pytest.raises(sr.ConfigError, match=r"a logit for each of 10 rows, but it gave \(10, 1\)"):
        Dense(Lossless(Wide()), optimizer=adam, batch_size=10).learn(*ROWS)


class Lossless(nn.Module):
    """Its `loss` is a module, not a method, and its losses are too wide."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.schema, self.net, self.loss = SCHEMA, net, nn.BCEWithLogitsLoss()

    def forward(self, batch: sr.Batch) -> Any:
        return self.net(batch)
