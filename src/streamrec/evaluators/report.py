"""Report: how a run went, to read in a terminal or a browser, to plot, or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from streamrec.evaluators.formulas import Bin
from streamrec.evaluators.page import page_of
from streamrec.evaluators.progressive import Window

__all__ = ["Report"]

_EVEN_IF_ZERO = ("events", "learned", "pending")


@dataclass(frozen=True)
class Report:
    """What the metrics say of a run, and what became of its events.

    `metrics`: values by name. `counts`: events in, learned, pending, dropped by reason. `windows`: the metrics
    over event time. `seconds`: wall clock of the run, 0 if not measured. `interrupted`: whether it was stopped early.
    `intervals`: where the values are that the stream is a sample of, with 95 % confidence, for metrics that have one.
    `curves`: what was predicted against what happened, by kind of feedback, where there is an `AUC` of it.

    >>> print(Report({"AUC": 0.76186, "CTR": 0.0412}, {"events": 100000, "learned": 99876, "late": 124}, seconds=2.5))
    AUC       0.7619
    CTR       0.0412
    <BLANKLINE>
    events   100,000
    learned   99,876
    late         124
    <BLANKLINE>
    2.5 s, 40,000 events/s
    """

    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    windows: Sequence[Window] = ()
    seconds: float = 0.0
    interrupted: bool = False
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Bin]] = field(default_factory=dict)

    def __str__(self) -> str:
        metrics = {name: _measure(value) for name, value in self.metrics.items()}
        counts = {name: f"{n:,}" for name, n in self.counts.items() if n or name in _EVEN_IF_ZERO}
        left = max(map(len, [*metrics, *counts]), default=0)
        right = max(map(len, [*metrics.values(), *counts.values()]), default=0)
        tables = (
            "\n".join(f"{name:<{left}}  {value:>{right}}{self._interval(name)}" for name, value in t.items())
            for t in (metrics, counts)
        )
        return "\n\n".join(part for part in (*tables, ", ".join(self._pace())) if part)

    def _interval(self, name: str) -> str:
        if name not in self.intervals:
            return ""
        low, high = self.intervals[name]
        return f"  ({_measure(low)} to {_measure(high)})"

    def to_json(self) -> str:
        """All of it as JSON; a metric that is undefined is null.

        >>> print(Report({"AUC": math.nan}, {"events": 0}).to_json())
        {"metrics": {"AUC": null}, "counts": {"events": 0}, "windows": [], "intervals": {}, "curves": {},
         "seconds": 0.0, "interrupted": false}
        """
        windows = [
            {
                "start": one.start,
                "end": one.end,
                "count": one.count,
                "metrics": _plain(one.metrics),
                "intervals": _ends(one.intervals),
            }
            for one in self.windows
        ]
        whole = {
            "metrics": _plain(self.metrics),
            "counts": dict(self.counts),
            "windows": windows,
            "intervals": _ends(self.intervals),
            "curves": {kind: [one._asdict() for one in curve] for kind, curve in self.curves.items()},
        }
        return json.dumps({**whole, "seconds": self.seconds, "interrupted": self.interrupted}, allow_nan=False)

    def to_html(self, *, title: str = "Progressive validation", decisions: Sequence[Any] = ()) -> str:
        """One page that loads nothing: the numbers, each metric over the windows as a picture, and what was predicted
        against what happened.

        `decisions`: what was served and why, of `store.served.history()`.

        >>> "<h1>CTR &amp; more</h1>" in Report({"AUC": 0.7}, {"events": 3}).to_html(title="CTR & more")
        True
        """
        pace = ", ".join(self._pace())
        whole = self.metrics, self.counts, self.windows, decisions, pace, self.intervals, self.curves
        return page_of(title, *whole)

    def plot(self, path: str | PathLike[str], **options: Any) -> None:
        """Draw the windows into the file `path`; `options` are those of `streamrec.evaluators.plot.plot_windows`.

        Needs matplotlib: `pip install "streamrec[plot]"`. Raises `ConfigError` where no window can be drawn.
        """
        from streamrec.evaluators.plot import plot_windows  # matplotlib is an extra

        plot_windows({"": self}, path, **options)

    def _pace(self) -> list[str]:
        said = []
        if self.seconds > 0:
            said.append(_duration(self.seconds))
            if self.counts.get("events"):
                said.append(f"{self.counts['events'] / self.seconds:,.0f} events/s")
        return [*said, "interrupted"] if self.interrupted else said


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _ends(intervals: Mapping[str, tuple[float, float]]) -> dict[str, list[float | None]]:
    return {name: [end if math.isfinite(end) else None for end in ends] for name, ends in intervals.items()}


def _measure(value: float) -> str:
    if math.isnan(value):
        return "undefined"
    return f"{value:,.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.3e}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"
