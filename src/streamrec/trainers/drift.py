"""Drift: what to do when the served scores have become worse than they were, or what is shown has changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Union

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.evaluators._accumulate import CLIP, natural_log, usable
from streamrec.evaluators.drift import ADWIN, PageHinkley
from streamrec.evaluators.stability import PSI, Shift

__all__ = ["Alert", "Drift"]

LARGEST = 2.0
"""Nats: what a label's log loss is cut to, so that no single one decides, and divided by, so that it is in [0, 1]."""
_KEPT = 100


class Alert(NamedTuple):
    """What was found: at which label, and at which event time, of the impression it belongs to.

    `field`: of the schema, whose values have shifted by `psi`, before so many labels were known; empty where the loss
    has risen.
    """

    label: int
    time: float
    field: str = ""
    psi: float = 0.0


class Drift:
    """Watches the served scores and what is shown, and acts when they have changed: give it to an `OnlineTrainer`.

    `detector`: `ADWIN()` or `PageHinkley()` (of `streamrec.evaluators`), told each label's log loss, cut at 2 nats and
    halved; a rise of its mean is an alert. `features`: a `PSI` of the model's schema, told each impression that reaches
    the model; a field that has shifted is one, too, and needs no label. One of both is needed. `on_alert`: is called
    with each `Alert`, between two events; an exception it raises ends the run. What it starts must not touch the
    trainer: a retraining goes to a store of its own, see docs/judging.md. `rate`: by what the model's learning rates
    are multiplied after an alert, for `lasts` labels; 1: never. All alerts are in the report's counts as `drift`, the
    last hundred in `alerts`.

    >>> Drift(ADWIN(), rate=2.0, lasts=5_000).alerts
    []
    """

    def __init__(
        self,
        detector: Union[ADWIN, PageHinkley, None] = None,
        *,
        features: PSI | None = None,
        on_alert: Callable[[Alert], object] | None = None,
        rate: float = 1.0,
        lasts: int = 10_000,
    ) -> None:
        if detector is None and features is None:
            raise ConfigError("drift of what? Give a detector for the loss, such as ADWIN(), or features=PSI(schema)")
        if not 0 < rate <= 1000:
            raise ConfigError(f"rate must be a factor from 0 (excluded) to 1000, got {rate!r}")
        if not isinstance(lasts, int) or lasts < 1:
            raise ConfigError(f"lasts must be a number of labels >= 1, got {lasts!r}")
        self.detector = detector
        self.features = features
        self.on_alert = on_alert
        self.rate = rate
        self.lasts = lasts
        self.count = 0
        """Alerts so far."""
        self._alerts: deque[Alert] = deque(maxlen=_KEPT)
        self._labels = 0
        self._ends = 0  # the label at which the rate is 1 again
        self._told = 0  # alerts acted upon
        self._shifts: list[Shift] = []  # found since `act`

    @property
    def alerts(self) -> list[Alert]:
        """The last hundred, oldest first."""
        return [*self._alerts]

    def update(self, labels: NDArray[np.float32], served: NDArray[np.float32], times: NDArray[np.float64]) -> None:
        """Look at the losses of these labels, in order. All `(n,)`; what cannot be judged is passed over."""
        if self.detector is not None:
            changes = self.detector.changes(_losses(labels, served, CLIP, LARGEST))
            for place in np.flatnonzero(changes > 0).tolist():  # that it falls is what learning is for
                self._found(Alert(self._labels + place, float(times[place])))
        self._labels += len(labels)

    def show(self, batch: Batch) -> None:
        """Look at these impressions, in order."""
        if self.features is not None:
            self._shifts += self.features.update(batch)

    def _found(self, alert: Alert) -> None:
        self._alerts.append(alert)
        self.count += 1

    def require(self, model: Any) -> None:
        """Raise unless this can watch that model: `SchemaError` where `features` is of another schema, `ConfigError`
        where there is no rate to raise."""
        if self.features is not None:
            self.features.schema.require(model.schema, what="the model that drift watches")
        self.set_rate(model)

    def forget(self) -> None:
        """Let go of what was shown, for a user of it is to be forgotten."""
        if self.features is not None:
            self.features.forget()

    def act(self, model: Any) -> None:
        """Do what is to be done about alerts since the last time. Between two events, at the same ones however the
        stream is cut."""
        for shift in self._shifts:  # here, as how many labels were known before it hangs on how the stream is cut
            self._found(Alert(self._labels, shift.time, shift.field, shift.psi))
        self._shifts = []
        new = min(self.count - self._told, len(self._alerts))
        self._told = self.count
        if new:
            self._ends = self._labels + self.lasts
        self.set_rate(model)
        for alert in self.alerts[len(self._alerts) - new :]:
            if self.on_alert is not None:
                self.on_alert(alert)

    def set_rate(self, model: Any) -> None:
        """Give the model the rate it learns with now. Raises `ConfigError` where it has none."""
        if self.rate == 1.0:
            return
        if not hasattr(model, "rate"):
            raise ConfigError(f"a {type(model).__name__} has no `rate` that drift could raise: leave rate out")
        model.rate = self.rate if self._labels < self._ends else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The detectors, the alerts, and how long the rate stays; cut now."""
        return {
            "detector": None if self.detector is None else self.detector.state_dict(),
            "features": None if self.features is None else self.features.state_dict(),
            "alerts": [list(alert) for alert in self._alerts],
            "shifts": [list(shift) for shift in self._shifts],
            "counts": np.array([self.count, self._labels, self._ends, self._told]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where that had other detectors."""
        for name, mine in (("detector", self.detector), ("features", self.features)):
            if (mine is None) != (state[name] is None):
                there = "no" if state[name] is None else "a"
                raise ConfigError(f"the saved drift has {there} {name}: build it as then, or use an empty store")
            if mine is not None:
                mine.load_state_dict(state[name])
        self._alerts = deque((Alert(*alert) for alert in state["alerts"]), _KEPT)
        self._shifts = [Shift(*shift) for shift in state["shifts"]]
        self.count, self._labels, self._ends, self._told = np.asarray(state["counts"]).tolist()


@compiled()
def _losses(labels: Any, scores: Any, clip: float, largest: float) -> Any:
    """float64 `(n,)`: each label's log loss, cut and brought to [0, 1]; nan where it cannot be judged."""
    found = np.empty(len(labels))
    for i in range(len(labels)):
        label = np.float64(labels[i])
        if not usable(label, scores[i], 1.0):
            found[i] = np.nan
            continue
        p = min(max(np.float64(scores[i]), clip), 1.0 - clip)
        loss = 0.0
        if label > 0.0:
            loss -= label * natural_log(p)
        if label < 1.0:
            loss -= (1.0 - label) * natural_log(1.0 - p)
        found[i] = min(loss, largest) / largest
    return found
