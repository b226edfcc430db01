"""The contract of a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.protocols import Metric, NotedMetric
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

__all__ = ["check_metric"]

Column = NDArray[np.float32]
Entries = list[NDArray[Any]]  # labels, scores, weights; and the notes of a metric that takes any
Draw = Callable[[np.random.Generator, int], Entries]


def check_metric(
    make: Callable[[], Metric],
    *,
    reference: Callable[..., float] | None = None,
    kinds: Sequence[str] | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Hold a metric to the `Metric` contract, or to that of a `NotedMetric`, on seeded random streams.

    Cutting a call anywhere changes no bit of the state, merged parts equal the whole, a saved state goes on as the
    original would and is not changed by it, `fresh()` has seen nothing, `compute` changes nothing, the state does not
    grow with the stream, other kinds and the inputs are left alone, and a nan score does not spoil the value. A metric
    that takes notes is shown impressions of 30 users and 50 items with a feature `request`, and without one now and
    then; what it notes of some does not depend on the others, nor on what was judged.

    `make`: gives a new metric that has seen nothing. `reference`: takes float32 labels, scores and weights, `(n,)`,
    and gives the value for them; only for a metric of one kind, held to an absolute or relative `tolerance`; of a
    `NotedMetric` it takes the notes, too.
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

    draw: Draw = _noted(make) if isinstance(made, NotedMetric) else _entries
    _check_empty(make, draw)
    for seed in range(3):
        stream = _stream(draw, np.random.default_rng(seed), own, 300)
        _check_cuts(make, stream)
        _check_merge(make, stream)
        _check_state(make, stream)
    _check_reading(make, own, draw)
    _check_inputs(make, own, draw)
    _check_other_kinds(make, own, draw)
    _check_memory(make, own, draw)
    _check_unusable(make, own, draw)
    if isinstance(made, NotedMetric):
        _check_notes(make, own, draw)
    if reference is not None:
        if len(own) != 1:
            raise AssertionError(f"reference is for a metric of one kind, this one has {own}")
        _check_reference(make, own[0], draw, reference, tolerance)


_MEMBERS = ("kinds", "name", "update", "compute", "merge", "fresh", "state_dict", "load_state_dict")


def _entries(rng: np.random.Generator, n: int) -> Entries:
    scores = (1 / (1 + np.exp(-rng.normal(-1, 1.5, n)))).astype(np.float32)
    labels = (rng.random(n) < scores).astype(np.float32)
    soft = rng.random(n) < 0.1  # a label may be any probability
    labels[soft] = rng.random(int(soft.sum())).astype(np.float32)
    return [labels, scores, rng.gamma(2.0, 0.5, n).astype(np.float32)]


def _impressions(rng: np.random.Generator, n: int) -> list[Impression]:
    users, items, requests = rng.integers(30, size=n), rng.integers(50, size=n), rng.integers(12, size=n)
    return [
        Impression(f"i{k}", float(k), f"u{user}", f"p{item}", {"request": f"r{request}"} if request else {})
        for k, (user, item, request) in enumerate(zip(users.tolist(), items.tolist(), requests.tolist(), strict=True))
    ]


def _blank(rows: int) -> Batch:
    """Rows in which nothing is encoded."""
    none = np.empty(0, dtype=np.int64)
    ends = np.zeros(rows, dtype=np.int64)
    return Batch(
        none, none.astype(np.float32), none.astype(np.int32), ends, ends, times=np.arange(rows, dtype=np.float64)
    )


def _noted(make: Callable[[], Metric]) -> Draw:
    def draw(rng: np.random.Generator, n: int) -> Entries:
        metric = make()
        assert isinstance(metric, NotedMetric)
        return [*_entries(rng, n), metric.note(_impressions(rng, n), _blank(n))]

    return draw


def _update(metric: Any, columns: Entries, kind: str) -> None:
    metric.update(*columns[:3], kind, *columns[3:])


def _stream(draw: Draw, rng: np.random.Generator, kinds: Sequence[str], n: int) -> list[tuple[str, Entries]]:
    """Calls of 0 to 40 entries, `n` entries or a few more in all."""
    stream: list[tuple[str, Entries]] = []
    while sum(len(entries[0]) for _, entries in stream) < n:
        stream.append((kinds[int(rng.integers(len(kinds)))], draw(rng, int(rng.integers(41)))))
    return stream


def _feed(metric: Metric, stream: Sequence[tuple[str, Entries]]) -> Metric:
    for kind, columns in stream:
        _update(metric, columns, kind)
    return metric


def _same(a: object, b: object, promise: str) -> None:
    difference = first_difference(a, b)
    if difference is not None:
        raise AssertionError(f"{promise}: {difference}")


def _values(metric: Metric) -> dict[str, float]:
    value: Any = metric.compute()
    return dict(value) if isinstance(metric, NotedMetric) and isinstance(value, Mapping) else {metric.name: value}


def _check_empty(make: Callable[[], Metric], draw: Draw) -> None:
    empty = make()
    for value in _values(empty).values():
        if not isinstance(value, float):
            raise AssertionError(f"compute() must return a float, got {value!r}")
        if not math.isnan(value):
            raise AssertionError(f"compute() must be nan while nothing has been seen, got {value!r}")
    seen = _feed(make(), _stream(draw, np.random.default_rng(0), list(empty.kinds), 50))
    before = copy_state(seen.state_dict())
    fresh = seen.fresh()
    if fresh is seen:
        raise AssertionError("fresh() must return another metric, not itself")
    _same(fresh.state_dict(), empty.state_dict(), "fresh() must have seen nothing")
    if fresh.name != seen.name or list(fresh.kinds) != list(seen.kinds):
        raise AssertionError(f"fresh() must have the same settings: {fresh.name!r} came from {seen.name!r}")
    _feed(fresh, _stream(draw, np.random.default_rng(1), list(empty.kinds), 50))
    _same(seen.state_dict(), before, "fresh() must share nothing with its origin")


def _check_cuts(make: Callable[[], Metric], stream: Sequence[tuple[str, Entries]]) -> None:
    whole = _feed(make(), stream).state_dict()
    for size in (1, 2, 7, 16):
        cut = make()
        for kind, columns in stream:
            for start in range(0, len(columns[0]), size):
                _update(cut, [column[start : start + size].copy() for column in columns], kind)
        _same(whole, cut.state_dict(), f"calls cut into pieces of {size} must give the same state, bit for bit")
    # one call of them all, without weights, against one entry at a time: the sums' order shows here most
    kind = stream[0][0]
    places = range(len(stream[0][1]))
    labels, scores, _, *notes = (np.concatenate([entries[place] for _, entries in stream]) for place in places)
    together, apart = make(), make()
    together.update(labels, scores, None, kind, *notes)
    for i in range(len(labels)):
        one = slice(i, i + 1)
        apart.update(labels[one].copy(), scores[one].copy(), None, kind, *[column[one].copy() for column in notes])
    _same(together.state_dict(), apart.state_dict(), "one call must equal one call an entry, bit for bit")
    ones = make()
    ones.update(labels, scores, np.ones(len(labels), dtype=np.float32), kind, *notes)
    _close(together, ones, 1e-9, "no weights must equal weights of 1")


def _check_merge(make: Callable[[], Metric], stream: Sequence[tuple[str, Entries]]) -> None:
    whole = _feed(make(), stream)
    for parts in (2, 5):
        first, *others = [_feed(make(), stream[part::parts]) for part in range(parts)]
        before = [copy_state(other.state_dict()) for other in others]
        first.merge(make())
        for other in others:
            first.merge(other)
        _close(first, whole, 1e-9, f"{parts} parts merged must equal the whole")
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


def _check_reading(make: Callable[[], Metric], kinds: Sequence[str], draw: Draw) -> None:
    metric = _feed(make(), _stream(draw, np.random.default_rng(3), kinds, 100))
    before = copy_state(metric.state_dict())
    first, second = metric.compute(), metric.compute()
    _same(metric.state_dict(), before, "compute must change nothing")
    _same(first, second, "compute twice must give the same")


def _check_inputs(make: Callable[[], Metric], kinds: Sequence[str], draw: Draw) -> None:
    columns = draw(np.random.default_rng(4), 50)
    before = [column.copy() for column in columns]
    metric = make()
    _update(metric, columns, kinds[0])
    _same([*columns], before, "update must leave its arguments as they were")
    kept = copy_state(metric.state_dict())
    for column in columns[:3]:
        column[:] = 0.5
    for column in columns[3:]:
        column[:] = column[::-1].copy()
    _same(metric.state_dict(), kept, "a metric must not hold on to the arguments of update")


def _check_other_kinds(make: Callable[[], Metric], kinds: Sequence[str], draw: Draw) -> None:
    metric = _feed(make(), _stream(draw, np.random.default_rng(5), kinds, 50))
    before = copy_state(metric.state_dict())
    _update(metric, draw(np.random.default_rng(6), 50), "a kind of nobody")
    _same(metric.state_dict(), before, f"labels of kinds other than {list(kinds)} must be ignored")


def _check_memory(make: Callable[[], Metric], kinds: Sequence[str], draw: Draw) -> None:
    rng = np.random.default_rng(7)
    short = _size(_feed(make(), [(kind, draw(rng, 1000)) for kind in kinds]).state_dict())
    long = _size(_feed(make(), [(kind, draw(rng, 1000)) for kind in kinds for _ in range(8)]).state_dict())
    if long > 1.5 * short + 64:
        raise AssertionError(
            f"memory must not grow with the stream: {short} bytes of state after 1,000 entries, {long} after 8,000"
        )


def _check_unusable(make: Callable[[], Metric], kinds: Sequence[str], draw: Draw) -> None:
    rng = np.random.default_rng(8)
    stream = [(kind, draw(rng, 200)) for kind in kinds]
    clean, spoiled = _feed(make(), stream), make()
    for kind, columns in stream:
        more = [np.insert(column, 100, column[:1]) for column in columns]
        more[1][100] = np.nan
        _update(spoiled, more, kind)
    values = _values(spoiled)
    for name, expected in _values(clean).items():
        if math.isfinite(expected) and not math.isfinite(values[name]):
            raise AssertionError(f"one nan score must not spoil {name}: it is {values[name]!r}, was {expected!r}")


def _check_notes(make: Callable[[], Metric], kinds: Sequence[str], draw: Draw) -> None:
    shown = _impressions(np.random.default_rng(9), 60)
    before, metric = make(), _feed(make(), _stream(draw, np.random.default_rng(10), kinds, 200))
    assert isinstance(before, NotedMetric) and isinstance(metric, NotedMetric)
    state = copy_state(metric.state_dict())
    together = metric.note(shown, _blank(60))
    if together.dtype != metric.notes or together.shape != (60,):
        raise AssertionError(
            f"note must give one {metric.notes} for each of 60 impressions, got {together.dtype} {together.shape}"
        )
    _same(metric.state_dict(), state, "note must change nothing")
    for size in (1, 7, 60):
        for start in range(0, 60, size):
            part = before.note(shown[start : start + size], _blank(60).take(slice(start, start + size)))
            if part.tobytes() != together[start : start + size].tobytes():
                raise AssertionError(
                    "a note must depend on its impression alone, neither on those beside it nor on what was judged"
                )
    if metric.note([], _blank(0)).shape != (0,):
        raise AssertionError("note must give no notes of no impressions")


def _check_reference(
    make: Callable[[], Metric], kind: str, draw: Draw, reference: Callable[..., float], tolerance: float
) -> None:
    for seed in range(5):
        columns = draw(np.random.default_rng(100 + seed), 400)
        metric = make()
        _update(metric, columns, kind)
        expected = float(reference(*columns))
        if not _near(metric.compute(), expected, tolerance):
            raise AssertionError(f"the value must be that of the reference: got {metric.compute()!r}, not {expected!r}")


def _close(metric: Metric, other: Metric, tolerance: float, promise: str) -> None:
    values, expected = _values(metric), _values(other)
    if sorted(values) != sorted(expected):
        raise AssertionError(f"{promise}: got the values {sorted(values)}, expected {sorted(expected)}")
    for name, value in values.items():
        if not _near(value, expected[name], tolerance):
            raise AssertionError(f"{promise}: got {value!r}, expected {expected[name]!r}")


def _near(value: float, expected: float, tolerance: float) -> bool:
    both_nan = math.isnan(value) and math.isnan(expected)
    return both_nan or math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)


def _size(value: Any) -> int:
    """Bytes of the leaves of a state."""
    if isinstance(value, Mapping):
        return sum(len(key) + _size(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(map(_size, value))
    if isinstance(value, (str, bytes)):
        return len(value)
    return int(getattr(value, "nbytes", 8))
