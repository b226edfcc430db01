"""One trial of a search, on a worker: a point, trained on a share of the archive and judged by the end of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Union

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.batch import LabeledRows
from streamrec.evaluators import NormalizedEntropy
from streamrec.models import FM
from streamrec.models.space import Params, require_names, with_settings
from streamrec.protocols import Metric, Model, State
from streamrec.schema import Schema
from streamrec.storage import EncodedRows, Store
from streamrec.trainers import BatchTrainer

__all__ = ["FMs", "Make", "Outcome", "run_trial"]

Make = Callable[[Params], Union[Model, BatchTrainer]]
PROBE = 64
"""Rows of each window by which a model is looked at while it learns."""


class Outcome(msgspec.Struct, frozen=True):
    """How a point did with one budget. `status`: "judged", "nan" or "failed", then with a `reason`; `kept`: where its
    model is, where it was kept; `learned`: rows."""

    status: str
    metrics: dict[str, float | None] = {}
    reason: str = ""
    learned: int = 0
    seconds: float = 0.0
    kept: str = ""

    @property
    def loss(self) -> float | None:
        """Its log loss; None where it could not be judged."""
        return self.metrics.get("LogLoss") if self.status == "judged" else None


class Told(NamedTuple):
    """What all trials of a search share."""

    make: Make
    validation: float
    metrics: Sequence[Metric]


def run_trial(told: Told, data: EncodedRows, params: Params, budget: float, keep: str | None) -> Outcome:
    """Train a point on the newest share `budget` of what is before the validation part, and judge it by that.

    `keep`: what the folder its checkpoint and version go to is called, before the dash. What cannot be read or written
    raises, an `OSError`: no trial could do better. All else that goes wrong is the point's own, and an outcome.
    """
    begun = time.perf_counter()
    try:
        made = told.make(params)
        trainer = made if isinstance(made, BatchTrainer) else BatchTrainer(model=made)
        trainer.validation = told.validation
        trainer.metrics = [*(told.metrics or [NormalizedEntropy()]), _Finite()]
        # a place of its own: where a worker is lost, the trial begins again, and the first may still be writing
        kept = "" if keep is None else f"{keep}-{secrets.token_hex(4)}"
        trainer.store = Store(kept, keep=1) if kept else None
        trainer.checkpoint_seconds = np.inf
        report = trainer.run(_Newest(data, budget, told.validation, trainer.model), progress=False)
    except _NotFinite:
        return Outcome("nan", reason="scores are not finite", seconds=time.perf_counter() - begun)
    except OSError:
        raise
    except Exception as error:
        return Outcome("failed", reason=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - begun)
    metrics = {name: None if np.isnan(value) else value for name, value in report.metrics.items() if name != "Finite"}
    learned = report.counts["learned"]
    if not learned:
        return Outcome(
            "failed", reason=f"no row to learn from in the newest {budget:.3g} of the time before validation"
        )
    return Outcome("judged", metrics, learned=learned, seconds=time.perf_counter() - begun, kept=kept)


class _NotFinite(Exception):
    """A model scores nan: it will not stop doing so."""


class _Newest:
    """The rows of the newest share `budget` of the time before the validation part, and those of that part.

    The span is that of all rows, so that every budget is judged by the same ones.
    """

    def __init__(self, rows: EncodedRows, budget: float, validation: float, model: Model) -> None:
        span = rows.span()
        first, last = span or (0.0, 0.0)
        split = last - validation * (last - first)
        self._since = -np.inf if budget >= 1 else split - budget * (split - first)
        self._whole_span = span
        self._rows = rows.since(self._since)
        self._model = model
        self.schema = rows.schema

    def read(self, limit: int) -> LabeledRows | None:
        part = self._rows.read(limit)
        if part is None:
            return None
        if self._since > -np.inf:
            part = part.take(np.flatnonzero(part.batch.times >= self._since))
        if len(part.labels):
            require_finite(self._model.predict(part.batch.take(slice(PROBE))))
        return part

    def span(self) -> tuple[float, float] | None:
        return self._whole_span

    def fraction(self) -> float:
        return self._rows.fraction()

    def state_dict(self) -> State:
        return self._rows.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._rows.load_state_dict(state)


def require_finite(scores: NDArray[np.float32]) -> None:
    """End the trial where a score is not a number."""
    if not np.isfinite(scores).all():
        raise _NotFinite


class _Finite:
    """A metric that ends a trial at the first score that is not a number: others would pass over it."""

    kinds = ("click",)
    name = "Finite"

    def update(
        self,
        labels: NDArray[np.float32],
        scores: NDArray[np.float32],
        weights: NDArray[np.float32] | None = None,
        kind: str = "click",
    ) -> None:
        require_finite(scores)

    def compute(self) -> float:
        return 1.0

    def merge(self, other: Any) -> None:
        pass

    def fresh(self) -> _Finite:
        return self

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        pass


class FMs:
    """Makes an FM of a point, and its trainer: a name is an argument of `FM`, a setting of one of its optimizers
    (`"optimizer.lr"`), or one of `BatchTrainer`'s `epochs`, `shuffle`, `window` and `patience`."""

    OF_TRAINER = ("epochs", "shuffle", "window", "patience")

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def require(self, names: Iterable[str]) -> None:
        """Raise `ConfigError` for a name that is none of these."""
        require_names(names, self.OF_TRAINER)

    def __call__(self, params: Params) -> BatchTrainer:
        optimizers = {name: params[name] for name in ("optimizer", "linear_optimizer") if name in params}
        model = with_settings(FM(self._schema, **optimizers), params)
        if "optimizer" in params and not any(name.startswith("linear_optimizer") for name in params):
            model["linear_optimizer"] = model["optimizer"]  # it is meant for both, as in FM
        return BatchTrainer(
            model=FM(self._schema, **model), **{name: params[name] for name in self.OF_TRAINER if name in params}
        )
