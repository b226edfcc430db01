from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamrec as sr
from streamrec.models import AdamW, TextEncoder
from streamrec.trainers import InBatch, Linear, MaskedLM, SimCSE, pretrain
from streamrec.trainers.pretrain import Objective, _Run
from tests.models.tiny_bert import CHINESE, WORDS, tiny_bert

STEP = AdamW(lr=2e-3, batch_size=8, micro_batch=5)
TITLES = [
    " ".join(WORDS[(n * step) % len(WORDS)] for step in range(1, 7)) if n % 3 else CHINESE[n % 9 : n % 9 + 6]
    for n in range(36)
]
PAIRS = [(" ".join(title.split()[:1]), title) for title in TITLES]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), hidden=16)


def weights(place: Any) -> dict[str, torch.Tensor]:
    from transformers import AutoModel

    module = AutoModel.from_pretrained(place, add_pooling_layer=False)
    return {name: weight.clone() for name, weight in module.state_dict().items()}


class Ended(Exception):
    pass


@pytest.mark.parametrize("objective", [MaskedLM(), SimCSE(), InBatch(pooling="cls")], ids=lambda o: type(o).__name__)
def test_learns_and_resumes_bit_for_bit(objective: Objective, folder: Path, tmp_path: Path) -> None:
    texts: Any = PAIRS if isinstance(objective, InBatch) else TITLES
    settings: Any = {"objective": objective, "optimizer": STEP, "schedule": Linear(end=0.5), "seed": 3}
    global_state = torch.random.get_rng_state()
    first = pretrain(texts, folder, tmp_path / "one", epochs=1, **settings)
    whole = pretrain(texts, folder, tmp_path / "whole", epochs=4, **settings)
    assert torch.equal(global_state, torch.random.get_rng_state())
    assert whole.counts["steps"] == 20 and whole.counts["learned"] == 4 * len(texts)
    assert whole.metrics["loss"] < first.metrics["loss"]

    # killed after the seventh step, when a checkpoint has been written after the sixth
    ticks = iter([0.0, 0.0, *[1.0] * 5, 99.0, 99.0])

    def clock() -> float:
        try:
            return next(ticks)
        except StopIteration:
            raise Ended from None

    store = tmp_path / "store"
    with pytest.raises(Ended):
        pretrain(texts, folder, tmp_path / "cut", epochs=4, store=store, clock=clock, **settings)
    assert not (tmp_path / "cut").exists()
    assert sr.Store(store).checkpoints.list()
    again = pretrain(texts, folder, tmp_path / "cut", epochs=4, store=store, **settings)
    assert again.metrics == whole.metrics and again.counts == whole.counts
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    begun = weights(folder)
    assert not torch.equal(begun["embeddings.word_embeddings.weight"], found["embeddings.word_embeddings.weight"])
    with pytest.raises(sr.ConfigError, match="other texts or settings"):
        pretrain(texts[1:], folder, tmp_path / "cut", epochs=4, store=store, **settings)


def test_what_is_written_is_read_by_all(folder: Path) -> None:
    uri = "memory://pretrained/model"
    report = pretrain(TITLES, folder, uri, objective=MaskedLM(), optimizer=STEP)
    assert 0 < report.metrics["loss"] < 10
    encoder = TextEncoder(uri)
    assert encoder.version != TextEncoder(folder).version
    assert np.isfinite(encoder.embed(TITLES)).all()
    model = sr.BertCTR(sr.Schema(sr.Text("title")), uri)
    assert model.pair.item == ["title"]
    # and goes on, with its head
    again = pretrain(TITLES, uri, "memory://pretrained/again", objective=MaskedLM(), optimizer=STEP, epochs=3)
    assert again.metrics["loss"] < report.metrics["loss"]


def test_masked_lm_follows_transformers(folder: Path) -> None:
    """The loss of a step is what transformers' model and collator give for the same draw."""
    from transformers import DataCollatorForLanguageModeling

    run = _Run(TITLES, str(folder), MaskedLM(), 1, AdamW(batch_size=8), None, None, 0)
    some = run.texts[:8]
    collator = DataCollatorForLanguageModeling(run.tokenizer, mlm_probability=0.15)
    rows = [run.tokenizer(one[0], return_special_tokens_mask=True) for one in some]
    torch.manual_seed(5)
    inputs = collator(rows)
    expected = run.module(**inputs).loss
    torch.manual_seed(5)
    torch.testing.assert_close(run._loss(some), expected)


def test_in_batch_softmax_by_hand(folder: Path) -> None:
    run = _Run(
        [("red", "red wine"), ("blue", "blue bag"), ("wine", "red wine")],
        str(folder),
        InBatch(),
        1,
        STEP,
        None,
        None,
        0,
    )
    some = run.texts
    with torch.no_grad():
        q, p = (run._vectors([one[n] for one in some]).numpy().astype(np.float64) for n in (0, 1))
        found = float(run._loss(some))
    losses = []
    for n in range(3):
        others = [m for m in range(3) if m == n or some[m][1] != some[n][1]]  # the same item is no wrong answer
        logits = np.array([q[n] @ p[m] / 0.05 for m in others])
        losses.append(np.log(np.exp(logits).sum()) - q[n] @ p[n] / 0.05)
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_empty_texts_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    odd: list[Any] = ["", None, "  \n", "\x00", "x" * 1_000_000, "😀", *TITLES[:4]]
    report = pretrain(odd, folder, tmp_path / "m", objective=MaskedLM(), optimizer=STEP)
    assert report.counts["empty"] == 4 and report.counts["learned"] == 6
    with pytest.raises(sr.ConfigError, match="too few"):
        pretrain(["", " "], folder, tmp_path / "n", objective=MaskedLM())
    with pytest.raises(sr.ConfigError, match=r"a pair \(query, item\) of texts, got 'red' at 0"):
        pretrain(["red"], folder, tmp_path / "n", objective=InBatch())
    with pytest.raises(sr.ConfigError, match="a text, got 7 at 1"):
        pretrain(["red", 7], folder, tmp_path / "n", objective=SimCSE())  # type: ignore[list-item]
    with pytest.raises(sr.ConfigError, match="no such folder"):
        pretrain(TITLES, tmp_path / "nothing" / "there" / "x", tmp_path / "n", objective=SimCSE())
    for wrong in (lambda: MaskedLM(1.0), lambda: SimCSE(temperature=0.0), lambda: InBatch(pooling="max")):
        with pytest.raises(sr.ConfigError, match="must be"):
            wrong()


def test_memory_that_runs_out_halves(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _Run._loss

    def narrow(self: Any, some: Any) -> Any:
        if len(some) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(self, some)

    monkeypatch.setattr(_Run, "_loss", narrow)
    report = pretrain(TITLES[:8], folder, tmp_path / "m", objective=MaskedLM(), optimizer=AdamW(batch_size=8))
    assert report.counts["halved"] == 2 and report.counts["learned"] == 8
