"""The AUC metric: time per event and error against the exact area, next to River's."""

from __future__ import annotations

import statistics

import numpy as np
from numpy.typing import NDArray
from river import metrics

import streamrec as sr
from benchmarks import _measure


def score_sets(rows: int, seed: int = 0) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Labels and scores: spread ones, and ones that crowd within 0.01."""
    rng = np.random.default_rng(seed)
    spread = 1 / (1 + np.exp(-rng.normal(-1, 1, rows)))
    crowded = 0.30 + 0.01 * rng.random(rows)
    return {
        name: ((rng.random(rows) < np.clip(p + shift, 0, 1)).astype(np.float32), p.astype(np.float32))
        for name, p, shift in (("logits ~ N(-1, 1)", spread, 0.0), ("within 0.30 to 0.31", crowded, 0.0))
    }


def ours(labels: NDArray[np.float32], scores: NDArray[np.float32], size: int) -> tuple[float, float]:
    """Seconds, and the value."""
    metric = sr.AUC()
    metric.update(labels[:size], scores[:size])
    metric = metric.fresh()
    start = _measure.clock()
    for begin in range(0, len(labels), size):
        metric.update(labels[begin : begin + size], scores[begin : begin + size])
    return _measure.clock() - start, metric.compute()


def rivers(labels: NDArray[np.float32], scores: NDArray[np.float32]) -> tuple[float, float]:
    """Seconds, and the value, with 100 thresholds."""
    metric = metrics.ROCAUC(n_thresholds=100)
    pairs = list(zip(labels.astype(bool).tolist(), scores.tolist(), strict=True))
    start = _measure.clock()
    for label, score in pairs:
        metric.update(label, score)
    return _measure.clock() - start, metric.get()


def main(rows: int = 100_000, repetitions: int = 5) -> None:
    """Print a table."""
    print("AUC metric, one thread:\n\n| scores | metric | ns/event | error |\n|---|---|---:|---:|")
    for name, (labels, scores) in score_sets(rows).items():
        exact = _measure.auc(labels, scores)
        for size in (256, 1):
            runs = [ours(labels, scores, size) for _ in range(repetitions)]
            nanoseconds = statistics.median(seconds for seconds, _ in runs) / rows * 1e9
            print(f"| {name} | streamrec, {size} a call | {nanoseconds:,.0f} | {abs(runs[0][1] - exact):.1e} |")
        few = rows // 10
        seconds, value = rivers(labels[:few], scores[:few])
        error = abs(value - _measure.auc(labels[:few], scores[:few]))
        print(f"| {name} | River, 100 thresholds | {seconds / few * 1e9:,.0f} | {error:.1e} |")
    print()


if __name__ == "__main__":
    main()
