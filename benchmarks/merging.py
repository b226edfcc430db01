"""What merging costs in quality: copies of an FM that learn apart, beside one that learns all rows in order.

    python -m benchmarks.merging [rows]

No cluster, for what is measured is not speed: the copies learn one after the other in this process, the rows and the
merges being those of `streamrec.adapters.dask.fit`. The area is that of a tenth more rows, which nobody has learned.
Then what one merge takes of each copy, where each has learned 250,000 rows of 200,000 ids since the last: CPU, and what
it receives, beside what it would if each merged all by itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import numpy as np

import streamrec as sr
from benchmarks._measure import auc, log_loss, one_thread
from benchmarks.streams import Stream, zipf
from streamrec.adapters.dask import _share
from streamrec.adapters.dask._share import Cuts
from streamrec.batch import LabeledRows
from streamrec.models import merging
from streamrec.models.merging import Copy, merge, swapped

__all__ = ["main"]

EPOCHS = 2
APART = 250_000


def learned(
    rows: LabeledRows, schema: sr.Schema, copies: int, apart: int, *, ramp: bool = True, seed: int = 0
) -> Iterator[tuple[sr.FM, float, int]]:
    """The model after each epoch, the CPU seconds that one copy has merged for by then, and the merges."""
    models = [sr.FM(schema, dim=16, seed=seed) for _ in range(copies)]
    apart_models = [Copy(model) for model in models]
    cuts = Cuts(len(rows.labels), copies, apart, apart)
    seconds, merges = 0.0, 0
    for epoch in range(EPOCHS):
        for number in range(cuts.rounds):
            steps = cuts.steps(number, first=ramp and epoch == 0)
            for begin, end in pairwise(steps):
                for copy, model in enumerate(models):
                    first, last = cuts.part(number, copy)
                    model.learn(*rows.take(slice(min(first + begin, last), min(first + end, last))))
                if copies > 1:
                    start = time.process_time()
                    merge(apart_models)
                    seconds += (time.process_time() - start) / copies
                    merges += 1
        yield models[0], seconds, merges


def cost(stream: Stream, copies: int, apart: int) -> str:
    """Of the second merge of so many copies, one that has memory already: a row of the table."""
    ones = np.ones(len(stream.labels), dtype=np.float32)
    whole = LabeledRows(stream.batch, stream.labels, ones)
    models = [sr.FM(stream.schema, dim=16) for _ in range(copies)]
    parted = [Copy(model) for model in models]
    for merge_number in range(2):
        for copy, model in enumerate(models):
            begin = (merge_number * copies + copy) * apart
            model.learn(*whole.take(slice(begin, begin + apart)))
        if not merge_number:
            merge(parted)
    start = time.process_time()
    parts = [one.changes() for one in parted]
    merges = [one.merge(parts, number) for number, one in enumerate(parted)]
    seconds, came, received = time.process_time() - start, [None] * copies, 0
    for _ in range(2):  # both swaps
        start = time.process_time()
        swaps = [one.send(rows) for one, rows in zip(merges, came, strict=True)]  # type: ignore[arg-type]
        seconds += time.process_time() - start
        came = swapped(swaps)  # type: ignore[assignment]
        received += sum(rows.nbytes for some in swaps for rows in some.give)
    start = time.process_time()
    for one, rows in zip(merges, came, strict=True):
        with suppress(StopIteration):
            one.send(rows)  # type: ignore[arg-type]
    seconds += time.process_time() - start
    row = models[0]._table.array[0].nbytes
    small = sum(array.nbytes for part in parts for array in part.values()) * (copies - 1)
    all_of_all = sum(len(part["ids"]) for part in parts) * row * (copies - 1)
    mib = [(small + rows) / copies / 2**20 for rows in (received, all_of_all)]
    return (
        f"| {copies} | {len(models[0].ids):,} | {1e3 * seconds / copies:.0f} ms | {mib[0]:.0f} MiB | {mib[1]:.0f} MiB |"
    )


def main(count: int = 400_000) -> None:
    """Print the area and the log loss after each epoch."""
    stream = zipf(count + count // 10, fields=10, ids=50_000, even=False)
    ones = np.ones(len(stream.labels), dtype=np.float32)
    whole = LabeledRows(stream.batch, stream.labels, ones)
    rows, test = whole.take(slice(0, count)), whole.take(slice(count, len(ones)))
    trust = merging.TRUST

    def show(name: str, copies: int, apart: int, *, ramp: bool = True, seed: int = 0) -> None:
        found, seconds, merges = [], 0.0, 0
        for model, seconds, merges in learned(rows, stream.schema, copies, apart, ramp=ramp, seed=seed):  # noqa: B007
            scores = model.predict(test.batch)
            found.append(f"{auc(test.labels, scores):.4f} / {log_loss(test.labels, scores):.4f}")
        cost = f"{1e3 * seconds / merges:.0f} ms x {merges}" if merges else ""
        print(f"| {name} | {' | '.join(found)} | {cost} |", flush=True)

    print(f"\n{count:,} rows of ten fields, dim 16, AUC / log loss after each epoch\n")
    print("| | first | second | a merge, CPU |\n| --- | ---: | ---: | ---: |")
    with one_thread():
        for seed in range(3):
            show(f"one process, seed {seed}", 1, count, seed=seed)
        for copies in (2, 4, 8):
            for apart in (6_250, 25_000):
                show(f"{copies} copies, {apart:,} rows apart", copies, apart)
            most, _share.COPIES_A_ROUND = _share.COPIES_A_ROUND, copies
            show(f"{copies} copies, once an epoch after the first", copies, count)
            _share.COPIES_A_ROUND = most
        show("2 copies, 25,000 apart, no short rounds at first", 2, 25_000, ramp=False)
        show("4 copies, 25,000 apart, no short rounds at first", 4, 25_000, ramp=False)
        try:
            merging.TRUST = np.zeros(2, dtype=np.float32)
            show("2 copies, 25,000 apart, the steps alone", 2, 25_000)
            show("4 copies, 25,000 apart, the steps alone", 4, 25_000)
            merging.TRUST = np.full(2, 1e9, dtype=np.float32)
            show("2 copies, 25,000 apart, means", 2, 25_000)
            show("4 copies, 25,000 apart, means", 4, 25_000)
        finally:
            merging.TRUST = trust
        print("\n| copies | ids | CPU of each | received | if each merged all |\n| ---: | ---: | ---: | ---: | ---: |")
        wide = zipf(2 * 8 * APART, fields=10, ids=200_000, even=False)
        for copies in (2, 4, 8):
            print(cost(wide, copies, APART), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
