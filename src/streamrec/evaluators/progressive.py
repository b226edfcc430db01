"""Progressive validation: every served score judged once, since the start and by windows of event time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.protocols import Metric

__all__ = ["ProgressiveValidation", "Window"]

_Run = tuple[NDArray[np.float32], NDArray[np.float32], "NDArray[np.float32] | None", str]


@dataclass(frozen=True)
class Window:
    """What the metrics said of one window of event time, `start` to `end` (excluded), in POSIX seconds UTC.

    `count`: the entries of every kind that fell into it. `metrics`: values by name, nan where undefined.
    """

    start: float
    end: float
    count: int
    metrics: Mapping[str, float]


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
        self._window = None if window is None else float(window)
        self._keep = keep
        self._whole = list(metrics)
        self._recent = self._unseen()
        self._open = -math.inf  # the open window's start, in windows; -inf until a finite time has come
        self._count = 0
        self._closed: deque[Window] = deque()

    def update(
        self,
        labels: NDArray[np.float32],
        scores: NDArray[np.float32],
        weights: NDArray[np.float32] | None,
        times: NDArray[np.float64],
        kinds: str | Sequence[str] = "click",
    ) -> None:
        """Judge served `scores` by `labels`, in order; each metric gets the entries of its kinds.

        `labels`, `scores`, `weights`: float32 `(n,)`, None for weights of 1. `times`: float64 `(n,)`, event times; one
        that is not finite counts in the open window. `kinds`: one for all entries, or `n` of them. Raises
        `ConfigError` where the lengths differ.
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
        tagged = _tag(kinds)
        _feed(self._whole, labels, scores, weights, tagged)
        if self._window is None:
            return
        if n == 1 or float(times.max()) / self._window < self._open + 1:  # false for nan
            index = times[0] / self._window
            if index < self._open + 1:
                _feed(self._recent, labels, scores, weights, tagged)
                self._count += n
                return
        for first, end, index in self._segments(times / self._window):
            if index > self._open:
                if self._open > -math.inf:
                    self._close()
                self._open = index
            rows = slice(first, end)
            kinds_here = tagged if isinstance(tagged, str) else tagged[rows]
            weights_here = None if weights is None else weights[rows]
            _feed(self._recent, labels[rows], scores[rows], weights_here, kinds_here)
            self._count += end - first

    def compute(self) -> dict[str, float]:
        """Each metric's value since the start, by name; nan where undefined."""
        return {metric.name: metric.compute() for metric in self._whole}

    def windows(self) -> list[Window]:
        """The windows kept, oldest first, the open one last."""
        return [*self._closed] if self._open == -math.inf else [*self._closed, self._summary()]

    def state_dict(self) -> dict[str, Any]:
        """Everything: the metrics since the start and in the open window, and the windows kept, cut now.

        `windows`: float64 `(kept, 3 + metrics)`, the columns start, end, count and the values in the order of `names`.
        """
        rows = [[w.start, w.end, float(w.count), *(w.metrics[name] for name in self._names)] for w in self._closed]
        return {
            "names": list(self._names),
            "window": self._window,
            "whole": {metric.name: metric.state_dict() for metric in self._whole},
            "recent": {metric.name: metric.state_dict() for metric in self._recent},
            "open": None if self._open == -math.inf else self._open,
            "count": self._count,
            "windows": np.array(rows, dtype=np.float64).reshape(len(rows), 3 + len(self._names)),
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
            Window(start, end, int(count), dict(zip(names, values, strict=True)))
            for start, end, count, *values in np.asarray(state["windows"]).tolist()
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
        values = {metric.name: metric.compute() for metric in self._recent}
        return Window(self._open * length, (self._open + 1) * length, self._count, values)

    def _unseen(self) -> list[Metric]:
        return [] if self._window is None else [metric.fresh() for metric in self._whole]


def _tag(kinds: str | Sequence[str]) -> str | _Mixed:
    if isinstance(kinds, str):
        return kinds
    codes: dict[str, int] = {}
    tags = np.fromiter((codes.setdefault(kind, len(codes)) for kind in kinds), dtype=np.int64, count=len(kinds))
    names = [str(kind) for kind in codes]
    return names[0] if len(names) == 1 else _Mixed(names, tags)


def _feed(
    metrics: Sequence[Metric],
    labels: NDArray[np.float32],
    scores: NDArray[np.float32],
    weights: NDArray[np.float32] | None,
    kinds: str | _Mixed,
) -> None:
    if isinstance(kinds, str):
        for metric in metrics:
            if kinds in metric.kinds:
                metric.update(labels, scores, weights, kinds)
        return
    runs: dict[tuple[str, ...], list[_Run]] = {}  # most metrics want the same kinds: pick their entries once
    for metric in metrics:
        wanted = tuple(metric.kinds)
        if wanted not in runs:
            runs[wanted] = [
                (labels[rows], scores[rows], None if weights is None else weights[rows], kind)
                for kind, rows in kinds.runs(wanted)
            ]
        for run in runs[wanted]:
            metric.update(*run)
