"""The table of a search."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from streamrec.models.space import Params

__all__ = ["Trial", "Trials", "plain_params"]


@dataclass(frozen=True)
class Trial:
    """One row: a point, and the most that was tried with it.

    `budget`: the share of the archive it learned last, and was judged after; `metrics`: what was said then, by name.
    `status`: "whole" where it came to all of the archive, "stopped" where others were better, "nan" where its scores
    were not finite, "failed" where it raised; the last two have a `reason`. `seconds`: of the last try, on its worker.
    """

    number: int
    params: Params
    budget: float
    status: str
    metrics: Mapping[str, float]
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Trials(Sequence[Trial]):
    """What a search has found: its trials by number, the best of them, and what was published of that.

    `best_number`: the trial that was published, as `version` of the store at `uri`.

    >>> best = Trial(0, {"lr": 0.1}, 1.0, "whole", {"LogLoss": 0.5})
    >>> print(Trials((best, Trial(1, {"lr": 9.0}, 0.1, "nan", {}, "not finite")), 0, 1, "runs/search"))
    trial  status  budget  LogLoss   lr  reason
        0  whole        1   0.5000  0.1
        1  nan        0.1             9  not finite
    <BLANKLINE>
    2 trials: 1 whole, 1 nan; trial 0 is version 1 of runs/search
    """

    rows: Sequence[Trial]
    best_number: int
    version: int
    uri: str

    def __getitem__(self, place: Any) -> Any:
        return self.rows[place]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.rows)

    @property
    def best(self) -> Trial:
        """The trial that was published."""
        return self.rows[self.best_number]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many trials ended how."""
        found = Counter(one.status for one in self.rows)
        return {status: found[status] for status in ("whole", "stopped", "nan", "failed") if found[status]}

    def to_json(self) -> str:
        """The same as JSON, metrics that are undefined as null, and what JSON does not know as text."""
        rows = [
            {
                "number": one.number,
                "params": plain_params(one.params),
                "budget": one.budget,
                "status": one.status,
                "metrics": {name: None if math.isnan(value) else value for name, value in one.metrics.items()},
                "reason": one.reason,
                "seconds": one.seconds,
            }
            for one in self.rows
        ]
        whole = {"best": self.best_number, "version": self.version, "uri": self.uri, "trials": rows}
        return json.dumps(whole, allow_nan=False)

    def __str__(self) -> str:
        def worst(one: Trial) -> tuple[bool, float, float, int]:
            return not one.metrics, -one.budget, one.metrics.get("LogLoss", math.inf), one.number

        metrics = list(dict.fromkeys(name for one in self.rows for name in one.metrics))
        names = list(dict.fromkeys(name for one in self.rows for name in one.params))
        lines = [["trial", "status", "budget", *metrics, *names, "reason"]]
        for one in sorted(self.rows, key=worst):
            told = [f"{one.metrics[name]:.4f}" if name in one.metrics else "" for name in metrics]
            params = [_short(one.params[name]) for name in names]
            lines.append([str(one.number), one.status, f"{one.budget:.3g}", *told, *params, one.reason])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = {1, len(widths) - 1}  # words
        table = "\n".join(
            "  ".join(
                cell.ljust(width) if place in left else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        ended = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        trials = f"{len(self.rows)} trial{'s' if len(self.rows) > 1 else ''}"
        return f"{table}\n\n{trials}: {ended}; trial {self.best_number} is version {self.version} of {self.uri}"


def plain_params(params: Params) -> dict[str, Any]:
    """A point as JSON has it: numbers and text as they are, settings by name, all else as it prints."""
    plain: dict[str, Any] = msgspec.to_builtins(dict(params), enc_hook=repr)
    return {name: value if _finite(value) else repr(value) for name, value in plain.items()}


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
