"""Progressive validation: every served score judged once, since the start and by windows of event time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.evaluators.formulas import Bin
from streamrec.events import Impression
from streamrec.protocols import Metric, NotedMetric

__all__ = ["ProgressiveValidation", "Window", "curves_of", "intervals_of", "values_of"]

_Columns = tuple[NDArray[np.float32], NDArray[np.float32], "NDArray[np.float32] | None"]


@dataclass(frozen=True)
class Window:
    """What the metrics said of one window of event time, `start` to `end` (excluded), in POSIX seconds UTC.

    `count`: the entries of every kind that fell into it. `metrics`: values by name, nan where undefined. `intervals`:
    where those are, with 95 % confidence, that the window is a sample of, for metrics that have one.
    """

    start: float
    end: float
    count: int
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Mixed:
    """The kinds of a call, one for each entry: `names[codes[k]]` is the kind of entry k."""

    names: list[str]
    codes: NDArray[np.int64]

    def __getitem__(self, rows: slice) -> _Mixed:
        return _Mixed(self.names, self.codes[rows])

    def runs(self, wanted: Sequence[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """The entries of the kinds `wanted`, in order, cut where the kind changes."""
        chosen = [code for code, name in enumerate(self.names) if name in wanted]
        if len(chosen) == 1:
            rows = np.flatnonzero(self.codes == chosen[0])
            if rows.size:
                yield self.names[chosen[0]], rows
        elif chosen:
            rows = np.flatnonzero(np.isin(self.codes, chosen))
            for run in np.split(rows, np.flatnonzero(np.diff(self.codes[rows])) + 1):
                if run.size:  # a window may hold none of them
                    yield self.names[self.codes[run[0]]], run


class ProgressiveValidation:
    """Feed `metrics` with served scores and their late labels, since the start and in windows, in one pass.

    `window`: seconds of event time; windows tumble and start at multiples of it. They only go forward: an entry
    from before the open window counts in the open one, so one of them is all that is held. A window that
    ended leaves a `Window` behind; the newest `keep` stay and `dropped_windows` counts the rest. Without a `window`
    there is only the whole. A window into which nothing fell is not listed.

    Cutting a call in two changes no bit of any value, mixed kinds and window ends included.
    Raises `ConfigError` for two metrics of one name.

    >>> from streamrec.evaluators import CTR
    >>> validation = ProgressiveValidation([CTR()], window=60.0)
    >>> scores, times = np.float32([0.5, 0.5, 0.5]), np.array([0.0, 59.0, 60.0])
    >>> validation.update(np.float32([1, 0, 0]), scores, None, times)
    >>> [(window.start, window.metrics["CTR"]) for window in validation.windows()]
    [(0.0, 0.5), (60.0, 0.0)]
    """

    def __init__(self, metrics: Sequence[Metric], *, window: float | None = None, keep: int = 1000) -> None:
        for metric in metrics:
            if isinstance(metric, type) or not isinstance(metric, Metric):
                raise ConfigError(f"metrics must be metric objects such as AUC(), got {metric!r}")
        names = [metric.name for metric in metrics]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two metrics are named {name!r}: keep one, or give them different kinds")
        if window is not None and not 0 < window < math.inf:
            raise ConfigError(f"window must be > 0 seconds of event time, or None, got {window!r}")
        if keep < 0:
            raise ConfigError(f"keep must be >= 0 windows, got {keep!r}")
        self.dropped_windows = 0
        self._names = names
        self._noted = [place for place, metric in enumerate(metrics) if isinstance(metric, NotedMetric)]
        self._window = None if window is None else float(window)
        self._keep = keep
        self._whole = list(metrics)
        self._recent = self._unseen()
        self._open = -math.inf  # the open window's start, in windows; -inf until a finite time has come
        self._count = 0
        self._closed: deque[Window] = deque()

    @property
    def notes(self) -> list[np.dtype[Any]]:
        """What `note` gives: the types of the notes of those metrics that take any, in order."""
        return [metric.notes for metric in self._takers()]

    def note(self, impressions: Sequence[Impression], batch: Batch) -> list[NDArray[Any]]:
        """A note of each of these impressions, which are the rows of `batch`, for each metric that takes notes."""
        return [metric.note(impressions, batch) for metric in self._takers()]

    def _takers(self) -> list[NotedMetric]:
        return [self._whole[place] for place in self._noted]  # type: ignore[misc]  # what `_noted` says

    def update(
        self,
        labels: NDArray[np.float32],
        scores: NDArray[np.float32],
        weights: NDArray[np.float32] | None,
        times: NDArray[np.float64],
        kinds: str | Sequence[str] = "click",
        notes: Sequence[NDArray[Any]] = (),
    ) -> None:
        """Judge served `scores` by `labels`, in order; each metric gets the entries of its kinds.

        `labels`, `scores`, `weights`: float32 `(n,)`, None for weights of 1. `times`: float64 `(n,)`, event times; one
        that is not finite counts in the open window. `kinds`: one for all entries, or `n` of them. `notes`: what `note`
        gave for their impressions, `(n,)` each. Raises `ConfigError` where the lengths differ.
        """
        n = len(scores)
        one_each = n if isinstance(kinds, str) else len(kinds)
        if len(labels) != n or len(times) != n or one_each != n or (weights is not None and len(weights) != n):
            raise ConfigError(
                "labels, scores, weights, times and kinds must be as many: got "
                f"{len(labels)}, {n}, {'None' if weights is None else len(weights)}, {len(times)}, {one_each}"
            )
        if not n:
            return
        entries = _Entries(labels, scores, weights, _tag(kinds), dict(zip(self._noted, notes, strict=True)))
        _feed(self._whole, entries)
        if self._window is None:
            return
        if n == 1 or float(times.max()) / self._window < self._open + 1:  # false for nan
            index = times[0] / self._window
            if index < self._open + 1:
                _feed(self._recent, entries)
                self._count += n
                return
        for first, end, index in self._segments(times / self._window):
            if index > self._open:
                if self._open > -math.inf:
                    self._close()
                self._open = index
            _feed(self._recent, entries.take(slice(first, end)))
            self._count += end - first

    def compute(self) -> dict[str, float]:
        """Each metric's value since the start, by name; nan where undefined."""
        return values_of(self._whole)

    def intervals(self, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
        """Of the metrics since the start that have one, where the value is that the stream is a sample of, by name."""
        return intervals_of(self._whole, confidence)

    def curves(self) -> dict[str, list[Bin]]:
        """What was predicted against what happened since the start, by kind of feedback, of metrics that know it."""
        return curves_of(self._whole)

    def windows(self) -> list[Window]:
        """The windows kept, oldest first, the open one last."""
        return [*self._closed] if self._open == -math.inf else [*self._closed, self._summary()]

    def state_dict(self) -> dict[str, Any]:
        """Everything: the metrics since the start and in the open window, and the windows kept, cut now.

        `windows`: those kept; of each, `values` float64 `(3 + metrics,)`: its start, end, count and the values of
        `metrics`, their names; and `ends`, float64 `(intervals, 2)`, of those named `intervals`.
        """
        windows = [
            {
                "metrics": list(w.metrics),
                "values": np.array([w.start, w.end, w.count, *w.metrics.values()]),
                "intervals": list(w.intervals),
                "ends": np.array([*w.intervals.values()], dtype=np.float64).reshape(-1, 2),
            }
            for w in self._closed
        ]
        return {
            "names": list(self._names),
            "window": self._window,
            "whole": {metric.name: metric.state_dict() for metric in self._whole},
            "recent": {metric.name: metric.state_dict() for metric in self._recent},
            "open": None if self._open == -math.inf else self._open,
            "count": self._count,
            "windows": windows,
            "dropped_windows": self.dropped_windows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` if it has other metrics or another window."""
        names: list[str] = list(state["names"])
        if sorted(names) != sorted(self._names):
            raise ConfigError(f"the state is of the metrics {names}, not of {self._names}: give the same to go on")
        if state["window"] != self._window:
            raise ConfigError(f"the state has windows of {state['window']} s, not of {self._window} s")
        for metrics, part in ((self._whole, state["whole"]), (self._recent, state["recent"])):
            for metric in metrics:
                metric.load_state_dict(part[metric.name])
        self._open = -math.inf if state["open"] is None else float(state["open"])
        self._count = int(state["count"])
        self.dropped_windows = int(state["dropped_windows"])
        self._closed = deque(
            Window(
                *(start, end, int(count), dict(zip(window["metrics"], values, strict=True))),
                {
                    name: (low, high)
                    for name, (low, high) in zip(window["intervals"], np.asarray(window["ends"]).tolist(), strict=True)
                },
            )
            for window in state["windows"]
            for start, end, count, *values in [np.asarray(window["values"]).tolist()]
        )
        self._trim()

    def _segments(self, places: NDArray[np.float64]) -> Iterator[tuple[int, int, float]]:
        """Where the entries of each window begin and end, and which it is. `places`: their times, in windows."""
        index = np.floor(places)
        index[~np.isfinite(index)] = -math.inf
        index = np.maximum.accumulate(np.maximum(index, self._open))
        cuts = np.flatnonzero(index[1:] > index[:-1]) + 1
        for first, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(index)], strict=True):
            yield first, end, float(index[first])

    def _close(self) -> None:
        self._closed.append(self._summary())
        self._trim()
        self._recent = self._unseen()
        self._count = 0

    def _trim(self) -> None:
        while len(self._closed) > self._keep:
            self._closed.popleft()
            self.dropped_windows += 1

    def _summary(self) -> Window:
        length = self._window or math.nan
        values, intervals = values_of(self._recent), intervals_of(self._recent)
        return Window(self._open * length, (self._open + 1) * length, self._count, values, intervals)

    def _unseen(self) -> list[Metric]:
        return [] if self._window is None else [metric.fresh() for metric in self._whole]


def _tag(kinds: str | Sequence[str]) -> str | _Mixed:
    if isinstance(kinds, str):
        return kinds
    codes: dict[str, int] = {}
    tags = np.fromiter((codes.setdefault(kind, len(codes)) for kind in kinds), dtype=np.int64, count=len(kinds))
    names = [str(kind) for kind in codes]
    return names[0] if len(names) == 1 else _Mixed(names, tags)


def values_of(metrics: Sequence[Metric]) -> dict[str, float]:
    """The value of each metric by its name, or all the values, by theirs, of one that gives several."""
    found: dict[str, float] = {}
    for metric in metrics:
        value = metric.compute()
        found.update(value if isinstance(value, Mapping) else {metric.name: value})
    return found


def intervals_of(metrics: Sequence[Metric], confidence: float = 0.95) -> dict[str, tuple[float, float]]:
    """Of each metric that has one, where its value is that the stream is a sample of, by the names of `values_of`."""
    found: dict[str, tuple[float, float]] = {}
    for metric in metrics:
        if hasattr(metric, "interval"):
            ends = metric.interval(confidence)
            several = ends if isinstance(ends, Mapping) else {metric.name: ends}
            found.update({name: ends for name, ends in several.items() if not math.isnan(ends[0])})
    return found


def curves_of(metrics: Sequence[Metric]) -> dict[str, list[Bin]]:
    """What was predicted against what happened, by kind of feedback, of metrics that know it."""
    curves = {metric.kinds[0]: metric.calibration_curve() for metric in metrics if hasattr(metric, "calibration_curve")}
    return {kind: curve for kind, curve in curves.items() if curve}


class _Entries(NamedTuple):
    """What is to be judged. `notes`: by the place of the metric that took them."""

    labels: NDArray[np.float32]
    scores: NDArray[np.float32]
    weights: NDArray[np.float32] | None
    kinds: str | _Mixed
    notes: Mapping[int, NDArray[Any]]

    def take(self, rows: slice) -> _Entries:
        labels, scores, weights = self.columns(rows)
        kinds = self.kinds if isinstance(self.kinds, str) else self.kinds[rows]
        return _Entries(labels, scores, weights, kinds, {place: notes[rows] for place, notes in self.notes.items()})

    def columns(self, rows: slice | NDArray[np.int64]) -> _Columns:
        return self.labels[rows], self.scores[rows], None if self.weights is None else self.weights[rows]


def _feed(metrics: Sequence[Metric], entries: _Entries) -> None:
    kinds, notes = entries.kinds, entries.notes
    if isinstance(kinds, str):
        for place, metric in enumerate(metrics):
            if kinds in metric.kinds:
                _update(metric, entries[:3], kinds, notes.get(place))
        return
    runs: dict[tuple[str, ...], list[tuple[_Columns, str, NDArray[np.int64]]]] = {}
    for place, metric in enumerate(metrics):
        wanted = tuple(metric.kinds)
        if wanted not in runs:  # most metrics want the same kinds: pick their entries once
            runs[wanted] = [(entries.columns(rows), kind, rows) for kind, rows in kinds.runs(wanted)]
        for columns, kind, rows in runs[wanted]:
            _update(metric, columns, kind, notes[place][rows] if place in notes else None)


def _update(metric: Any, columns: _Columns, kind: str, notes: NDArray[Any] | None) -> None:
    if notes is None:
        metric.update(*columns, kind)
    else:
        metric.update(*columns, kind, notes)
