"""Pictures of progressive validation. Needs matplotlib: `pip install "streamrec[plot]"`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.evaluators.progressive import Window

__all__ = ["plot_windows"]

_LINES = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#64748b")
_INK, _SOFT, _GRID = "#1e293b", "#64748b", "#e2e8f0"

# By class name: the title of the panel, the label of its y axis, and the value to hold against.
_PANELS: dict[str, tuple[str, str, float | None]] = {
    "AUC": ("AUC: higher is better", "probability", None),
    "LogLoss": ("Log loss: lower is better", "nats", None),
    "NormalizedEntropy": ("Normalized entropy: under 1 beats the average", "log loss / entropy", 1.0),
    "Calibration": ("Calibration: 1 is ideal", "predicted / actual", 1.0),
    "CTR": ("Click-through rate", "clicks / impressions", None),
    "ConversionRate": ("Conversion rate", "conversions / clicks", None),
}


class Windowed(Protocol):
    """What has windows to draw: a `Report`."""

    @property
    def windows(self) -> Sequence[Window]:
        """The metrics over event time, oldest first."""
        ...


def plot_windows(
    reports: Mapping[str, Windowed],
    path: str | PathLike[str],
    *,
    metrics: Sequence[str] = ("AUC", "NormalizedEntropy", "Calibration"),
    title: str | None = None,
    min_count: int | None = None,
) -> None:
    """Draw each metric of `metrics` over event time, one line for each report, into the image file `path`.

    `reports`: by the name the legend gives them. `min_count`: windows of fewer entries are left out, since they tell
    little; None: a tenth of the report's median window. The y axes hold all but outlying values, which leave
    the panel. 1200 pixels wide.

    Raises `ConfigError` where there is nothing to draw, `ImportError` without matplotlib.
    """
    try:
        from matplotlib import dates
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "streamrec[plot]"') from error

    if not metrics:
        raise ConfigError("name at least one metric to draw, got none")
    # no pyplot and no rcParams: the figure is ours alone, and a caller's settings and windows stay untouched
    height = 1.0 + 1.75 * len(metrics)
    figure = Figure(figsize=(8.0, height), dpi=150, facecolor="white")
    axes = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.095, right=0.955, top=1 - 0.93 / height, bottom=0.47 / height, hspace=0.36)

    kept = {name: _told(name, report.windows, min_count) for name, report in reports.items()}
    for axis, metric in zip(axes, metrics, strict=True):
        _panel(axis, metric, kept)

    bottom = axes[-1]
    timeline: Any = dates  # it is not typed
    locator = timeline.AutoDateLocator(tz="UTC", minticks=4, maxticks=9)
    bottom.xaxis.set_major_locator(locator)
    formatter = timeline.ConciseDateFormatter(
        locator,
        tz="UTC",
        formats=["%Y", "%b", "%b %d", "%H:%M", "%H:%M", "%S.%f"],
        zero_formats=["", "%Y", "%b %d", "%b %d", "%H:%M", "%H:%M"],
        offset_formats=["", "%Y", "%Y", "%b %d, %Y", "%b %d, %Y", "%b %d, %Y %H:%M"],
    )
    bottom.xaxis.set_major_formatter(formatter)
    bottom.xaxis.get_offset_text().set(size=8.5, color=_SOFT)
    bottom.set_xlabel("Event time (UTC)", size=8.5, color=_SOFT, labelpad=3)

    figure.text(
        0.0125, 1 - 0.13 / height, title or "Progressive validation", size=12.5, weight="bold", color=_INK, va="top"
    )
    lines, names = axes[0].get_legend_handles_labels()
    if lines:
        figure.legend(
            lines,
            names,
            loc="upper left",
            bbox_to_anchor=(0.0125, 1 - 0.36 / height),
            ncols=min(len(lines), 4),
            frameon=False,
            fontsize=9.5,
            labelcolor=_INK,
            handlelength=1.4,
            columnspacing=1.4,
            borderaxespad=0.0,
        )
    figure.savefig(path)


def _told(name: str, windows: Sequence[Window], min_count: int | None) -> list[Window]:
    """The windows with entries enough to draw."""
    least = min_count
    if least is None:
        least = math.ceil(float(np.median([window.count for window in windows])) / 10) if windows else 0
    told = [window for window in windows if window.count >= least]
    if not told:
        cure = f"lower min_count={min_count}" if windows else "give the run a window, in seconds of event time"
        raise ConfigError(f"report {name!r} has no window to draw: {cure}")
    return told


def _panel(axis: Any, metric: str, kept: Mapping[str, Sequence[Window]]) -> None:
    """One metric over event time, a line for each report."""
    heading, unit, reference = _PANELS.get(metric.split("[")[0], (metric, "value", None))
    if "[" in metric:
        heading, unit = metric, unit.replace("clicks /", "actions /")  # another kind than the click
    seen = []
    for order, (name, windows) in enumerate(kept.items()):
        missing = next((window for window in windows if metric not in window.metrics), None)
        if missing is not None:
            raise ConfigError(f"report {name!r} has no metric {metric!r}; it has {', '.join(missing.metrics)}")
        times, values = _points(windows, metric)
        seen.append(values)
        alone = {"marker": "o", "markersize": 4} if len(values) == 1 else {}
        axis.plot(
            times,
            values,
            color=_LINES[order % len(_LINES)],
            linestyle=("-", "--", ":")[order // len(_LINES) % 3],
            linewidth=1.5,
            solid_joinstyle="round",
            label=name or None,
            zorder=4 + 1 / (1 + order),  # the first report is the one that matters: drawn on top
            **alone,
        )
    low, high = _limits(np.concatenate(seen), reference)
    axis.set_ylim(low, high)
    if reference is not None:
        axis.axhline(reference, color=_SOFT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=3)
    axis.set_title(heading, loc="left", size=10, color=_INK, pad=5)
    axis.set_ylabel(unit, size=8.5, color=_SOFT)
    axis.yaxis.set_major_locator(_nice_ticks())
    axis.yaxis.set_label_coords(-0.068, 0.5)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.01)
    axis.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=_SOFT, pad=4)
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#cbd5e1")


def _nice_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def _points(windows: Sequence[Window], metric: str) -> tuple[NDArray[np.datetime64], NDArray[np.float64]]:
    """The middle of each window where the metric is defined, and its value."""
    told = [window for window in windows if math.isfinite(window.metrics[metric])]
    middles = np.array([(window.start + window.end) / 2 * 1000 for window in told], dtype=np.float64)
    values = np.array([window.metrics[metric] for window in told], dtype=np.float64)
    return middles.astype("datetime64[ms]"), values


def _limits(values: NDArray[np.float64], reference: float | None) -> tuple[float, float]:
    """Limits that show the usual values whole and let a wild first window leave the panel."""
    if not values.size:
        return (0.0, 1.0) if reference is None else (reference - 0.5, reference + 0.5)
    lower, upper = np.quantile(values, [0.05, 0.95])
    slack = max(0.6 * (upper - lower), 0.002 * abs(upper), 1e-6)
    low, high = max(values.min(), lower - slack), min(values.max(), upper + slack)
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
    margin = max(0.08 * (high - low), 0.001 * abs(high), 1e-6)
    return float(low - margin), float(high + margin)
