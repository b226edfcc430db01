"""Entries to be judged, as the compiled loops want them."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamrec.errors import ConfigError
from streamrec.evaluators._accumulate import Column

__all__ = ["columns", "kind_of", "unequal"]

_FLOAT32 = np.dtype(np.float32)
_ALL_ONE = np.zeros(0, dtype=np.float32)  # what the loops take for "no weights": one compiled form instead of two


def columns(labels: Column, scores: Column, weights: Column | None) -> tuple[Column, Column, Column]:
    """The three as the loops want them. Almost always they are already: then this costs a few attribute reads."""
    if not (type(labels) is np.ndarray and labels.dtype is _FLOAT32 and labels.ndim == 1 and labels.flags.carray):
        labels = _column("labels", labels)
    if not (type(scores) is np.ndarray and scores.dtype is _FLOAT32 and scores.ndim == 1 and scores.flags.carray):
        scores = _column("scores", scores)
    if weights is None:
        return labels, scores, _ALL_ONE
    if not (type(weights) is np.ndarray and weights.dtype is _FLOAT32 and weights.ndim == 1 and weights.flags.carray):
        weights = _column("weights", weights)
    if len(weights) != len(labels):
        raise unequal(labels, scores, weights)
    return labels, scores, weights


def _column(name: str, values: Any) -> Column:
    # a copy, so that a view or a read-only array is not compiled for anew
    with np.errstate(over="ignore"):  # what float32 cannot hold is out of range, and skipped as such
        column = np.array(values, dtype=np.float32, order="C")
    if column.ndim != 1:
        raise ConfigError(f"{name} must have the shape (n,), got {column.shape}")
    return column


def unequal(labels: Column, scores: Column, weights: Column) -> ConfigError:
    given = f", {len(weights)} weights" if weights is not _ALL_ONE else ""
    return ConfigError(
        f"labels, scores and weights must be as many: got {len(labels)} labels, {len(scores)} scores{given}"
    )


def kind_of(argument: str, kind: str) -> str:
    if not isinstance(kind, str) or not kind:
        raise ConfigError(f'{argument} must be a kind of feedback such as "click", got {kind!r}')
    return kind
