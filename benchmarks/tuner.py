"""The tuner: what eight learners cost beside one, and where it comes to from a learning rate that is ten times wrong.

    python -m benchmarks.tuner [--rows N] [--repetitions N] [--part cost|quality]

Cost: `OnlineTrainer` over events with their labels, one thread, CPU seconds, medians of interleaved runs; and the same
rows encoded beforehand, where nothing is shared but the stream itself. Quality: progressive AUC, labels without delay,
of all rows and of the last quarter, beside the best of fixed settings on the very grid that it searches, and the best
by the last quarter alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from time import process_time

import numpy as np
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import auc, environment, one_thread
from benchmarks.defaults import progressive
from benchmarks.streams import SCHEMA, Stream, encoded, movielens, zipf
from streamrec.models import Real
from streamrec.protocols import LEARN, SCORE
from streamrec.trainers.tuner import LOOK

SPACE = {"optimizer.lr": Real(1e-4, 10.0, log=True), "linear_optimizer.lr": Real(1e-4, 10.0, log=True)}
GRID = [10**power for power in (-1.0, -0.5, 0.0, 0.5, 1.0)]
LR, LINEAR = 0.05, 0.2


def model_of(schema: sr.Schema, factor: float = 1.0, linear: float | None = None) -> sr.FM:
    """The default FM, its two learning rates multiplied by these."""
    other = factor if linear is None else linear
    rules = sr.Adagrad(lr=LR * factor, eps=0.1), sr.FTRL(lr=LINEAR * other)
    return sr.FM(schema, dim=16, optimizer=rules[0], linear_optimizer=rules[1])


def tuned(tuner: sr.Tuner, stream: Stream) -> NDArray[np.float32]:
    """The scores that were served, as in an `OnlineTrainer`."""
    found, count = [], len(stream.labels)
    for begin in range(0, count, LOOK):
        rows = np.arange(begin, min(begin + LOOK, count), dtype=np.int64)
        ops, ones = np.full(len(rows), SCORE | LEARN, dtype=np.int8), np.ones(len(rows), dtype=np.float32)
        scores = tuner.steps(stream.batch, rows, ops, stream.labels[rows], ones)
        found.append(tuner.served(scores))
        tuner.judge(stream.labels[rows], ones, tuner.noted(scores))
        tuner.turn()
    return np.concatenate(found)


def told(stream: Stream, scores: NDArray[np.float32]) -> tuple[float, float]:
    """AUC of all rows, and of the last quarter."""
    late = len(scores) * 3 // 4
    return auc(stream.labels, scores), auc(stream.labels[late:], scores[late:])


def quality(stream: Stream, searches: int) -> None:
    print(f"\n{stream.name}: {len(stream.labels):,} rows{'':24}  AUC   last quarter", flush=True)
    fixed = {}
    for factor, linear in product(GRID, GRID):
        fixed[factor, linear] = told(stream, progressive(model_of(stream.schema, factor, linear), stream))
    for name, place in (("best fixed one, by all rows", 0), ("best fixed one, by the last quarter", 1)):
        best = max(fixed, key=lambda one: fixed[one][place])
        settings = f"lr={LR * best[0]:.3g}, linear {LINEAR * best[1]:.3g}"
        print(f"  {name:36} {fixed[best][0]:.4f}  {fixed[best][1]:.4f}   {settings}", flush=True)
    for factor, name in ((0.1, "ten times too small"), (10.0, "ten times too large")):
        best = max(fixed, key=lambda one: fixed[one][0])
        start = model_of(stream.schema, factor * best[0], factor * best[1])
        alone = told(stream, progressive(model_of(stream.schema, factor * best[0], factor * best[1]), stream))
        print(f"  {'fixed, ' + name:36} {alone[0]:.4f}  {alone[1]:.4f}", flush=True)
        for seed in range(searches):
            start = model_of(stream.schema, factor * best[0], factor * best[1])
            tuner = sr.Tuner(start, SPACE, learners=8, seed=seed)
            found = told(stream, tuned(tuner, stream))
            rates = f"lr={tuner.best['optimizer.lr']:.3g}, linear {tuner.best['linear_optimizer.lr']:.3g}"
            line = f"tuner, {name}, seed {seed}"
            print(f"  {line:36} {found[0]:.4f}  {found[1]:.4f}   {rates}, {tuner.rungs} rungs", flush=True)


def events(stream: Stream) -> list[sr.Labeled]:
    """The rows of a stream of ids as events."""
    ids = stream.batch.ids.reshape(len(stream.labels), -1).tolist()
    names = stream.schema.names
    return [
        sr.Labeled(
            sr.Impression(f"i{row}", float(row), "u", "p", dict(zip(names, map(str, values), strict=True))), label
        )
        for row, (values, label) in enumerate(zip(ids, stream.labels.tolist(), strict=True))
    ]


def timed(model: Callable[[], sr.FM | sr.Tuner], stream: list[sr.Labeled]) -> float:
    trainer = sr.OnlineTrainer(model=model(), metrics=[sr.AUC(), sr.NormalizedEntropy()])
    begun = process_time()
    for begin in range(0, len(stream), 256):
        trainer.push(stream[begin : begin + 256])
    return process_time() - begun


def alone(model: Callable[[], sr.FM | sr.Tuner], stream: Stream) -> float:
    made = model()
    begun = process_time()
    if isinstance(made, sr.Tuner):
        tuned(made, stream)
    else:
        for begin in range(0, len(stream.labels), LOOK):
            rows = np.arange(begin, min(begin + LOOK, len(stream.labels)), dtype=np.int64)
            ones = np.ones(len(rows), dtype=np.float32)
            made.step(stream.batch, rows, np.full(len(rows), SCORE | LEARN, np.int8), stream.labels[rows], ones)
    return process_time() - begun


def cost(streams: Iterator[tuple[str, sr.Schema, list[sr.Labeled], Stream]], repetitions: int) -> None:
    print("\nCPU seconds: one learner, eight in a tuner, times as long")
    for name, schema, items, rows in streams:
        one = lambda schema=schema: model_of(schema)  # noqa: E731
        eight = lambda schema=schema: sr.Tuner(model_of(schema), SPACE, learners=8)  # noqa: E731
        timed(one, items[:2000]), timed(eight, items[:6000])
        for what, run, data in (("from events", timed, items), ("encoded beforehand", alone, rows)):
            found = [(run(one, data), run(eight, data)) for _ in range(repetitions)]
            first, second = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"  {name + ', ' + what:44} {first:6.2f} {second:6.2f} {second / first:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the Criteo-like stream, for quality")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--part", choices=("cost", "quality"))
    given = parser.parse_args()
    one_thread()
    print(environment())
    labeled = movielens.load().labeled
    lens = encoded(labeled, "MovieLens-100K")
    if given.part != "quality":

        def streams() -> Iterator[tuple[str, sr.Schema, list[sr.Labeled], Stream]]:
            yield "MovieLens-100K", SCHEMA, list(labeled), lens
            rows = zipf(50_000, ids=given.rows)
            yield "Criteo-like", rows.schema, events(rows), rows

        cost(streams(), given.repetitions)
    if given.part != "cost":
        quality(lens, 8)
        quality(zipf(given.rows), 3)


if __name__ == "__main__":
    main()
