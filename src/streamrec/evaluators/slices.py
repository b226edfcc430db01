"""Slices: the same metrics for each country, device, or whatever a rule tells apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.evaluators._by import By, Rule
from streamrec.events import Impression
from streamrec.protocols import Metric, NotedMetric

__all__ = ["Slices"]

_LONGEST = 48  # bytes of a slice's name that are kept
_NONE, _OTHER = "(none)", "(other)"


class Slices:
    """Each of `metrics` by itself for every value of `by`: `"AUC[country=GB]"`.

    `by`: `"user"`, `"item"`, a feature, or a function of the impression that gives a text; `name` stands for it in the
    report (its own name: None). The first `limit` values have slices of their own, in the order in which their labels
    become known; what comes later is `(other)`, what has no value `(none)`. Values are told apart by the first 48 bytes
    of their text. Of metrics within groups, such as `GAUC`, each slice has its own `capacity` of cells. Parts merge
    into the whole where there are no more than `limit` values.

    >>> from streamrec import CTR, FM, Id, Labeled, OnlineTrainer, Schema
    >>> shown = [Impression(f"i{n}", float(n), "u1", "p1", {"country": ["GB", "FR"][n % 2]}) for n in range(4)]
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("item"))), metrics=[Slices(by="country", metrics=[CTR()])])
    >>> _ = trainer.push([Labeled(one, float(one.features["country"] == "FR")) for one in shown])
    >>> trainer.report().metrics
    {'CTR[country=GB]': 0.0, 'CTR[country=FR]': 1.0}
    """

    def __init__(self, *, by: Rule, metrics: Sequence[Metric], limit: int = 100, name: str | None = None) -> None:
        if not metrics:
            raise ConfigError("metrics must name one at least, such as [AUC()]")
        for metric in metrics:
            if isinstance(metric, (type, Slices)) or not isinstance(metric, Metric):
                raise ConfigError(f"metrics must be metric objects such as AUC(), and no slices, got {metric!r}")
        if not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"limit must be a number of slices >= 1, got {limit!r}")
        self._by = By(by)
        self._label = self._by.name if name is None else name
        self._metrics = list(metrics)
        self._limit = limit
        self._slices: dict[str, list[Metric]] = {}
        self._noted = {place: metric for place, metric in enumerate(metrics) if isinstance(metric, NotedMetric)}
        self.notes: np.dtype[Any] = np.dtype(
            [("slice", f"S{_LONGEST}"), *((str(place), metric.notes) for place, metric in self._noted.items())]
        )
        """What is noted of an impression: the beginning of its value, in UTF-8; and what the metrics note of it, by
        their places."""
        self.kinds = tuple(dict.fromkeys(kind for metric in metrics for kind in metric.kinds))
        self.name = f"Slices[{self._label}: {', '.join(metric.name for metric in metrics)}]"

    def note(self, impressions: Sequence[Impression], batch: Batch) -> NDArray[Any]:
        """`(n,)` of the type `notes`: the value of each impression, and what the metrics note of it. Changes
        nothing."""
        notes = np.empty(len(impressions), dtype=self.notes)
        notes["slice"] = [self._named(one).encode("utf-8", "replace") for one in impressions]
        for place, metric in self._noted.items():
            notes[str(place)] = metric.note(impressions, batch)
        return notes

    def _named(self, impression: Impression) -> str:
        text = self._by.text(impression)
        return _NONE if text is None or not text.strip("\0") else text

    def update(
        self,
        labels: NDArray[np.float32],
        scores: NDArray[np.float32],
        weights: NDArray[np.float32] | None = None,
        kind: str = "click",
        notes: NDArray[Any] | None = None,
    ) -> None:
        """Give each slice's entries to its metrics, in order. All `(n,)`. Raises `ConfigError` without notes."""
        if kind not in self.kinds:
            return
        if notes is None or len(notes) != len(labels):
            raise ConfigError(
                f"{self.name} needs what note() gave for each of {len(labels)} labels, got "
                f"{'none' if notes is None else len(notes)}; it works in an OnlineTrainer, which sees impressions"
            )
        values, firsts, places = np.unique(notes["slice"], return_index=True, return_inverse=True)
        for which in np.argsort(firsts).tolist():
            rows = np.flatnonzero(places == which)
            name = values[which].decode("utf-8", "ignore")
            columns = labels[rows], scores[rows], None if weights is None else weights[rows], kind
            for place, metric in enumerate(self._of(name)):
                if kind in metric.kinds and isinstance(metric, NotedMetric):
                    metric.update(*columns, notes[str(place)][rows])  # type: ignore[call-arg]
                elif kind in metric.kinds:
                    metric.update(*columns)

    def _of(self, name: str) -> list[Metric]:
        if name not in self._slices:
            if name not in (_NONE, _OTHER) and len(self._slices.keys() - {_NONE, _OTHER}) >= self._limit:
                return self._of(_OTHER)
            self._slices[name] = [metric.fresh() for metric in self._metrics]
        return self._slices[name]

    def compute(self) -> dict[str, float]:
        """The value of each metric in each slice, in the order in which the slices came."""
        return {key: metric.compute() for key, metric in self._named_metrics()}

    def interval(self, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
        """The interval of each metric that has one, in each slice, by the names that `compute` has."""
        return {
            key: metric.interval(confidence) for key, metric in self._named_metrics() if hasattr(metric, "interval")
        }

    def _named_metrics(self) -> Iterator[tuple[str, Metric]]:
        for name, metrics in self._slices.items():
            for metric in metrics:
                inner = f"{self._label}={name}"
                yield (
                    f"{metric.name[:-1]}, {inner}]" if metric.name.endswith("]") else f"{metric.name}[{inner}]",
                    metric,
                )

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        metrics = [metric.fresh() for metric in self._metrics]
        return type(self)(by=self._by.rule, metrics=metrics, limit=self._limit, name=self._label)

    def merge(self, other: Self) -> None:
        """Take in what another of the same settings has seen. Raises `ConfigError` if the settings differ."""
        if type(other) is not type(self) or other.name != self.name or other._limit != self._limit:
            raise ConfigError(f"cannot merge {other.name} into {self.name}: both must have the same settings")
        for name, metrics in other._slices.items():
            for own, theirs in zip(self._of(name), metrics, strict=True):
                own.merge(theirs)

    def state_dict(self) -> dict[str, Any]:
        """The slices in the order in which they came, and the state of each one's metrics; cut now."""
        return {
            "names": list(self._slices),
            "metrics": [[metric.state_dict() for metric in metrics] for metrics in self._slices.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from."""
        self._slices = {}
        for name, states in zip(state["names"], state["metrics"], strict=True):
            self._slices[name] = [metric.fresh() for metric in self._metrics]
            for metric, one in zip(self._slices[name], states, strict=True):
                metric.load_state_dict(one)
