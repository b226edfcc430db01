"""Dense models on real processes: ranks stay equal bit for bit, learn what one process learns, and none is waited for
without an end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.models.tuning import AdamW
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part
from streamrec.testing._state import copy_state, first_difference
from streamrec.trainers import Dense
from tests.adapters.killing import kill_worker
from tests.models.tiny_bert import tiny_bert
from tests.trainers.test_dense import ROWS, SCHEMA, Hybrid, Net, adam, rows_of, shown

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("streamrec.adapters.dask")

fit_dense = dask.fit_dense


@pytest.fixture(name="rows", scope="module")
def _rows(tmp_path_factory: pytest.TempPathFactory) -> sr.EncodedRows:
    uri = str(tmp_path_factory.mktemp("rows"))
    whole = rows_of(shown(600))
    parts = [write_part(uri, f"part-{n}", [whole.take(slice(200 * n, 200 * n + 200))]) for n in range(3)]
    commit_rows(uri, SCHEMA, parts)
    return sr.EncodedRows(uri)


def trainer(store: Path, module: Any = None, accumulate: int = 1, **changed: Any) -> sr.BatchTrainer:
    model = Dense(module or Net(), optimizer=adam, batch_size=48, accumulate=accumulate, clip=1.0)
    settings: dict[str, Any] = {"epochs": 2, "window": 100, "shuffle": True, "validation": 0.2, "patience": 2}
    return sr.BatchTrainer(model=model, store=store, **{**settings, **changed})


def assert_close(one: Any, other: Any) -> None:
    """To rounding: torch may add up in another order in another process."""
    first, second = one.model.module.state_dict(), other.model.module.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", [Net, Hybrid])
def test_ranks_learn_what_one_process_learns(client: Any, rows: sr.EncodedRows, tmp_path: Path, module: Any) -> None:
    together, alone = trainer(tmp_path / "two", module()), trainer(tmp_path / "one", module(), accumulate=2)
    report = fit_dense(client, together, rows, ranks=2)  # which compares the ranks' weights, and raises
    expected = alone.run(rows.only(range(3)))
    assert report.counts["learned"] == expected.counts["learned"] == 960
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-4)
    assert_close(together, alone)
    newest = sr.Store(tmp_path / "two").versions.latest()
    assert newest is not None and newest.number == 1 and len(sr.Store(tmp_path / "two").checkpoints.list()) == 1
    again = trainer(tmp_path / "two", module())
    assert fit_dense(client, again, rows).metrics == report.metrics  # it has ended: it only tells
    state = copy_state(again.model.state_dict())
    assert first_difference(state, copy_state(together.model.state_dict())) is None
    stream = sr.OnlineTrainer(model=again.model)
    assert np.isfinite(stream.push(shown(50, seed=3))).all()


TEXTS = sr.Schema(sr.Text("query"), sr.Text("title"))


def test_ranks_fine_tune_a_bert_as_one_process_does(client: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["red", "blue", "wine", "glass", "bag", "clock"]
    drawn = rng.integers(0, len(words), (120, 2))
    examples = [
        sr.Impression(f"i{n}", 1000.0 + n, "u", "p", {"query": words[one], "title": f"{words[other]} with a heart"})
        for n, (one, other) in enumerate(drawn)
    ]
    labels = (drawn[:, 0] == drawn[:, 1]).astype(np.float32)
    rows = LabeledRows(encode(TEXTS, examples).batch, labels, np.ones_like(labels))
    commit_rows(str(tmp_path), TEXTS, [write_part(str(tmp_path), "part", [rows])])
    folder = tiny_bert(tmp_path / "bert")
    settings: dict[str, Any] = {"epochs": 1, "window": 50, "validation": 0.2}

    def tuned(store: str, **optimizer: Any) -> sr.BatchTrainer:
        steps = AdamW(lr=1e-3, batch_size=32, **optimizer)
        return sr.BatchTrainer(model=sr.BertCTR(TEXTS, folder, optimizer=steps), store=tmp_path / store, **settings)

    together, alone = tuned("two"), tuned("one", micro_batch=16)
    before = copy_state(together.model.state_dict())["weights"]
    # dropout and all: it is drawn for each part of a step, whoever computes it
    report = dask.fit(client, together, str(tmp_path), copies=2)  # which compares the ranks' weights, and raises
    expected = alone.run(sr.EncodedRows(str(tmp_path)))
    assert report.counts["learned"] == expected.counts["learned"] == 96 and together.model.steps == 3
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-3)
    weights = together.model.state_dict()["weights"]
    # the gradient of a key's bias is rounding alone, for softmax takes no note of it, and Adam makes steps of that:
    # some fiftieths of lr; ranks that did not share would be a whole one apart, and more
    for name, value in alone.model.state_dict()["weights"].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    assert first_difference(copy_state(weights), before) is not None


class Trapped(Net):
    """Does something once, in one process, at its so many-th step there."""

    def __init__(self, folder: Path, deed: str, call: int = 3) -> None:
        super().__init__()
        self.folder, self.deed, self.call, self.calls = str(folder), deed, call, 0

    def forward(self, batch: sr.Batch) -> torch.Tensor:
        self.calls += self.training
        with open(f"{self.folder}/calls", "a") as file:
            file.write("x" if self.training else "")
        if self.training and self.calls == self.call:
            try:
                with open(f"{self.folder}/flag", "x"):
                    pass
            except FileExistsError:
                pass
            else:
                self.do()
        return super().forward(batch)

    def do(self) -> None:
        if self.deed == "die":
            kill_worker()
        if self.deed == "raise":
            raise ArithmeticError("this rank cannot count")
        while not os.path.exists(f"{self.folder}/end"):
            time.sleep(0.01)
        raise ValueError


class Own(Net):
    """Keeps something that is another in each process."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("process", torch.zeros(1, dtype=torch.int64))

    def forward(self, batch: sr.Batch) -> torch.Tensor:
        self.process.fill_(os.getpid())
        return super().forward(batch)


def test_a_rank_that_is_killed_goes_on_from_the_checkpoint(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    together = trainer(tmp_path / "two", Trapped(tmp_path, "die", call=14), checkpoint_seconds=1e-9)
    fit_dense(client, together, rows, ranks=2)
    assert (tmp_path / "flag").exists()
    calls = len((tmp_path / "calls").read_text())
    assert 27 < calls < 47  # of two ranks until then 28; the 20 steps from the beginning, by one or two, would be more
    alone = trainer(tmp_path / "one", accumulate=2)
    alone.run(rows.only(range(3)))
    assert_close(together, alone)


def test_what_a_rank_raises_is_raised_here(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    client.wait_for_workers(2, timeout=120)
    with pytest.raises(ArithmeticError, match="this rank cannot count"):
        fit_dense(client, trainer(tmp_path / "two", Trapped(tmp_path, "raise")), rows, ranks=2)


def test_a_rank_that_hangs_is_a_clear_error(
    client: Any, rows: sr.EncodedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamrec.adapters.dask._ranks.GRACE", 1.0)  # nothing but waiting
    client.wait_for_workers(2, timeout=120)
    # it hangs on one of the workers, the first or the other: then nobody can open a meeting, or not all come to it
    clear = r"ranks were lost 2 times, last: a rank is gone, or has not come|nothing was heard of the ranks for 3 s"
    try:
        with pytest.raises(dask.ClusterError, match=clear):
            fit_dense(client, trainer(tmp_path, Trapped(tmp_path, "hang")), rows, ranks=2, restarts=1, timeout=3.0)
    finally:
        (tmp_path / "end").touch()


def test_ranks_that_end_otherwise_are_a_clear_error(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    client.wait_for_workers(2, timeout=120)
    with pytest.raises(dask.ClusterError, match="2 ranks have ended with 2 different models"):
        fit_dense(client, trainer(tmp_path, Own(), epochs=1), rows, ranks=2)


def test_what_dense_training_refuses(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    for given, settings, message in (
        (sr.BatchTrainer(model=sr.FM(SCHEMA), store=tmp_path), {}, "the model must be a Dense or a BertCTR, got a FM"),
        (sr.BatchTrainer(model=Dense(Net(), optimizer=adam)), {}, "give the trainer a store"),
        (trainer(tmp_path), {"ranks": 0}, "ranks must be >= 1"),
        (trainer(tmp_path), {"restarts": -1}, "restarts must be >= 0"),
        (trainer(tmp_path), {"timeout": 0.0}, "timeout must be > 0"),
        (trainer(tmp_path, Net(sr.Schema(sr.Id("user")))), {}, "differs from that of the rows"),
    ):
        with pytest.raises(sr.ConfigError, match=message):
            fit_dense(client, given, rows, **settings)
    assert len(ROWS.labels) == 400
