"""The tuner: each learner is judged by what it said when it was asked, and the better ones take over."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.models import Choice, Real, Whole
from streamrec.models.space import with_settings
from streamrec.models.variants import variant
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN
from streamrec.storage import Store
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference
from streamrec.trainers import Gate, Tuner

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))
RATES = {"optimizer.lr": Real(1e-4, 10.0, log=True), "linear_optimizer.lr": Real(1e-4, 10.0, log=True)}


def slow(schema: sr.Schema = SCHEMA) -> sr.FM:
    """The default, a hundred times too slow."""
    return sr.FM(schema, dim=4, optimizer=sr.Adagrad(lr=0.0005, eps=0.1), linear_optimizer=sr.FTRL(lr=0.002))


def labeled(count: int) -> list[sr.Labeled]:
    rng = np.random.default_rng(0)
    users, items, draws = rng.integers(20, size=count), rng.integers(12, size=count), rng.random(count)
    chance = 1 / (1 + np.exp(-(items % 5 - 2.0)))
    return [
        sr.Labeled(sr.Impression(f"i{n}", 10.0 * n, f"u{users[n]}", f"p{items[n]}"), float(draws[n] < chance[n]))
        for n in range(count)
    ]


def test_it_leaves_a_rate_that_is_far_too_small() -> None:
    stream = labeled(8_000)
    tuner = Tuner(slow(), RATES, learners=6, every=500)
    tuned = sr.OnlineTrainer(model=tuner, metrics=[sr.LogLoss()])
    fixed = sr.OnlineTrainer(model=slow(), metrics=[sr.LogLoss()])
    good = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), metrics=[sr.LogLoss()])
    losses = []
    for trainer in (tuned, fixed, good):
        trainer.push(stream[:6_000])
        scores = np.array(trainer.push(stream[6_000:]), dtype=np.float32)
        metric = sr.LogLoss()
        metric.update(np.array([one.label for one in stream[6_000:]], dtype=np.float32), scores)
        losses.append(metric.compute())
    assert losses[0] < losses[2] + 0.005 < losses[1] - 0.02
    assert tuner.best["linear_optimizer.lr"] > 0.01 and tuner.rungs == len(tuner.history) >= 8
    assert all(rung.stopped == 3 and rung.loss <= rung.worst for rung in tuner.history)
    assert str(tuner).splitlines()[1].lstrip().startswith("serves")


def test_learners_are_judged_by_the_scores_they_gave(make_stream: Any, make_trainer: Any) -> None:
    stream = make_stream(3, 300)
    schema = make_trainer().model.schema
    tuner = Tuner(sr.FM(schema, dim=4), RATES, learners=3, every=10**9)
    make_trainer(model=tuner).push(stream)
    for learner in tuner._learners:
        alone = make_trainer(
            model=sr.FM(schema, **with_settings(sr.FM(schema, dim=4), learner.params)), metrics=[sr.LogLoss()]
        )
        # without the scores of a service, by which only what was served is judged
        bare = [strip(event) for event in stream]
        alone.push(bare)
        assert alone.report().metrics["LogLoss"] == learner.loss.compute()
        assert first_difference(dict(alone.model.state_dict()), dict(learner.model.state_dict())) is None


def strip(event: Any) -> Any:
    import msgspec

    if isinstance(event, sr.Impression) and event.score is not None and 0 <= event.score <= 1:
        return msgspec.structs.replace(event, score=None)
    if isinstance(event, sr.Labeled) and isinstance(event.impression, sr.Impression):
        return msgspec.structs.replace(event, impression=strip(event.impression))
    return event


@pytest.mark.parametrize("cut", [256, 700])
def test_neither_cuts_nor_a_kill_change_a_bit(cut: int, make_stream: Any, make_trainer: Any, canonical: Any) -> None:
    stream = make_stream(5, 500)
    schema = make_trainer().model.schema

    def trainer() -> Any:
        return make_trainer(model=Tuner(slow(schema), RATES, learners=3, every=60))

    whole, pieces, twin = trainer(), trainer(), trainer()
    expected = whole.push(stream)
    assert whole.model.rungs > 2
    rng = np.random.default_rng(cut)
    found, begin = [], 0
    while begin < len(stream):
        end = begin + int(rng.choice([1, 3, 40, 300]))
        if begin < cut < end:
            end = cut
        found += pieces.push(stream[begin:end])
        begin = end
        if begin == cut:
            state = copy_state(pieces.state_dict())
            check_state_is_plain({name: part for name, part in state.items() if name != "model"})
            at = len(found)
    assert np.array_equal(found, expected, equal_nan=True)
    twin.load_state_dict(state)
    assert np.array_equal(twin.push(stream[cut:]), expected[at:], equal_nan=True)
    for one in (pieces, twin):
        assert first_difference(canonical(whole.state_dict()), canonical(one.state_dict())) is None


def test_a_run_that_ended_goes_on_from_its_store_and_threads_change_nothing(tmp_path: Path) -> None:
    stream = labeled(3_000)

    def trainer(store: Any, **options: Any) -> sr.OnlineTrainer:
        tuner = Tuner(slow(), RATES, learners=4, every=300, **options)
        return sr.OnlineTrainer(model=tuner, store=store, metrics=[sr.LogLoss()], batch_size=100)

    whole = trainer(tmp_path / "whole")
    whole.run(sr.Memory(stream))
    trainer(tmp_path / "parts").run(sr.Memory(stream), limit=1_234)
    again = trainer(tmp_path / "parts", threads=2)
    again.run(sr.Memory(stream))
    assert again.report().metrics == whole.report().metrics
    assert first_difference(whole.model.state_dict(), again.model.state_dict()) is None
    # what was published is the FM that serves
    shown = [one.impression for one in stream[:50]]
    scorer = sr.Scorer(str(tmp_path / "parts"))
    assert isinstance(again.model, Tuner)
    assert np.allclose(scorer.score(shown), again.model.predict(encode(SCHEMA, shown).batch), atol=1e-6)


def test_the_winner_goes_through_the_gate() -> None:
    store = Store("memory://tuner/gate", keep=2, clock=lambda: 0.0)
    trainer = sr.OnlineTrainer(
        model=Tuner(slow(), RATES, learners=4, every=500),
        store=store,
        checkpoint_every=500,
        batch_size=100,
        background=False,
        gate=Gate(worse=0.05, watch=3000, every=1000, patience=20_000),
    )
    trainer.run(sr.Memory(labeled(8_000)))
    reasons = [decision.why for decision in store.served.history()]
    assert any(why.startswith("not worse than version 1") for why in reasons)


def test_a_forgotten_user_is_forgotten_by_all_learners() -> None:
    tuner = Tuner(sr.FM(SCHEMA, dim=4), RATES, learners=3)
    trainer = sr.OnlineTrainer(model=tuner)
    trainer.push(labeled(500))
    assert trainer.forget("u3")["rows"] == 1
    assert tuner.forget("user", "u3") == 0


# Variants.

OTHERS: list[dict[str, Any]] = [
    {"optimizer.lr": 0.2, "linear_optimizer.lr": 0.9, "linear_optimizer.l2": 0.5, "linear_optimizer.beta": 0.1},
    {"dim": 1},
    {"dim": 5, "linear_optimizer.lr": 0.5},
    {"linear_optimizer": sr.Adagrad()},
    {"optimizer": sr.FTRL(), "linear_optimizer": sr.SGD()},
]


@pytest.mark.parametrize("params", OTHERS)
def test_a_variant_says_what_its_model_says_and_learns_on(params: dict[str, Any]) -> None:
    stream = labeled(400)
    batch = encode(SCHEMA, [one.impression for one in stream]).batch
    labels = np.array([one.label for one in stream], dtype=np.float32)
    model = sr.FM(SCHEMA, dim=4)
    model.learn(batch, labels)
    before = dict(copy_state(model.state_dict()))
    made = variant(model, with_settings(model, params))
    assert first_difference(before, dict(model.state_dict())) is None
    same = "dim" not in params
    # with other factors it is nearly so: those that are new begin small, those that go were few events old
    assert np.allclose(made.predict(batch), model.predict(batch), atol=1e-5 if same else 0.1)
    assert made.bias.item() == pytest.approx(model.bias.item(), abs=1e-6)
    made.learn(batch, labels)
    model.learn(batch, labels)
    assert not np.array_equal(made.predict(batch), model.predict(batch))


def test_a_variant_of_the_same_settings_is_the_model() -> None:
    stream = labeled(300)
    batch = encode(SCHEMA, [one.impression for one in stream]).batch
    labels = np.array([one.label for one in stream], dtype=np.float32)
    model = sr.FM(SCHEMA, dim=4, optimizer=sr.Adagrad())
    model.learn(batch, labels)
    made = variant(model, with_settings(model, {}))
    made.learn(batch, labels)
    model.learn(batch, labels)
    assert first_difference(dict(model.state_dict()), dict(made.state_dict())) is None


def test_a_variant_goes_on_where_ids_are_admitted_expire_and_move_into_a_larger_table() -> None:
    schema = sr.Schema(sr.Id("user", admit=2, ttl=0.5), sr.Id("item", ttl=1e6))
    rng = np.random.default_rng(0)
    stream = [sr.Impression(f"i{n}", n / 100, f"u{rng.integers(500)}", f"p{n}") for n in range(27_000)]
    batch = encode(schema, stream).batch
    labels = rng.integers(2, size=len(stream)).astype(np.float32)
    model = sr.FM(schema, dim=4)

    def learn(model: sr.FM, begin: int, end: int) -> None:
        rows = np.arange(begin, end)
        ones = np.ones(len(rows), dtype=np.float32)
        model.step(batch, rows, np.full(len(rows), LEARN, dtype=np.int8), labels[rows], ones)

    done = 26_000
    learn(model, 0, done)
    while not len(model.ids.old):
        learn(model, done, done + 20)
        done += 20
    made = variant(model, with_settings(model, {}))
    for one in (model, made):
        learn(one, 0, 5_000)
    assert first_difference(dict(model.state_dict()), dict(made.state_dict())) is None


def test_newcomers_begin_untrained_where_the_best_is_worse_than_the_average_rate() -> None:
    stream = labeled(1_600)
    flipped = [sr.Labeled(one.impression, 1.0 - one.label) for one in stream]
    sizes = {}
    for name, learned in (("spoilt", flipped), ("sound", stream)):
        model = sr.FM(SCHEMA, dim=4)
        sr.OnlineTrainer(model=model).push(learned * 4)
        tuner = Tuner(model, {"linear_optimizer.lr": Real(1e-5, 1.0, log=True)}, learners=2, every=200)
        trainer = sr.OnlineTrainer(model=tuner)
        trainer.push(stream[:256])
        assert tuner.rungs == 1
        sizes[name] = sorted(len(one["model"]["ids"]) for one in tuner.state_dict()["learners"])
    assert sizes == {"spoilt": [0, 32], "sound": [32, 32]}


def test_rungs_lengthen_with_the_table_so_that_copies_stay_a_small_part() -> None:
    tuner = Tuner(sr.FM(SCHEMA, dim=4), RATES, learners=2, every=100)
    shown = [sr.Impression(f"i{n}", float(n), f"u{n}", f"p{n}") for n in range(4_000)]
    tuner.learn(encode(SCHEMA, shown).batch, np.zeros(4_000, dtype=np.float32))
    assert tuner.rung_length == 8_000 // 32


def test_neighbours() -> None:
    for share, reach in itertools.product((-1.0, -0.3, 0.0, 0.7, 1.0), (1.5, 10.0)):
        assert 0.01 <= Real(0.01, 1.0, log=True).near(0.5, share, reach) <= 1.0
        assert Whole(4, 32, log=True).near(8, share, reach) in range(4, 33)
        assert Choice((1, 2, 3)).near(2, share, reach) in (1, 2, 3)
    assert {Choice((1, 2)).near(1, share, 10.0) for share in np.linspace(-1, 1, 50)} == {1, 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"space": {}}, "space must name"),
        ({"space": {"optimizer.lr": 0.1}}, "must be a Real"),
        ({"space": {"depth": Whole(1, 2)}}, "an FM has no 'depth'"),
        ({"space": {"seed": Whole(1, 2)}}, "seed is no setting"),
        ({"space": {"optimizer.beta": Real(0.1, 1.0)}}, "Adagrad has no beta"),
        ({"space": {"optimizer.lr": Real(0.1, 1.0)}}, "the search begins there"),
        ({"space": {"dim": Choice((8, 16))}}, "dim=4, which is not in"),
        ({"learners": 1}, "learners must be"),
        ({"reach": 1.0}, "reach must be"),
        ({"model": sr.Memory([])}, "model must be an FM"),
    ],
)
def test_what_cannot_work_is_said(options: dict[str, Any], said: str) -> None:
    given = {"model": sr.FM(SCHEMA, dim=4), "space": RATES, **options}
    with pytest.raises(sr.ConfigError, match=said):
        Tuner(given.pop("model"), given.pop("space"), **given)


def test_its_config_makes_it_again() -> None:
    tuner = Tuner(sr.FM(SCHEMA, dim=4), {**RATES, "dim": Choice((4, 8))}, learners=3)
    assert Tuner.from_config(tuner.config()).config() == tuner.config()
    with pytest.raises(sr.ConfigError, match="give the tuner the settings it had"):
        Tuner(sr.FM(SCHEMA, dim=4), RATES, learners=3).load_state_dict(tuner.state_dict())
