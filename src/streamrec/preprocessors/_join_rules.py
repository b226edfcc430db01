"""What a join is told of its windows, checked, and as its loops read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from streamrec.errors import ConfigError
from streamrec.preprocessors import _join_kernel
from streamrec.preprocessors._join_kernel import FOREVER
from streamrec.schema import seconds_of

__all__ = ["MOST_KINDS", "After", "Rules"]

MOST_KINDS = 30
"""Bits of a row's `positive`, twice."""

_USES = {"weight": _join_kernel.AS_WEIGHT, "label": _join_kernel.AS_LABEL}


class After(NamedTuple):
    """A window that begins with feedback of another kind: a purchase within 7 days after the click.

    `seconds`: of event time, or text such as "7d".

    >>> After("click", "7d")
    After(kind='click', seconds='7d')
    """

    kind: str
    seconds: float | str


class Rules:
    """`windows`, `values`, `late` and `keep` of a `LabelJoin`, which says what they are. Raises `ConfigError`.

    By the place in `kinds`, which are in the order in which their windows close: `spans`, float64, the seconds in which
    feedback counts; `widths`, float64, those until the label, and behind them of what is kept for corrections;
    `table`, int64, what the loops do with a kind. `columns`: numbers that are kept of an impression. `valued`: whether
    values of feedback are read. `told`: what a state must have been cut with, too.
    """

    def __init__(
        self, windows: Mapping[str, float | str | After], values: Mapping[str, str], late: str, keep: float | str
    ) -> None:
        if not isinstance(windows, Mapping) or not windows:
            raise ConfigError(f'windows must map kinds to seconds, such as {{"click": 1800.0}}, got {windows!r}')
        for kind, window in windows.items():
            if not isinstance(kind, str) or not kind:
                raise ConfigError(f"windows must be keyed by the kind of feedback, a string, got {kind!r}")
            span = window.seconds if isinstance(window, After) else window
            if isinstance(span, str):
                seconds_of(span, f"the window of {kind!r}")
            elif not 0.0 < span < FOREVER:
                raise ConfigError(f"the window of {kind!r} must be > 0 seconds and finite, got {span!r}")
            if isinstance(window, After) and isinstance(windows.get(window.kind, window), After):
                raise ConfigError(
                    f"the window of {kind!r} begins with {window.kind!r}, which must have a window of its own that "
                    "begins with the impression"
                )
        for kind, use in values.items():
            if kind not in windows or use not in _USES:
                raise ConfigError(f'values must map kinds of windows to "weight" or "label", got {kind!r}: {use!r}')
        if late not in ("drop", "correct"):
            raise ConfigError(f'late must be "drop" or "correct", got {late!r}')
        if len(windows) > MOST_KINDS:
            raise ConfigError(f"windows may name {MOST_KINDS} kinds at most, got {len(windows)}")
        spans = {kind: _seconds(window, kind) for kind, window in windows.items()}
        bases = {kind: window.kind for kind, window in windows.items() if isinstance(window, After)}
        self.windows: Mapping[str, float] = {
            kind: span + (spans[bases[kind]] if kind in bases else 0.0) for kind, span in spans.items()
        }
        """By kind, seconds from an impression until its label is known at the latest."""
        self.keep = _seconds(keep, "keep")

        # In order of closing, whatever the order of the mapping.
        self.kinds: Sequence[str] = sorted(self.windows, key=lambda kind: (self.windows[kind], kind))
        self.code = {kind: code for code, kind in enumerate(self.kinds)}
        self.spans = np.array([spans[kind] for kind in self.kinds])
        widths = [self.windows[kind] for kind in self.kinds]
        self.widths = np.array(widths + ([widths[-1] + self.keep] if late == "correct" else []))
        self.table = np.full((len(self.kinds), 4), -1, dtype=np.int64)
        self.table[:, _join_kernel.BASE] = [self.code.get(bases.get(kind, ""), -1) for kind in self.kinds]
        self.table[:, _join_kernel.USE] = [_USES.get(values.get(kind, ""), _join_kernel.PLAIN) for kind in self.kinds]
        timed = [self.code[kind] for kind in dict.fromkeys(bases.values())]
        valued = [self.code[kind] for kind in values]
        self.table[timed, _join_kernel.TIME_COLUMN] = np.arange(len(timed))
        self.table[valued, _join_kernel.VALUE_COLUMN] = len(timed) + np.arange(len(valued))
        self.columns = len(timed) + len(valued)
        self.valued = bool(valued)
        # what a state must have been cut with, too
        self.told = {"bases": bases, "values": dict(values)} | ({"late": late} if late == "correct" else {})


def _seconds(window: Any, what: str) -> float:
    span = window.seconds if isinstance(window, After) else window
    return seconds_of(span, what) if isinstance(span, str) else float(span)
