"""TextLearner: an encoder that learns by LoRA beside the stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import streamrec as sr
from streamrec.errors import ConfigError
from streamrec.models import AdamW, BertFM, LoRA, Taste, TextLearner
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference
from tests.models.test_bert_fm import BATCH, HIDDEN, LABELS, SCHEMA, SHOWN, Words, labeled
from tests.models.test_bert_fm import made as frozen
from tests.models.tiny_bert import tiny_bert

pytest.importorskip("peft")
TITLES = ["red wine", "blue wine", "red bag", "green bag of tea"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> sr.TextEncoder:
    return sr.TextEncoder(tiny_bert(tmp_path_factory.mktemp("bert"), hidden=HIDDEN, layers=1))


def learner(encoder: sr.TextEncoder, **given: Any) -> TextLearner:
    usual: dict[str, Any] = {"every": 8, "steps": 1, "background": False, "optimizer": AdamW(lr=0.02, batch_size=3)}
    return TextLearner(sr.TextCache(encoder, max_bytes=1 << 20), **{**usual, **given})


def made(texts: Any) -> BertFM:
    return BertFM(SCHEMA, texts=texts, dim=4, taste=Taste(capacity=16))


def test_neither_cuts_nor_a_resume_change_a_bit(encoder: sr.TextEncoder) -> None:
    rows, ones = np.arange(60), np.ones(60, dtype=np.float32)
    ops = np.array([[LEARN, SCORE, SCORE | LEARN][n % 3] for n in range(60)], dtype=np.int8)
    whole = made(learner(encoder))
    scores = whole.step(BATCH, rows, ops, LABELS, ones)
    assert whole.texts.counts["versions"] == 2
    expected = copy_state(whole.state_dict())
    single = made(learner(encoder))
    for n in range(60):  # by what a step is made of
        row = BATCH.take([n])
        if ops[n] & SCORE:
            assert single.predict(row)[0] == scores[n]
        if ops[n] & LEARN:
            single.learn(row, LABELS[n : n + 1])
    assert first_difference(expected, copy_state(single.state_dict())) is None
    for cut in (17, 31, 44):  # with an example that waits, and between versions
        first, second = made(learner(encoder)), made(learner(encoder))
        first.step(BATCH, rows[:cut], ops[:cut], LABELS[:cut], ones[:cut])
        second.learn(BATCH, LABELS)  # a used one
        second.load_state_dict(copy_state(first.state_dict()))
        second.step(BATCH, rows[cut:], ops[cut:], LABELS[cut:], ones[cut:])
        assert first_difference(expected, copy_state(second.state_dict())) is None
    check_state_is_plain(whole.state_dict())


def test_an_example_is_the_gradient_of_the_loss_by_a_text(encoder: sr.TextEncoder) -> None:
    class Moved(Words):
        by = np.zeros(HIDDEN)

        def vectors(self, texts: Sequence[str]) -> Any:
            return super().vectors(texts) + (np.array(texts) == "blue wine")[:, None] * self.by.astype(np.float32)

    texts = Moved()
    model = frozen(texts=texts)
    for _ in range(4):
        model.learn(BATCH, LABELS)
    row = np.array([5])  # a title and a query
    examples = model._examples(BATCH.take(row), LEARN, 0.0, 2.0)
    (example,) = (one for one in examples if one.text == "blue wine")
    assert len(examples) == 2 and abs(model.similarity.item()) > 0.01
    start = torch.tensor(texts.vectors(["blue wine"])[0], dtype=torch.float64, requires_grad=True)
    read = functional.normalize(functional.normalize(start, dim=0) - torch.from_numpy(example.mean).double(), dim=0)
    (read * torch.from_numpy(example.gradient)).sum().backward()
    assert start.grad is not None
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=HIDDEN)
        losses = []
        for step in (-0.02, 0.02):
            Moved.by = step * direction
            losses.append(2.0 * functional.softplus(model(BATCH.take(row)).double()).item())
        Moved.by = np.zeros(HIDDEN)
        expected = float(start.grad @ torch.from_numpy(direction))
        assert (losses[1] - losses[0]) / 0.04 == pytest.approx(expected, rel=0.02)


def test_steps_make_the_loss_less_and_versions_serve_it(encoder: sr.TextEncoder) -> None:
    from streamrec.models.text_learner import Example

    texts = learner(encoder, steps=8)
    before, first = texts.vectors(TITLES), texts.version
    wanted = np.random.default_rng(0).normal(size=HIDDEN).astype(np.float32)
    for n in range(3 * 8):
        texts.learn([Example(TITLES[n % 3], wanted, np.zeros(HIDDEN, dtype=np.float32))])
    assert texts.version == first and texts.vectors(TITLES).tobytes() == before.tobytes()
    asked = texts.served.counts["misses"]
    texts.turn()
    after = texts.vectors(TITLES)
    assert texts.version != first and texts.served.counts["misses"] == asked  # all were computed beforehand
    read = [functional.normalize(torch.from_numpy(one), dim=1)[:3] for one in (before, after)]
    near = [one @ torch.from_numpy(wanted) for one in read]
    assert bool((near[1] < near[0] - 0.5).all())
    assert texts.counts == {"learned": 24, "dropped": 0, "left_out": 0, "steps": 8, "versions": 1}
    assert encoder.embed(TITLES).astype(np.float16).astype(np.float32).tobytes() == before.tobytes()  # as it was


def test_with_the_thread_the_stream_goes_on_and_goes_over(encoder: sr.TextEncoder) -> None:
    texts = learner(encoder, background=True, every=2, steps=4, queue=4)
    model, given = made(texts), 0
    first = model.encoder_version
    until = time.monotonic() + 60
    while texts.counts["versions"] < 2 and time.monotonic() < until:
        model.learn(BATCH, LABELS)
        given += 60
    assert model.encoder_version != first and texts.rows == given
    assert 0 < texts.counts["dropped"] < given and texts.counts["steps"] >= 8
    # what was cut goes on with the version that was served, on any machine
    state = copy_state(model.state_dict())
    twin = made(learner(encoder, background=True, every=2, steps=4, queue=4))
    twin.load_state_dict(state)
    assert twin.encoder_version == model.encoder_version
    assert twin.predict(BATCH).tobytes() == model.predict(BATCH).tobytes()
    texts.close()
    texts.close()
    assert first_difference(copy_state(twin.state_dict()["learner"]), copy_state(state["learner"])) is None


def test_what_fails_beside_the_stream_is_said_and_what_is_served_stays(encoder: sr.TextEncoder) -> None:
    from streamrec.models.text_learner import Example

    texts = learner(encoder, background=True)
    before = texts.vectors(TITLES)
    texts.learn([Example("red wine", np.zeros(3, np.float32), np.zeros(5, np.float32))] * 3)  # of other encoders
    until = time.monotonic() + 60
    while texts._worker.error is None and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.warns(RuntimeWarning, match="learns no more"):
        texts.turn()
    texts.turn()
    assert texts.vectors(TITLES).tobytes() == before.tobytes()


def test_a_scorer_follows_the_versions_from_the_store_alone(encoder: sr.TextEncoder) -> None:
    store = sr.Store("memory://text-learner")
    trainer = sr.OnlineTrainer(model=made(learner(encoder)), store=store)
    scorer = None
    for begin in (0, 40, 80):  # whole, then as changes into the model before
        trainer.push(labeled(120)[begin : begin + 40])
        trainer.publish()
        scorer = scorer or sr.Scorer(store)
        scorer.refresh()
        expected = trainer.model.predict(encode(SCHEMA, SHOWN).batch)
        assert scorer.score(SHOWN).tobytes() == expected.tobytes()
    assert trainer.model.texts.counts["versions"] >= 3


def test_a_frozen_model_goes_on_learning_and_what_does_not_fit_is_refused(encoder: sr.TextEncoder) -> None:
    plain = made(sr.TextCache(encoder, max_bytes=1 << 20))
    plain.learn(BATCH, LABELS)
    model = made(learner(encoder))
    model.load_state_dict(plain.state_dict())
    assert model.predict(BATCH).tobytes() == plain.predict(BATCH).tobytes()
    model.learn(BATCH, LABELS)
    with pytest.raises(ConfigError, match="version"):
        plain.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="use the tune they were saved with"):
        made(learner(encoder, tune=LoRA(rank=2))).load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="every must be a whole number of 1"):
        learner(encoder, every=0)
