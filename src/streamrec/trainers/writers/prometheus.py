"""Prometheus: gauges of a training, for whoever scrapes the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from streamrec.errors import ConfigError
from streamrec.storage import Version
from streamrec.trainers.callbacks import Callback, Progress

__all__ = ["Prometheus"]

_gauges: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""By registry: a name can be registered there once."""


class Prometheus(Callback):
    """Sets gauges in a `prometheus_client` registry: the process's default one, which Faust's sensor serves too, or
    `registry`. It serves nothing itself: start `prometheus_client.start_http_server`, or mount its ASGI application.

    `streamrec_metric{metric="AUC",of="start"}`: since the start, and `of="window"` of the last window of event time
    that has closed. `streamrec_events{count="learned"}`: what became of events. `streamrec_checkpoint` and
    `streamrec_checkpoint_created_seconds`: the number and time of the last one. `labels`: more labels on all of them,
    such as which trainer it is; trainers of one process that share a registry differ in their values. `every`: events
    between two updates.

    Needs `pip install "streamrec[prometheus]"`. Raises `ConfigError` without it.
    """

    def __init__(self, registry: Any = None, *, labels: Mapping[str, str] | None = None, every: int = 10_000) -> None:
        try:
            from prometheus_client import REGISTRY, Gauge
        except ImportError as error:
            raise ConfigError('Prometheus needs prometheus-client: pip install "streamrec[prometheus]"') from error
        self.every = every
        self._registry = REGISTRY if registry is None else registry
        self._labels = dict(labels or {})
        self._gauge_of = Gauge
        self._metric = self._gauge("streamrec_metric", "what a metric says", "metric", "of")
        self._count = self._gauge("streamrec_events", "what became of events", "count")
        self._saved = self._gauge("streamrec_checkpoint", "number of the last checkpoint")
        self._created = self._gauge("streamrec_checkpoint_created_seconds", "when it was written, POSIX seconds")

    def _gauge(self, name: str, what: str, *labels: str) -> Any:
        ours = _gauges.setdefault(self._registry, {})  # of another trainer of this process, too
        if name not in ours:
            ours[name] = self._gauge_of(name, what, [*labels, *self._labels], registry=self._registry)
        return ours[name]

    def _set(self, gauge: Any, value: float, **labels: str) -> None:
        named = {**labels, **self._labels}
        (gauge.labels(**named) if named else gauge).set(value)

    def on_log(self, progress: Progress, logs: Mapping[str, float]) -> None:
        """Set the gauges of metrics and counts."""
        for name, value in logs.items():
            if name.startswith("counts/"):
                self._set(self._count, value, count=name.removeprefix("counts/"))
            else:
                self._set(self._metric, value, metric=name, of="start")

    def on_evaluate(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Set the gauges of the last window."""
        for name, value in metrics.items():
            if "/" not in name:
                self._set(self._metric, value, metric=name, of="window")

    def on_save(self, progress: Progress, version: Version) -> None:
        """Set the gauges of the checkpoint."""
        self._set(self._saved, version.number)
        self._set(self._created, version.created)
