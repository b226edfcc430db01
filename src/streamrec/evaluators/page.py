"""A report as one HTML page that needs nothing else: numbers, and pictures of the metrics over event time in SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

from streamrec.evaluators.formulas import Bin
from streamrec.evaluators.progressive import Window

__all__ = ["page_of"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 190, 62, 22
_STYLE = """body{font:14px/1.5 system-ui,sans-serif;color:#1e293b;max-width:900px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1rem;margin:1.6rem 0 .3rem}table{border-collapse:collapse}
td,th{padding:.15rem .8rem .15rem 0;text-align:left;border-bottom:1px solid #e2e8f0}
td.n{text-align:right;font-variant-numeric:tabular-nums}svg{display:block;width:100%;height:auto}
svg.curve{max-width:420px}
text{font-size:11px;fill:#64748b}.band{fill:#2563eb;opacity:.15}.up{stroke:#16a34a}.down{stroke:#dc2626}.muted{color:#64748b}"""


def page_of(
    title: str,
    metrics: Mapping[str, float],
    counts: Mapping[str, int],
    windows: Sequence[Window],
    decisions: Sequence[Any],
    pace: str,
    intervals: Mapping[str, tuple[float, float]],
    curves: Mapping[str, Sequence[Bin]],
) -> str:
    """The page. `decisions`: of `store.served.history()`, with `version`, `why` and `at`."""
    whole = {name: value for name, value in metrics.items() if "=" not in name}
    sliced = {name: value for name, value in metrics.items() if "=" in name}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{escape(pace)}</p>' if pace else "",
        _table("Metrics", {name: _told(value) + _between(intervals.get(name)) for name, value in whole.items()}),
        *(_picture(name, windows, decisions) for name in whole),
        *(_curve(kind, curve) for kind, curve in curves.items()),
        _table("Slices", {name: _told(value) + _between(intervals.get(name)) for name, value in sliced.items()}),
        _table("What became of the events", {name: f"{count:,}" for name, count in counts.items() if count}),
        _history(decisions),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _told(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:,.4f}"


def _between(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f" ({_told(ends[0])} to {_told(ends[1])})"


def _table(heading: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = "".join(f'<tr><td>{escape(name)}</td><td class="n">{escape(told)}</td></tr>' for name, told in rows.items())
    return f"<h2>{escape(heading)}</h2><table>{lines}</table>"


def _history(decisions: Sequence[Any]) -> str:
    if not decisions:
        return ""
    lines = "".join(
        f"<tr><td>{_when(one.at)}</td><td>{'newest' if one.version is None else one.version}</td>"
        f"<td>{escape(one.why)}</td></tr>"
        for one in decisions
    )
    return f"<h2>What was served</h2><table><tr><th>decided</th><th>version</th><th>why</th></tr>{lines}</table>"


def _when(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):  # a time that no calendar has
        return f"{seconds:.0f} s"


def _marks(decisions: Sequence[Any]) -> list[tuple[float, str, str]]:
    """Where another version came to be served, and how that is drawn: event time, class and what it says."""
    marks = []
    before = None
    for one in decisions:
        time = getattr(one, "time", None)
        back = "goes back" in one.why or (before is not None and one.version is not None and one.version < before)
        if time is not None and (one.version != before or back):
            marks.append((time, "down" if back else "up", f"version {one.version}: {one.why}"))
        before = one.version
    return marks


def _finite(ends: tuple[float, float] | None, value: float) -> tuple[float, float]:
    """The ends of an interval; the value itself where there is none, or one end that is infinite."""
    low, high = (value, value) if ends is None else ends
    return low if math.isfinite(low) else value, high if math.isfinite(high) else value


def _shown(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """From what to what is drawn: the values whole, and of their intervals as much as fits beside half of that."""
    low, high = min(values), max(values)
    room = max((high - low) / 2, 2 * (sorted(map(abs, ends))[len(ends) // 2] * 0.01))
    return max(low - room, min(ends)), min(high + room, max(ends))


def _picture(name: str, windows: Sequence[Window], decisions: Sequence[Any]) -> str:
    """One metric over event time, with what was served when; nothing where fewer than two windows tell of it."""
    told = [window for window in windows if math.isfinite(window.metrics.get(name, math.nan))]
    points = [((window.start + window.end) / 2, window.metrics[name]) for window in told]
    if len(points) < 2:
        return ""
    ends = [
        (time, *_finite(window.intervals.get(name), value)) for window, (time, value) in zip(told, points, strict=True)
    ]
    low, high = _shown([value for _, value in points], [end for _, *both in ends for end in both])
    slack = max((high - low) * 0.08, abs(high) * 0.001, 1e-9)
    low, high = low - slack, high + slack
    first, last = points[0][0], points[-1][0]
    across, up = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - 10

    def place(time: float, value: float) -> str:
        x = _LEFT + across * (time - first) / (last - first)
        return f"{x:.1f},{10 + up * (high - value) / (high - low):.1f}"

    line = " ".join(place(*point) for point in points)
    band = [(time, least) for time, least, _ in ends] + [(time, most) for time, _, most in reversed(ends)]
    edge = " ".join(place(time, min(max(end, low), high)) for time, end in band)
    grid = [f'<polygon class="band" points="{edge}"/>']
    for step in range(4):
        value = low + (high - low) * (step + 0.5) / 4
        y = float(place(first, value).split(",")[1])
        grid.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y}" y2="{y}" stroke="#e2e8f0"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>'
        )
    for time, kind, why in _marks(decisions):
        if first <= time <= last:
            x = place(time, high).split(",")[0]
            grid.append(
                f'<line class="{kind}" x1="{x}" x2="{x}" y1="10" y2="{10 + up}" stroke-dasharray="3 3">'
                f"<title>{escape(why)}</title></line>"
            )
    return (
        f'<h2>{escape(name)}</h2><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">'
        f'{"".join(grid)}<polyline fill="none" stroke="#2563eb" stroke-width="1.5" points="{line}"/>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{_when(first)}</text>'
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 4}" text-anchor="end">{_when(last)} UTC, event time</text></svg>'
    )


def _curve(kind: str, curve: Sequence[Bin]) -> str:
    """What was predicted against what happened: points with intervals, and the line on which they should lie."""
    if not curve:
        return ""
    size = 300
    most = max(max(one.predicted, one.high) for one in curve) * 1.05 or 1.0

    def across(value: float) -> float:
        return round(_LEFT + size * value / most, 1)

    def down(value: float) -> float:
        return round(10 + size * (1 - value / most), 1)

    parts = []
    for step in range(5):
        value = most * step / 4
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + size}" y1="{down(value)}" y2="{down(value)}" stroke="#e2e8f0"/>'
            f'<text x="{_LEFT - 6}" y="{down(value) + 4}" text-anchor="end">{value:.3g}</text>'
            f'<text x="{across(value)}" y="{size + 26}" text-anchor="middle">{value:.3g}</text>'
        )
    parts.append(
        f'<line x1="{across(0)}" y1="{down(0)}" x2="{across(most)}" y2="{down(most)}" stroke="#94a3b8" '
        'stroke-dasharray="4 3"/>'
    )
    for one in curve:
        x = across(one.predicted)
        said = (
            f"{one.predicted:.4g} predicted, {one.actual:.4g} happened ({one.low:.4g} to {one.high:.4g}), "
            f"of {one.weight:,.0f}"
        )
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{down(one.high)}" y2="{down(one.low)}" stroke="#2563eb"/>'
            f'<circle cx="{x}" cy="{down(one.actual)}" r="3.5" fill="#2563eb"><title>{said}</title></circle>'
        )
    heading = "Predicted and actual rate" + ("" if kind == "click" else f" of {kind}")
    return (
        f'<h2>{escape(heading)}</h2><svg class="curve" viewBox="0 0 {_LEFT + size + 20} {size + 44}" role="img" '
        f'aria-label="{escape(heading)}">{"".join(parts)}<text x="{_LEFT + size / 2}" y="{size + 42}" '
        'text-anchor="middle">predicted; up: actual, with 95 % intervals</text></svg>'
    )
