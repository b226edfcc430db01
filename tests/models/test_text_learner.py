"""TextLearner: an encoder that learns by LoRA beside the stream."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
from tests.models.test_text_encoder import STRANGE
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
    assert texts.counts == {
        "learned": 24,
        "dropped": 0,
        "left_out": 0,
        "steps": 8,
        "halved": 0,
        "versions": 1,
        "restarts": 0,
    }
    assert encoder.embed(TITLES).astype(np.float16).astype(np.float32).tobytes() == before.tobytes()  # as it was


def test_beside_the_stream_it_learns_the_same_bits_whatever_dies(encoder: sr.TextEncoder) -> None:
    from streamrec.models.text_learner import Example

    numbers = np.random.default_rng(0).normal(size=(2, 12, HIDDEN)).astype(np.float32)
    examples = [Example(f"{TITLES[n % 4]}\ud800 {n}", numbers[0, n], numbers[1, n]) for n in range(12)]
    here, beside = (learner(encoder, steps=2, background=background) for background in (False, True))
    for texts in (here, beside):
        texts.vectors(TITLES)
    here.learn(examples)
    beside.learn(examples[:5])
    wait(lambda: beside.counts["steps"] == 1)
    process = beside._worker.beside._process  # type: ignore[union-attr]
    assert process is not None and os.getpriority(os.PRIO_PROCESS, process.pid) >= 10
    process.kill()  # with two examples that wait
    beside.learn(examples[5:])
    assert here._worker.ready is not None
    weights = here._worker.ready[0]
    wait(lambda: beside._worker.ready is not None and torch.equal(beside._worker.ready[0], weights))
    assert beside.counts == {**here.counts, "restarts": 1} and here.counts["learned"] == 12
    assert first_difference(copy_state(here.state_dict()), copy_state(beside.state_dict())) is None
    check_state_is_plain(beside.state_dict())
    computed = here.served.counts["misses"], beside.served.counts["misses"]
    for texts in (here, beside):
        texts.turn()
    assert beside.version == here.version != encoder.version
    assert beside.vectors(TITLES).tobytes() == here.vectors(TITLES).tobytes()
    assert beside.vectors(["a new one"]).tobytes() == here.vectors(["a new one"]).tobytes()
    assert (here.served.counts["misses"], beside.served.counts["misses"]) == (computed[0] + 1, computed[1] + 1)

    # what cannot be learned is said once, and what is served stays
    before = beside.vectors(TITLES)
    beside.learn([Example("red wine", np.zeros(3, np.float32), np.zeros(5, np.float32))] * 3)  # of other encoders
    wait(lambda: beside._worker.error is not None)
    with pytest.warns(RuntimeWarning, match="learns no more: .*in the process that learns: .*Error"):
        beside.turn()
    beside.turn()
    assert beside.vectors(TITLES).tobytes() == before.tobytes()
    process = beside._worker.beside._process  # type: ignore[union-attr]
    beside.close()
    beside.close()
    assert process is not None and process.poll() is not None


def test_a_process_that_always_dies_is_said_and_the_stream_goes_on(
    encoder: sr.TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamrec.models.text_learner import Example

    monkeypatch.setattr(sys, "executable", "/bin/false")
    texts = learner(encoder, background=True)
    texts.learn([Example("red wine", np.zeros(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32))] * 3)
    wait(lambda: texts._worker.error is not None)
    with pytest.warns(RuntimeWarning, match=r"died 3 times in a row .*exit status 1.*background=False"):
        made(texts).learn(BATCH, LABELS)
    assert texts.counts["restarts"] == 3 and texts.version == encoder.version
    texts.close()


def test_with_a_process_the_stream_goes_on_and_goes_over(encoder: sr.TextEncoder) -> None:
    texts = learner(encoder, background=True, every=2, steps=4, queue=4)
    model, given = made(texts), 0
    first, until = model.encoder_version, time.monotonic() + 120
    while texts.counts["versions"] < 2 and time.monotonic() < until:
        model.learn(BATCH, LABELS)
        given += 60
        time.sleep(0.01)
    assert model.encoder_version != first and texts.rows == given
    assert 0 < texts.counts["dropped"] < given and texts.counts["steps"] >= 8
    # what was cut goes on with the version that was served, on any machine
    state = copy_state(model.state_dict())
    twin = made(learner(encoder, background=True, every=2, steps=4, queue=4))
    twin.load_state_dict(state)
    assert twin.encoder_version == model.encoder_version
    assert twin.predict(BATCH).tobytes() == model.predict(BATCH).tobytes()
    texts.close()
    assert first_difference(copy_state(twin.state_dict()["learner"]), copy_state(state["learner"])) is None


PARENT = """
import os, sys, time
import numpy as np
import streamrec as sr
from streamrec.models.text_learner import Example

texts = sr.TextLearner(sr.TextCache(sr.TextEncoder(sys.argv[1]), max_bytes=1 << 20), steps=1)
zeros = np.zeros(texts.hidden, dtype=np.float32)
texts.learn([Example("red wine", zeros, zeros)] * texts.optimizer.batch_size)
while not texts.counts["steps"]:
    time.sleep(0.01)
holder = os.fork()  # which has the pipe, too
if holder:
    print(holder, texts._worker.beside._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_it_ends_with_its_parent_however_that_ends(encoder: sr.TextEncoder) -> None:
    arguments = [sys.executable, "-c", PARENT, encoder.model]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ}) as parent:
        assert parent.stdout is not None
        holder, process = map(int, parent.stdout.readline().split())
        try:
            assert alive(process)
            parent.kill()
            wait(lambda: not alive(process))
        finally:
            os.kill(holder, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_examples_are_made_with_is_compiled_with_the_first_row(
    encoder: sr.TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = made(learner(encoder, every=100)), []
    parts = model.parts
    monkeypatch.setattr(model, "parts", lambda batch: asked.append(len(batch)) or parts(batch))
    for _ in range(2):
        model.learn(BATCH.take([0]), LABELS[:1])
    assert asked == [1]


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


@pytest.mark.parametrize("text", [None, *STRANGE], ids=lambda text: repr(text)[:12])
def test_any_text_is_scored_learned_from_and_served(encoder: sr.TextEncoder, text: str | None) -> None:
    shown = [sr.Impression(str(n), float(n), "u", "p", {"title": text, "query": text}) for n in range(4)]
    model = made(learner(encoder, every=1, optimizer=AdamW(lr=0.02, batch_size=2)))
    trainer = sr.OnlineTrainer(model=model, store=sr.Store("memory://any-text"))
    scores = trainer.push([sr.Labeled(one, float(n % 2)) for n, one in enumerate(shown)])
    trainer.publish()
    assert np.isfinite(scores).all() and model.left_out == 0
    counts = model.texts.counts
    assert counts["left_out"] == 0 and (counts["learned"] > 0) == bool(encoder.tokens([text])[0])
    served = sr.Scorer(sr.Store("memory://any-text")).score(shown)
    assert served.tobytes() == model.predict(encode(SCHEMA, shown).batch).tobytes()


def test_memory_that_runs_out_halves_what_the_encoder_learns_at_once(encoder: sr.TextEncoder) -> None:
    from streamrec.models._text_learning import Learning
    from streamrec.models.text_learner import Example

    whole = Learning._loss

    def narrow(self: Any, tokens: Any, some: Any) -> Any:
        if len(some) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(self, tokens, some)

    numbers = np.random.default_rng(0).normal(size=(2, 4, HIDDEN)).astype(np.float32)
    texts = learner(encoder, optimizer=AdamW(lr=0.02, batch_size=4))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Learning, "_loss", narrow)
        texts.learn([Example(title, *numbers[:, n]) for n, title in enumerate(TITLES)])
    assert texts.counts["halved"] == 2 and texts.counts["learned"] == 4


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
