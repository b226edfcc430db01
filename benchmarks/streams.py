"""The streams that are measured on, as encoded batches with labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import streamrec as sr
from streamrec.batch import Batch
from streamrec.preprocessors import encode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import movielens

__all__ = ["SCHEMA", "Stream", "encoded", "movielens", "zipf"]

SCHEMA = sr.Schema(
    *(sr.Id(name) for name in ("user", "item", "age", "gender", "occupation", "zip", "year", "hour", "weekday")),
    sr.Ids("genres"),
)
"""MovieLens-100K as FACTS has it."""


class Stream(NamedTuple):
    """Rows in time order. Rows of one `group` are scored before any of them is learned."""

    name: str
    schema: sr.Schema
    batch: Batch
    labels: NDArray[np.float32]
    groups: NDArray[np.int64] | None = None


def encoded(examples: Sequence[sr.Labeled], name: str) -> Stream:
    """Labeled examples of the MovieLens schema."""
    batch = encode(SCHEMA, [example.impression for example in examples]).batch
    return Stream(name, SCHEMA, batch, np.array([example.label for example in examples], dtype=np.float32))


def zipf(rows: int = 1_000_000, *, fields: int = 39, ids: int = 1_000_000, even: bool = True, seed: int = 0) -> Stream:
    """A Criteo-like stream: Zipf(1.1) ids in every field, labels from a planted FM of 8 factors.

    `even`: all fields have as many ids; else their numbers rise geometrically from 4, as those of Criteo's fields do,
    by 1.33 from field to field where there are 39. The base rate is near 0.27. Every id's planted weight and vector are
    drawn once; the logit is linear part + pairwise part + constant. Seven tenths of its variance are pairwise: the
    planted probability has an AUC of 0.82, its linear part alone 0.66 to 0.67.

    How much of it can be learned is another matter, and depends on how many ids carry it. With even fields, an FM that
    knew the planted parameters of all ids seen a thousand times in 900,000 rows, and nothing of the others, would have
    an AUC of 0.705 on the 100,000 rows after them.
    """
    rng = np.random.default_rng(seed)
    sizes = np.full(fields, ids // fields)
    if not even:
        sizes = _rising(fields, ids)
    firsts = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    chosen = np.empty((rows, fields), dtype=np.int64)
    for field, (size, first) in enumerate(zip(sizes, firsts, strict=True)):
        ranks = np.arange(1, size + 1, dtype=np.float64) ** -1.1
        edges = np.cumsum(ranks / ranks.sum())
        chosen[:, field] = np.searchsorted(edges, rng.random(rows)).clip(max=size - 1) + first
    weights = rng.normal(size=total).astype(np.float32)
    vectors = rng.normal(size=(total, 8)).astype(np.float32)
    linear, pairs = np.empty(rows), np.empty(rows)
    for start in range(0, rows, 50_000):
        part = chosen[start : start + 50_000]
        linear[start : start + 50_000] = weights[part].sum(axis=1)
        found = vectors[part]  # (rows, fields, 8)
        pairs[start : start + 50_000] = ((found.sum(axis=1) ** 2 - (found**2).sum(axis=1)) / 2).sum(axis=1)
    linear = 0.8 * (linear - linear.mean()) / linear.std()
    pairs = 1.25 * (pairs - pairs.mean()) / pairs.std()
    labels = (rng.random(rows) < 1 / (1 + np.exp(1.35 - linear - pairs))).astype(np.float32)
    hashes = (chosen.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # spread as hashed ids are
    hashes ^= hashes >> np.uint64(29)
    starts = np.arange(rows, dtype=np.int64) * fields
    batch = Batch(
        hashes.reshape(-1).view(np.int64),
        np.ones(rows * fields, dtype=np.float32),
        np.tile(np.arange(fields, dtype=np.int32), rows),
        starts,
        starts + fields,
    )
    return Stream(
        "zipf" if even else "zipf, uneven", sr.Schema(*(sr.Id(f"c{field}") for field in range(fields))), batch, labels
    )


def _rising(fields: int, ids: int, least: int = 4) -> NDArray[np.int64]:
    """int64 `(fields,)`: how many ids each field has, rising geometrically from `least`, `ids` in all or just under."""
    low, high = 1.0, float(ids)
    for _ in range(200):
        factor = (low + high) / 2
        if least * (factor ** np.arange(fields)).sum() > ids:
            high = factor
        else:
            low = factor
    return (least * low ** np.arange(fields)).astype(np.int64)
