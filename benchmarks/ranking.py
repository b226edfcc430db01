"""Ranking and retrieval in one run: `python -m benchmarks.ranking`. Interleaved; ratios of medians.

One thread each, but for the last table, which compares two with one.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

import streamrec as sr
from benchmarks._measure import environment, one_thread
from streamrec.models import ranking
from streamrec.preprocessors import encode

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


class Times(NamedTuple):
    """Milliseconds `(repetitions,)` of the clock on the wall, and of the processor."""

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]


def interleaved(calls: Mapping[str, Callable[[], Any]], repetitions: int, burst: int = 1) -> dict[str, Times]:
    """The times of each, in turn, `burst` calls on end, after three runs that are not counted.

    In bursts each finds the processor's caches as it left them, as in a service that does nothing else.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repetition in range(repetitions + 3):
        for name, call in calls.items():
            for _ in range(burst):
                start, cpu = perf_counter(), process_time()
                call()
                if repetition >= 3:
                    taken[name].append((1000 * (perf_counter() - start), 1000 * (process_time() - cpu)))
    return {name: Times(*np.array(times).T) for name, times in taken.items()}


class Served(NamedTuple):
    """A scorer, its catalogue's candidates, and a request's features."""

    scorer: sr.Scorer
    candidates: Sequence[sr.Candidate]
    context: Mapping[str, str]


def served(items: int = 100_000) -> Served:
    """A scorer of 16 fields that has learned of each item."""
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
                    sr.Impression(f"i{n}", float(n), f"u{n % 997}", one.item, {**context, **one.features}),
                    float(n % 3 == 0),
                )
                for n, one in enumerate(candidates[begin : begin + 4096], start=begin)
            ]
        )
    trainer.publish()
    assert trainer.store is not None and trainer.report().counts["learned"] == items
    scorer = sr.Scorer(trainer.store)
    scorer.set_catalogue(candidates)
    return Served(scorer, candidates, context)


REQUESTS = 64
"""Different ones, in turn: of other items, so that no cache knows them, each with texts of its own, as if decoded."""


def rank(made: Served, repetitions: int = 31) -> None:
    """Print p50 and p99 of ranking 1,000 candidates."""
    scorer, candidates, context = made
    uncached, items = sr.Scorer(scorer.store), len(candidates)
    rng = np.random.default_rng(1)
    chosen = [rng.choice(items, 1000, replace=False).tolist() for _ in range(REQUESTS)]
    names = [[f"p{place}" for place in places] for places in chosen]
    fields = len(SHARED) + len(OWN)
    model = TorchFM(items + 10_000)
    rows = [torch.from_numpy(rng.integers(0, items + 10_000, (1000, fields))) for _ in range(REQUESTS)]
    turns = {
        "torch": cycle(rows),
        "shortlist": cycle([scorer.shortlist(some) for some in names]),
        "names": cycle(names),
        "all": cycle(names),
        "raw": cycle([[candidates[place] for place in places] for places in chosen]),
    }
    gc.collect()
    gc.freeze()  # a service does so after start: 100,000 candidates are no garbage

    def forward() -> None:
        with torch.inference_mode():
            model(next(turns["torch"]))

    def ranked(by: sr.Scorer, what: str, k: int | None) -> Callable[[], Any]:
        return lambda: by.rank(user="u1", candidates=next(turns[what]), features=context, k=k)

    with one_thread():
        taken = interleaved(
            {
                "PyTorch forward, ids looked up beforehand": forward,
                "Scorer.rank, k=10, shortlist: looked up beforehand": ranked(scorer, "shortlist", 10),
                "Scorer.rank, k=10, names of the catalogue": ranked(scorer, "names", 10),
                "Scorer.rank, all 1,000, names of the catalogue": ranked(scorer, "all", None),
            },
            repetitions,
            burst=REQUESTS,
        )
        taken |= interleaved(
            {"Scorer.rank, k=10, candidates with 7 features each": ranked(uncached, "raw", 10)},
            repetitions,
            burst=REQUESTS // 8,
        )
    print("Rank 1,000 candidates, 16 fields, dim 16, from texts; the PyTorch forward ends before sorting:\n")
    print("| | p50 ms | p99 ms | p50 ms of CPU | times PyTorch |\n|---|---:|---:|---:|---:|")
    base = np.median(next(iter(taken.values())).wall)
    for name, (wall, cpu) in taken.items():
        p50, p99 = np.percentile(wall, [50, 99])
        print(f"| {name} | {p50:.3f} | {p99:.3f} | {np.median(cpu):.3f} | {base / p50:.1f} |")
    gc.unfreeze()


def peak(call: Callable[[], Any]) -> float:
    """KiB that Python and numpy take at the most while it runs."""
    tracemalloc.start()
    call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1024


def retrieve(repetitions: int = 31, items: int = 1_000_000, k: int = 100) -> None:
    """Print the medians and the peak memory of the best 100 of a million."""
    rng = np.random.default_rng(0)
    model = sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=DIM)
    parts = rng.normal(size=(items, DIM + 1)).astype(np.float32)
    heavy = rng.standard_t(2, size=(items, DIM + 1)).astype(np.float32)  # of infinite variance: hard on the codes
    apart = np.ascontiguousarray(parts[:, :DIM])  # numpy's product is given the layout it likes best
    own = np.ascontiguousarray(parts[:, DIM])
    shared = rng.normal(size=DIM + 1).astype(np.float32)
    none = np.empty(0, dtype=np.int64)
    codes, heavy_codes = ranking.coded(parts), ranking.coded(heavy)

    def numpy_best() -> NDArray[np.int64]:
        logits = apart @ shared[:DIM]
        logits += own
        best = np.argpartition(logits, -k)[-k:]
        return best[np.argsort(-logits[best], kind="stable")]

    def ours() -> NDArray[np.int64]:
        return ranking.top(model, shared, parts, k, none, codes)[0]

    calls: dict[str, Callable[[], Any]] = {
        "numpy product and argpartition": numpy_best,
        "codes, a heap, and float32 for the best": ours,
        "the same, factors of Student's t with 2 degrees": lambda: ranking.top(
            model, shared, heavy, k, none, heavy_codes
        ),
        "making the codes, once a version": lambda: ranking.coded(parts),
    }
    if not np.array_equal(numpy_best(), ours()):
        raise AssertionError("the two differ")
    with threadpool_limits(1):
        taken = interleaved(calls, repetitions)
        peaks = {name: peak(call) for name, call in calls.items()}
    print(f"\nRetrieve {k} of {items:,} items, dim 16, exactly:\n")
    print("| | median ms | min to max | median ms of CPU | peak extra memory, KiB | times numpy |")
    print("|---|---:|---:|---:|---:|---:|")
    base = np.median(next(iter(taken.values())).wall)
    for name, (wall, cpu) in taken.items():
        print(
            f"| {name} | {np.median(wall):.2f} | {wall.min():.2f} to {wall.max():.2f} | {np.median(cpu):.2f} "
            f"| {peaks[name]:,.0f} | {base / np.median(wall):.2f} |"
        )
    kept = codes.codes.nbytes + codes.steps.nbytes
    own_memory = 12 * k + 4 * ranking.TILE + 4 * (DIM + 1)
    print(
        f"\nThe heap and the scores of a tile, {own_memory / 1024:.1f} KiB, are numba's and not traced. "
        f"The codes are kept: {kept / 2**20:.1f} MiB on top of the parts' {parts.nbytes / 2**20:.1f}."
    )


def threads(made: Served, repetitions: int = 11) -> None:
    """Print by how much two threads are faster than one at the same requests, on the wall."""
    scorer, candidates, context = made
    items = len(candidates)
    some = np.random.default_rng(1).choice(items, 4096, replace=False).tolist()
    shown = [
        sr.Impression("", 0.0, "u1", one.item, {**context, **one.features}) for one in map(candidates.__getitem__, some)
    ]
    batch, model = encode(scorer._serving.model.schema, shown).batch, scorer._serving.model
    names = [f"p{place}" for place in some[:1000]]
    shortlist = scorer.shortlist(names)
    work: dict[str, tuple[int, Callable[[], Any]]] = {
        "FM.predict, 4,096 rows encoded": (40, lambda: model.predict(batch)),
        "Scorer.score, 4,096 impressions": (6, lambda: scorer.score(shown)),
        "Scorer.rank, k=10, 1,000 names": (
            400,
            lambda: scorer.rank(user="u1", candidates=names, features=context, k=10),
        ),
        "Scorer.rank, k=10, shortlist of 1,000": (
            800,
            lambda: scorer.rank(user="u1", candidates=shortlist, features=context, k=10),
        ),
        f"Scorer.retrieve, 100 of {items:,}": (
            200,
            lambda: scorer.retrieve(user="u1", features=context, k=100),
        ),
    }

    def repeated(times: int, call: Callable[[], Any]) -> None:
        for _ in range(times):
            call()

    print("\nThe same requests by two threads, each half of them, and by one; wall time:\n")
    print("| | one thread, ms a request | two threads / one thread |\n|---|---:|---:|")
    with ThreadPoolExecutor(2) as pool, one_thread():
        for name, (times, call) in work.items():

            def by_two(times: int = times, call: Callable[[], Any] = call) -> None:
                list(pool.map(repeated, (times // 2, times // 2), (call, call)))

            taken = interleaved({"one": partial(repeated, times, call), "two": by_two}, repetitions)
            one, two = (np.median(taken[count].wall) for count in ("one", "two"))
            print(f"| {name} | {one / times:.3f} | {one / two:.2f} |")


def main() -> None:
    print(f"{environment()}\n")
    made = served()
    rank(made)
    retrieve()
    threads(made)


if __name__ == "__main__":
    main()
