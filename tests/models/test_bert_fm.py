"""BertFM: an FM that reads texts."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamrec as sr
from streamrec.errors import ConfigError, SchemaError
from streamrec.events import encode_event
from streamrec.models import BertFM, Taste
from streamrec.preprocessors import encode
from streamrec.testing import check_model
from streamrec.testing._state import copy_state, first_difference
from tests.models.tiny_bert import tiny_bert

HIDDEN = 36  # no multiple of what the loops take at once
SCHEMA = sr.Schema(
    sr.Id("user"), sr.Id("item"), sr.Text("title"), sr.Number("price", standardize=True), sr.Text("query")
)


class Words:
    """A vector of each text: the mean of one for each of its words, and a part that all have in common."""

    hidden = HIDDEN

    def __init__(self, version: str = "words 1") -> None:
        self.version = version

    def vectors(self, texts: Sequence[str]) -> Any:
        found = np.zeros((len(texts), HIDDEN), dtype=np.float32)
        for place, text in enumerate(texts):
            for word in text.split():
                seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
                found[place] += np.random.default_rng(seed).normal(size=HIDDEN) + 0.5
        return found


class OfWords(BertFM):
    """Of vectors that a config cannot refer to."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, texts: Any = None) -> BertFM:
        return super().from_config(config, texts=texts or Words())


def made(**given: Any) -> OfWords:
    return OfWords(SCHEMA, **{"texts": Words(), "dim": 4, "taste": Taste(capacity=16), **given})


def shown(number: int) -> sr.Impression:
    titles = ["red wine", "blue wine", "red bag", None, "  ", "green bag of tea"]
    features = {
        "title": titles[number * 5 % 6],
        "query": [None, "wine", "a bag"][number % 3],
        "price": float(number % 4),
    }
    return sr.Impression(f"i{number}", float(number), f"u{number % 5}", f"p{number % 7}", features)


SHOWN = [shown(n) for n in range(60)]
BATCH = encode(SCHEMA, SHOWN).batch
LABELS = np.array([n % 6 == 1 or n % 5 == 2 for n in range(60)], dtype=np.float32)


def test_it_keeps_the_contract_of_models() -> None:
    check_model(made, BATCH, LABELS)


def test_forward_is_the_same_function() -> None:
    model = made()
    for _ in range(4):
        model.learn(BATCH, LABELS)
    assert abs(model.similarity.item()) > 0.01
    assert np.allclose(model.predict(BATCH), torch.sigmoid(model(BATCH)).detach().numpy(), atol=1e-6)


def test_a_step_is_that_of_autograd() -> None:
    model = made(text_optimizer=sr.Adagrad(lr=0.3, eps=0.01))
    model.learn(BATCH, LABELS)
    row = BATCH.take([11])
    model.begin(row.ids[row.entries])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(row), torch.ones(1))
    loss.backward()
    dim, inputs = model.dim, len(model.projections)
    before = copy_state(model.state_dict())
    model.learn(row, np.ones(1, dtype=np.float32))
    memory = before["text_memory"]
    of_inputs = torch.from_numpy(memory[:-1].reshape(inputs, dim + 1))
    for name, gradient, known in (
        ("projections", model.projections.grad, of_inputs[:, :dim, None]),
        ("text_weights", model.text_weights.grad, of_inputs[:, dim:]),
        ("similarity", model.similarity.grad, float(memory[-1])),
    ):
        assert gradient is not None and gradient.abs().max() > 1e-6, name
        size = (gradient**2).sum(dim=-1, keepdim=True)
        expected = before[name] - 0.3 * gradient / ((known + size) ** 0.5 + 0.01)
        assert torch.allclose(getattr(model, name).detach(), expected, atol=2e-6), name


def test_one_at_a_time_is_a_step() -> None:
    whole, single = made(), made()
    rows, ops = np.arange(60), np.full(60, 3, dtype=np.int8)
    scores = whole.step(BATCH, rows, ops, LABELS, np.ones(60, dtype=np.float32))
    found = [single.one(BATCH.take([n]), float(LABELS[n])) for n in range(60)]
    assert scores.tolist() == found
    assert first_difference(copy_state(whole.state_dict()), copy_state(single.state_dict())) is None
    with pytest.raises(ConfigError, match="one row"):
        whole.one(BATCH)


def test_an_item_never_seen_is_scored_by_what_it_says() -> None:
    model = made(taste=None)
    titles = ["red wine", "red bag", "blue wine", "blue bag"]
    stream = [sr.Impression("", 0.0, f"u{n % 9}", f"p{n}", {"title": titles[n % 4]}) for n in range(400)]
    model.learn(encode(SCHEMA, stream).batch, np.array([n % 4 < 2 for n in range(400)], dtype=np.float32))
    new = [sr.Impression("", 0.0, "u1", "new", {"title": title}) for title in ("red tea", "blue tea", None)]
    red, blue, silent = model.predict(encode(SCHEMA, new).batch)
    assert red > silent + 0.1 and blue < silent - 0.1


def test_a_user_who_clicked_red_is_shown_red() -> None:
    model = made(text_optimizer=sr.Adagrad(lr=0.2))
    stream, labels = [], []
    for n in range(
        600
    ):  # even users click red, odd ones blue; users 0 and 1 have no events but three clicks at the end
        user, colour = 2 + n % 7, n // 7 % 2
        stream.append(
            sr.Impression("", 0.0, f"u{user}", f"p{n}", {"title": ["red", "blue"][colour] + f" word{n % 50}"})
        )
        labels.append(float(user % 2 == colour))
    for n in range(6):
        stream.append(sr.Impression("", 0.0, f"u{n % 2}", f"q{n}", {"title": ["red thing", "blue thing"][n % 2]}))
        labels.append(1.0)
    model.learn(encode(SCHEMA, stream).batch, np.array(labels, dtype=np.float32))
    assert model.similarity.item() > 0
    new = [
        sr.Impression("", 0.0, f"u{u}", "new", {"title": f"{colour} tea"}) for u in (0, 1) for colour in ("red", "blue")
    ]
    red_0, blue_0, red_1, blue_1 = model.predict(encode(SCHEMA, new).batch)
    assert red_0 > blue_0 and blue_1 > red_1


def test_tastes_are_bounded_and_the_one_not_clicking_for_longest_goes() -> None:
    model = made(taste=Taste(capacity=8))
    stream = [sr.Impression("", 0.0, f"u{n}", "p", {"title": f"word{n}"}) for n in range(30)]
    batch = encode(SCHEMA, stream).batch
    model.learn(batch, np.ones(30, dtype=np.float32))
    assert model._header.tolist() == [30, 22]
    _, there = model._tastes_of(batch)
    assert there.tolist() == [n >= 22 for n in range(30)]


def test_what_is_not_finite_is_taken_for_missing() -> None:
    class Broken(Words):
        def vectors(self, texts: Sequence[str]) -> Any:
            return super().vectors(texts) * np.float32(np.nan)

    model, silent = made(texts=Broken()), [sr.Impression("", 0.0, one.user, one.item, {"price": 1.0}) for one in SHOWN]
    model.learn(encode(SCHEMA, silent).batch, LABELS)
    before = model.predict(encode(SCHEMA, silent).batch)
    priced = [sr.Impression("", 0.0, one.user, one.item, {**one.features, "price": 1.0}) for one in SHOWN]
    assert before.tobytes() == model.predict(encode(SCHEMA, priced).batch).tobytes()


def test_another_version_of_the_encoder_is_refused_by_name() -> None:
    model = made()
    model.learn(BATCH, LABELS)
    other = made(texts=Words("words 2"))
    for load in (
        lambda: other.load_state_dict(model.state_dict()),
        lambda: OfWords.from_config(model.config(), texts=Words("words 2")),
        lambda: other.load_changes(model.changes()),
    ):
        with pytest.raises(ConfigError, match=r"version words 1 .* words 2"):
            load()
    with pytest.raises(ConfigError, match="pass texts="):
        BertFM.from_config(model.config())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(SchemaError, match="Text"):
        BertFM(sr.Schema(sr.Id("user")), texts=Words())
    with pytest.raises(SchemaError, match="by must be an Id"):
        made(taste=Taste(by="price"))
    with pytest.raises(SchemaError, match="of must be a Text"):
        made(taste=Taste(of="item"))
    with pytest.raises(ConfigError, match="l2=0"):
        made(text_optimizer=sr.Adagrad(l2=0.1))
    with pytest.raises(ConfigError, match="power of two"):
        Taste(capacity=12)
    with pytest.raises(ConfigError, match="span"):
        Taste(span=0.5)


def test_a_copy_shares_the_vectors_and_nothing_else() -> None:
    model = made()
    model.learn(BATCH, LABELS)
    twin = copy.deepcopy(model)
    before = model.predict(BATCH)
    twin.learn(BATCH, LABELS)
    assert twin.texts is model.texts
    assert model.predict(BATCH).tobytes() == before.tobytes() != twin.predict(BATCH).tobytes()


def labeled(count: int) -> list[Any]:
    return [sr.Labeled(shown(n), float(n % 6 == 1 or n % 5 == 2)) for n in range(count)]


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been() -> None:
    events: list[Any] = []
    for n in range(120):
        events.append(shown(n))
        events += [sr.Feedback(f"f{n}", f"i{n}", n + 0.5)] if n % 3 == 0 else []

    def trainer(store: str | None) -> sr.OnlineTrainer:
        join = sr.LabelJoin(windows={"click": 10.0}, lateness=2.0)
        return sr.OnlineTrainer(model=made(), join=join, metrics=[sr.AUC()], store=store, batch_size=16)

    whole = trainer(None)
    whole.run(sr.Memory(events))
    for cut in (30, 90):
        store = f"memory://bert-fm-{cut}"
        trainer(store).run(sr.Memory(events), limit=cut)
        again = trainer(store)
        again.run(sr.Memory(events))
        states = [
            copy_state({name: one.state_dict()[name] for name in ("model", "metrics", "counts")})
            for one in (whole, again)
        ]
        assert first_difference(*states) is None


def test_a_click_elsewhere_is_told_by_a_row_of_weight_0() -> None:
    model = made()
    model.learn(BATCH, LABELS)
    before = copy_state(model.state_dict())
    told = encode(SCHEMA, [sr.Impression("", 0.0, "newcomer", "p1", {"title": "red wine"})]).batch
    model.learn(told, np.ones(1, dtype=np.float32), np.zeros(1, dtype=np.float32))
    after = copy_state(model.state_dict())
    for name in ("projections", "text_weights", "similarity", "text_memory"):
        assert before[name].tolist() == after[name].tolist(), name
    assert after["seen"][0] == before["seen"][0] + 1
    assert model._tastes_of(told)[1].tolist() == [True]


def test_an_archive_first_and_then_the_stream() -> None:
    whole = sr.OnlineTrainer(model=made())
    whole.run(sr.Memory(labeled(120)))
    batch = sr.BatchTrainer(model=made(), window=37)
    batch.run(sr.JoinedEvents(sr.Memory(labeled(70)), schema=SCHEMA))
    online = sr.OnlineTrainer(model=batch.model)
    online.run(sr.Memory(labeled(120)[70:]))
    states = [copy_state(one.model.state_dict()) for one in (whole, online)]
    assert first_difference(*states) is None


CHILD = """
import sys, time
import streamrec as sr
from tests.models.test_bert_fm import made

class Slow(sr.JsonLines):
    def read(self, limit):
        time.sleep(0.02)  # so that there is something left to kill
        return super().read(limit)

log, store = sys.argv[1:]
trainer = sr.OnlineTrainer(model=made(), store=store, batch_size=1, checkpoint_every=5, checkpoint_seconds=1e9)
trainer.run(Slow(log))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    log, store = tmp_path / "log.jsonl", tmp_path / "store"
    log.write_bytes(b"".join(encode_event(one) + b"\n" for one in labeled(400)))
    command = [sys.executable, "-c", CHILD, str(log), str(store)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]) as child:
        while len([*(store / "checkpoints").glob("*.json")]) < 2 and child.poll() is None:
            time.sleep(0.002)
        child.kill()
        error = child.communicate()[1]
    assert child.returncode == -signal.SIGKILL, error
    again, whole = sr.OnlineTrainer(model=made(), store=store), sr.OnlineTrainer(model=made())
    again.run(sr.JsonLines(log))
    whole.run(sr.JsonLines(log))
    assert whole.report().counts["events"] == 400
    states = [copy_state(one.model.state_dict()) for one in (whole, again)]
    assert first_difference(*states) is None


def test_a_scorer_finds_the_encoder_by_what_the_version_refers_to(tmp_path: Path) -> None:
    texts = sr.TextCache(sr.TextEncoder(tiny_bert(tmp_path / "bert", hidden=HIDDEN)))
    model = BertFM(SCHEMA, texts=texts, dim=4, taste=Taste(capacity=16))
    store = sr.Store(tmp_path / "store")
    trainer = sr.OnlineTrainer(model=model, store=store)
    trainer.push(labeled(60))
    trainer.publish()
    assert sr.Scorer(store).score(SHOWN).tobytes() == model.predict(BATCH).tobytes()
    config = model.config()
    other = tiny_bert(tmp_path / "other", hidden=HIDDEN, seed=1)
    with pytest.raises(ConfigError, match=f"version {model.encoder_version} .*other"):
        BertFM.from_config({**config, "encoder": {**config["encoder"], "model": str(other)}})
    with pytest.raises(ConfigError, match="nowhere"):
        BertFM.from_config({**config, "encoder": {**config["encoder"], "model": str(tmp_path / "nowhere")}})


def test_a_scorer_ranks_and_retrieves_as_it_scores() -> None:
    store = sr.Store("memory://bert-fm-scorer")
    trainer = sr.OnlineTrainer(model=made(), store=store)
    trainer.push(labeled(200))
    trainer.publish()
    scorer = sr.Scorer(store, model=made)
    titles = ["red wine", "blue tea", "", "green bag of tea", "a new thing"]
    some = [sr.Candidate(f"p{n}", {"title": titles[n % 5], "price": float(n % 3)}) for n in range(40)]
    shared = {"query": "wine"}
    one_by_one = scorer.score([sr.Impression("", 0.0, "u2", one.item, {**shared, **one.features}) for one in some])
    expected = {one.item: score for one, score in zip(some, one_by_one.tolist(), strict=True)}
    ranked = scorer.rank(user="u2", candidates=some, features=shared)
    scorer.set_catalogue(some)
    for found in (
        ranked,
        scorer.retrieve(user="u2", features=shared, k=None),
        scorer.retrieve(user="u2", features=shared, k=2),
    ):
        assert [one.score for one in found] == pytest.approx([expected[one.item] for one in found], abs=1e-5)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    trainer.push(labeled(260)[200:])
    trainer.publish()
    assert scorer.refresh()
    before = trainer.model.predict(BATCH)
    assert scorer.score(SHOWN).tobytes() == before.tobytes()
