"""Ranking and retrieval in one run: `python -m benchmarks.ranking`. One thread each, interleaved; ratios of medians."""

from __future__ import annotations

import gc
import statistics
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import streamrec as sr
from benchmarks._measure import clock, environment, one_thread
from streamrec.models import ranking

SHARED = ("user", *(f"context{n}" for n in range(7)))
OWN = ("item", *(f"feature{n}" for n in range(7)))
DIM = 16


class TorchFM(nn.Module):
    """The FM as it is written in PyTorch: one table of embeddings for all fields, rows already looked up."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.factors = nn.Embedding(rows, DIM)
        self.linear = nn.Embedding(rows, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, rows: Tensor) -> Tensor:  # (n, fields)
        vectors = self.factors(rows)  # (n, fields, dim)
        pairs = (vectors.sum(dim=1) ** 2 - (vectors**2).sum(dim=1)).sum(dim=1) / 2
        return torch.sigmoid(self.bias + self.linear(rows).sum(dim=(1, 2)) + pairs)


def interleaved(calls: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds `(repetitions,)` of each, in turn, after three runs that are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 3):
        for name, call in calls.items():
            start = clock()
            call()
            if repetition >= 3:
                taken[name].append(1000 * (clock() - start))
    return {name: np.array(times) for name, times in taken.items()}


def served(items: int) -> tuple[sr.Scorer, Sequence[sr.Candidate], Mapping[str, str]]:
    """A scorer of 16 fields that has learned of each item, its candidates, and a request's features."""
    rng = np.random.default_rng(0)
    candidates = [
        sr.Candidate(f"p{n}", {name: str(value) for name, value in zip(OWN[1:], row, strict=True)})
        for n, row in enumerate(rng.integers(0, 1000, (items, len(OWN) - 1)).tolist())
    ]
    context = {name: f"{n}" for n, name in enumerate(SHARED[1:])}
    trainer = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(*map(sr.Id, (*SHARED, *OWN))), dim=DIM), store=f"memory://benchmark-ranking-{items}"
    )
    for begin in range(0, items, 4096):
        trainer.push(
            [
                sr.Labeled(
                    sr.Impression("", float(n), f"u{n % 997}", one.item, {**context, **one.features}), float(n % 3 == 0)
                )
                for n, one in enumerate(candidates[begin : begin + 4096], start=begin)
            ]
        )
    trainer.publish()
    assert trainer.store is not None
    return sr.Scorer(trainer.store), candidates, context


def rank(repetitions: int = 1000, items: int = 100_000) -> None:
    """Print p50 and p99 of ranking 1,000 candidates."""
    scorer, candidates, context = served(items)
    chosen = np.random.default_rng(1).choice(items, 1000, replace=False).tolist()
    some = [candidates[place] for place in chosen]
    names = [one.item for one in some]
    scorer.rank(user="u1", candidates=some, features=context)
    scorer.set_catalogue(candidates)
    model = TorchFM(items + 10_000)
    rows = torch.from_numpy(np.random.default_rng(2).integers(0, items + 10_000, (1000, len(SHARED) + len(OWN))))
    gc.freeze()  # a service does so after start: 100,000 candidates are no garbage

    def forward() -> None:
        with torch.inference_mode():
            model(rows)

    uncached = sr.Scorer(scorer.store)
    with one_thread():
        taken = interleaved(
            {
                "PyTorch forward, ids looked up beforehand": forward,
                "Scorer.rank, k=10, names of the catalogue": lambda: scorer.rank(
                    user="u1", candidates=names, features=context, k=10
                ),
                "Scorer.rank, all 1,000, names of the catalogue": lambda: scorer.rank(
                    user="u1", candidates=names, features=context
                ),
            },
            repetitions,
        )
        taken |= interleaved(
            {
                "Scorer.rank, k=10, candidates with 7 features each": lambda: uncached.rank(
                    user="u1", candidates=some, features=context, k=10
                )
            },
            max(repetitions // 10, 10),
        )
    print("Rank 1,000 candidates, 16 fields, dim 16, from texts; the PyTorch forward ends before sorting:\n")
    print("| | p50 ms | p99 ms | times PyTorch |\n|---|---:|---:|---:|")
    base = next(iter(taken.values()))
    for name, times in taken.items():
        p50, p99 = np.percentile(times, [50, 99])
        print(f"| {name} | {p50:.3f} | {p99:.3f} | {np.median(base) / p50:.1f} |")


def retrieve(repetitions: int = 15, items: int = 1_000_000, k: int = 100) -> None:
    """Print the medians and the peak memory of the best 100 of a million."""
    rng = np.random.default_rng(0)
    model = sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=DIM)
    parts = rng.normal(size=(items, DIM + 1)).astype(np.float32)
    apart = np.ascontiguousarray(parts[:, :DIM])  # numpy's product is given the layout it likes best
    own = np.ascontiguousarray(parts[:, DIM])
    shared = rng.normal(size=DIM + 1).astype(np.float32)
    none = np.empty(0, dtype=np.int64)

    def numpy_best() -> NDArray[np.int64]:
        logits = apart @ shared[:DIM]
        logits += own
        best = np.argpartition(logits, -k)[-k:]
        return best[np.argsort(-logits[best], kind="stable")]

    def ours() -> NDArray[np.int64]:
        return ranking.top(model, shared, parts, k, none)[0]

    calls: dict[str, Callable[[], Any]] = {"numpy product and argpartition": numpy_best, "one pass and a heap": ours}
    if not np.array_equal(numpy_best(), ours()):
        raise AssertionError("the two differ")
    taken = interleaved(calls, repetitions)
    print(f"\nRetrieve {k} of {items:,} items, dim 16, exactly:\n")
    print("| | median ms | min to max | peak extra memory, KiB |\n|---|---:|---:|---:|")
    for name, call in calls.items():
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        times = taken[name]
        print(
            f"| {name} | {statistics.median(times):.2f} | {times.min():.2f} to {times.max():.2f} | {peak / 1024:,.0f} |"
        )
    numpy_times, our_times = taken.values()
    print(
        f"\nratio of medians {np.median(numpy_times) / np.median(our_times):.2f}; "
        f"the heap, {12 * k / 1024:.1f} KiB, is numba's and not traced"
    )


def main() -> None:
    print(f"{environment()}\n")
    rank()
    retrieve()


if __name__ == "__main__":
    main()
