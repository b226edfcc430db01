"""The contract of a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.protocols import Metric
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

__all__ = ["check_metric"]

Column = NDArray[np.float32]
Entries = tuple[Column, Column, Column]  # labels, scores, weights


def check_metric(
    make: Callable[[], Metric],
    *,
    reference: Callable[[Column, Column, Column], float] | None = None,
    kinds: Sequence[str] | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Hold a metric to the `Metric` contract, on seeded random streams.

    Cutting a call anywhere changes no bit of the state, merged parts equal the whole, a saved state goes on as the
    original would and is not changed by it, `fresh()` has seen nothing, `compute` changes nothing, the state does not
    grow with the stream, other kinds and the inputs are left alone, and a nan score does not spoil the value.

    `make`: gives a new metric that has seen nothing. `reference`: takes float32 labels, scores and weights, `(n,)`,
    and gives the value for them; only for a metric of one kind, held to an absolute or relative `tolerance`.
    `kinds`: what the metric's `kinds` shall be. Raises `AssertionError` saying which promise is broken.

    >>> from streamrec.evaluators import CTR
    >>> check_metric(CTR, reference=lambda labels, scores, weights: float(np.average(labels, weights=weights)))
    """
    made: object = make()
    if not isinstance(made, Metric):
        missing = [name for name in _MEMBERS if not hasattr(made, name)]
        raise AssertionError(f"{made!r} is not a Metric: it has no {', '.join(missing)}")
    metric: Metric = made
    own = list(metric.kinds)
    if not own or not all(isinstance(kind, str) for kind in own):
        raise AssertionError(f"kinds must name at least one kind, got {metric.kinds!r}")
    if kinds is not None and own != list(kinds):
        raise AssertionError(f"kinds must be {list(kinds)}, got {own}")
    if not isinstance(metric.name, str) or not metric.name:
        raise AssertionError(f"name must be a string that is not empty, got {metric.name!r}")

    _check_empty(make)
    for seed in range(3):
        stream = _stream(np.random.default_rng(seed), own, 300)
        _check_cuts(make, stream)
        _check_merge(make, stream)
        _check_state(make, stream)
    _check_reading(make, own)
    _check_inputs(make, own)
    _check_other_kinds(make, own)
    _check_memory(make, own)
    _check_unusable(make, own)
    if reference is not None:
        if len(own) != 1:
            raise AssertionError(f"reference is for a metric of one kind, this one has {own}")
        _check_reference(make, own[0], reference, tolerance)


_MEMBERS = ("kinds", "name", "update", "compute", "merge", "fresh", "state_dict", "load_state_dict")


def _entries(rng: np.random.Generator, n: int) -> Entries:
    scores = (1 / (1 + np.exp(-rng.normal(-1, 1.5, n)))).astype(np.float32)
    labels = (rng.random(n) < scores).astype(np.float32)
    soft = rng.random(n) < 0.1  # a label may be any probability
    labels[soft] = rng.random(int(soft.sum())).astype(np.float32)
    return labels, scores, rng.gamma(2.0, 0.5, n).astype(np.float32)


def _stream(rng: np.random.Generator, kinds: Sequence[str], n: int) -> list[tuple[str, Entries]]:
    """Calls of 0 to 40 entries, `n` entries or a few more in all."""
    stream: list[tuple[str, Entries]] = []
    while sum(len(entries[0]) for _, entries in stream) < n:
        stream.append((kinds[int(rng.integers(len(kinds)))], _entries(rng, int(rng.integers(41)))))
    return stream


def _feed(metric: Metric, stream: Sequence[tuple[str, Entries]]) -> Metric:
    for kind, (labels, scores, weights) in stream:
        metric.update(labels, scores, weights, kind)
    return metric


def _same(a: object, b: object, promise: str) -> None:
    difference = first_difference(a, b)
    if difference is not None:
        raise AssertionError(f"{promise}: {difference}")


def _check_empty(make: Callable[[], Metric]) -> None:
    empty = make()
    value = empty.compute()
    if not isinstance(value, float):
        raise AssertionError(f"compute() must return a float, got {value!r}")
    if not math.isnan(value):
        raise AssertionError(f"compute() must be nan while nothing has been seen, got {value!r}")
    seen = _feed(make(), _stream(np.random.default_rng(0), list(empty.kinds), 50))
    before = copy_state(seen.state_dict())
    fresh = seen.fresh()
    if fresh is seen:
        raise AssertionError("fresh() must return another metric, not itself")
    _same(fresh.state_dict(), empty.state_dict(), "fresh() must have seen nothing")
    if fresh.name != seen.name or list(fresh.kinds) != list(seen.kinds):
        raise AssertionError(f"fresh() must have the same settings: {fresh.name!r} came from {seen.name!r}")
    _feed(fresh, _stream(np.random.default_rng(1), list(empty.kinds), 50))
    _same(seen.state_dict(), before, "fresh() must share nothing with its origin")


def _check_cuts(make: Callable[[], Metric], stream: Sequence[tuple[str, Entries]]) -> None:
    whole = _feed(make(), stream).state_dict()
    for size in (1, 2, 7, 16):
        cut = make()
        for kind, columns in stream:
            for start in range(0, len(columns[0]), size):
                labels, scores, weights = (column[start : start + size].copy() for column in columns)
                cut.update(labels, scores, weights, kind)
        _same(whole, cut.state_dict(), f"calls cut into pieces of {size} must give the same state, bit for bit")
    # one call of them all, without weights, against one entry at a time: the sums' order shows here most
    kind = stream[0][0]
    labels, scores = (np.concatenate([entries[place] for _, entries in stream]) for place in (0, 1))
    together, apart = make(), make()
    together.update(labels, scores, None, kind)
    for i in range(len(labels)):
        apart.update(labels[i : i + 1].copy(), scores[i : i + 1].copy(), None, kind)
    _same(together.state_dict(), apart.state_dict(), "one call must equal one call an entry, bit for bit")
    ones = make()
    ones.update(labels, scores, np.ones(len(labels), dtype=np.float32), kind)
    _close(together.compute(), ones.compute(), 1e-9, "no weights must equal weights of 1")


def _check_merge(make: Callable[[], Metric], stream: Sequence[tuple[str, Entries]]) -> None:
    whole = _feed(make(), stream).compute()
    for parts in (2, 5):
        first, *others = [_feed(make(), stream[part::parts]) for part in range(parts)]
        before = [copy_state(other.state_dict()) for other in others]
        first.merge(make())
        for other in others:
            first.merge(other)
        _close(first.compute(), whole, 1e-9, f"{parts} parts merged must equal the whole")
        for other, state in zip(others, before, strict=True):
            _same(other.state_dict(), state, "merge must leave the other as it was")


def _check_state(make: Callable[[], Metric], stream: Sequence[tuple[str, Entries]]) -> None:
    half = len(stream) // 2
    metric = _feed(make(), stream[:half])
    state = metric.state_dict()
    check_state_is_plain(state)
    cut = copy_state(state)
    twin = make()
    _feed(twin, stream[:1])  # what it has seen before must go
    twin.load_state_dict(state)
    _same(twin.state_dict(), cut, "load_state_dict(state_dict()) must make a twin of the same state")
    _feed(metric, stream[half:])
    _same(state, cut, "a state is a cut: later updates must not change it")
    _same(twin.state_dict(), cut, "a loaded metric must share nothing with the one the state was cut from")
    _feed(twin, stream[half:])
    _same(state, cut, "loading a state must copy it: updates of the loaded metric changed the state")
    _same(twin.state_dict(), metric.state_dict(), "a loaded metric must go on as the original does, bit for bit")
    _same(twin.compute(), metric.compute(), "a loaded metric must have the value of the original")


def _check_reading(make: Callable[[], Metric], kinds: Sequence[str]) -> None:
    metric = _feed(make(), _stream(np.random.default_rng(3), kinds, 100))
    before = copy_state(metric.state_dict())
    first, second = metric.compute(), metric.compute()
    _same(metric.state_dict(), before, "compute must change nothing")
    _same(first, second, "compute twice must give the same")


def _check_inputs(make: Callable[[], Metric], kinds: Sequence[str]) -> None:
    columns = _entries(np.random.default_rng(4), 50)
    before = [column.copy() for column in columns]
    metric = make()
    metric.update(*columns, kinds[0])
    _same([*columns], before, "update must leave its arguments as they were")
    kept = copy_state(metric.state_dict())
    for column in columns:
        column[:] = 0.5
    _same(metric.state_dict(), kept, "a metric must not hold on to the arguments of update")


def _check_other_kinds(make: Callable[[], Metric], kinds: Sequence[str]) -> None:
    metric = _feed(make(), _stream(np.random.default_rng(5), kinds, 50))
    before = copy_state(metric.state_dict())
    metric.update(*_entries(np.random.default_rng(6), 50), "a kind of nobody")
    _same(metric.state_dict(), before, f"labels of kinds other than {list(kinds)} must be ignored")


def _check_memory(make: Callable[[], Metric], kinds: Sequence[str]) -> None:
    rng = np.random.default_rng(7)
    short = _size(_feed(make(), [(kind, _entries(rng, 1000)) for kind in kinds]).state_dict())
    long = _size(_feed(make(), [(kind, _entries(rng, 1000)) for kind in kinds for _ in range(8)]).state_dict())
    if long > 1.5 * short + 64:
        raise AssertionError(
            f"memory must not grow with the stream: {short} bytes of state after 1,000 entries, {long} after 8,000"
        )


def _check_unusable(make: Callable[[], Metric], kinds: Sequence[str]) -> None:
    rng = np.random.default_rng(8)
    stream = [(kind, _entries(rng, 200)) for kind in kinds]
    clean, spoiled = _feed(make(), stream), make()
    for kind, columns in stream:
        labels, scores, weights = (np.insert(column, 100, column[:1]) for column in columns)
        scores[100] = np.nan
        spoiled.update(labels, scores, weights, kind)
    expected, value = clean.compute(), spoiled.compute()
    if math.isfinite(expected) and not math.isfinite(value):
        raise AssertionError(f"one nan score must not spoil the metric: it is {value!r}, was {expected!r} without")


def _check_reference(
    make: Callable[[], Metric], kind: str, reference: Callable[[Column, Column, Column], float], tolerance: float
) -> None:
    for seed in range(5):
        labels, scores, weights = _entries(np.random.default_rng(100 + seed), 400)
        metric = make()
        metric.update(labels, scores, weights, kind)
        expected = float(reference(labels, scores, weights))
        _close(metric.compute(), expected, tolerance, "the value must be that of the reference")


def _close(value: float, expected: float, tolerance: float, promise: str) -> None:
    both_nan = math.isnan(value) and math.isnan(expected)
    if not both_nan and not math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance):
        raise AssertionError(f"{promise}: got {value!r}, expected {expected!r}")


def _size(value: Any) -> int:
    """Bytes of the leaves of a state."""
    if isinstance(value, Mapping):
        return sum(len(key) + _size(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(map(_size, value))
    if isinstance(value, (str, bytes)):
        return len(value)
    return int(getattr(value, "nbytes", 8))
