"""What a scorer serves, and how the next version of it is loaded: as changes where it can be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.evaluators.calibration import Calibrator, calibrator_from
from streamrec.events import Impression
from streamrec.models import FM, BertCTR, BertFM
from streamrec.preprocessors import Encoder, History
from streamrec.protocols import Model, State
from streamrec.schema import Number, Schema
from streamrec.serving._catalogue import Catalogue
from streamrec.serving._sides import Sides
from streamrec.serving._warm import warm
from streamrec.storage import Shelf, Version

__all__ = ["STAGES", "Loader", "Serving"]

MODELS: Mapping[str, Callable[[Mapping[str, Any]], Model]] = {
    "FM": FM.from_config,
    "BertCTR": BertCTR.empty,
    "BertFM": BertFM.from_config,
}
"""What a scorer can build from a version alone."""
STAGES: dict[str, Callable[[Mapping[str, Any]], Any]] = {"History": History.from_config}
"""By type name, what makes a stage that adds features from its `config()`; put one of your own in."""


class Readers:
    """Alive for as long as a request may read a model: each holds the `Serving` that this is part of."""

    __slots__ = ("__weakref__",)


class Serving(NamedTuple):
    """One version, loaded, and the catalogue by it: replaced as a whole, so that no request sees two."""

    version: Version
    model: Model
    encoder: Encoder
    sides: Callable[[frozenset[str]], Sides]
    readers: Readers
    stages: Sequence[Any] = ()  # what the trainer's preprocessors knew when it was published
    catalogue: Catalogue | None = None
    calibration: Calibrator | None = None

    def calibrated(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The probabilities for these scores of the model, as the trainer calibrated them."""
        return scores if self.calibration is None else self.calibration.apply(scores)

    @property
    def apart(self) -> bool:
        """Whether candidates must be scored each as an impression: what is known of them depends on user or time."""
        return bool(self.stages) or any(isinstance(f, Number) and f.since for f in self.model.schema)

    def described(self, impressions: Sequence[Impression]) -> Sequence[Impression]:
        """These impressions with the features that the trainer's preprocessors add."""
        for stage in self.stages:
            impressions = stage.describe(impressions)
        return impressions


class _Spare(NamedTuple):
    """The model that was served before: what was `missed` makes it version `number`."""

    model: Any
    readers: weakref.ref[Readers]
    missed: Sequence[State]
    number: int


class Loader:
    """Loads versions for one scorer.

    There are two models: one is served, the other is brought up to date by the changes since, and then they change
    places. A model that a request still reads is left alone, and the version is read whole into a new one, as it is
    where changes are missing.
    """

    def __init__(self, shelf: Shelf, make: Callable[[], Model] | None) -> None:
        self._shelf = shelf
        self._make = make
        self._spare: _Spare | None = None

    def whole(self, number: int | None = None) -> Serving | None:
        """A version, the newest if None, in a model of its own; None where there is none."""
        found = self._shelf.read(number)
        if found is None:
            return None
        version, state = found
        described = version.info["model"]
        if self._make is not None:
            model = self._make()
            model.schema.require(Schema.from_dict(described["schema"]), what=f"version {version.number}")
        elif described["type"] in MODELS:
            model = MODELS[described["type"]](described["config"])
        else:
            raise ConfigError(
                f"version {version.number} is of a {described['type']}, which a scorer cannot build by itself; "
                f"pass Scorer(..., model=a function that makes an empty one)"
            )
        model.load_state_dict(state["model"])
        schema = model.schema

        @lru_cache(maxsize=64)  # a set of fields each that candidates bring; more than a few are never in use
        def sides(names: frozenset[str]) -> Sides:
            return Sides(schema, names)

        serving = Serving(version, model, Encoder(schema), sides, Readers(), _stages(version, state))
        serving = serving._replace(calibration=_calibration(version, state))
        serving.calibrated(np.zeros(1, dtype=np.float32))  # so that no request compiles it
        warm(model, serving.encoder, sides)
        return serving

    def after(self, before: Serving, number: int | None = None) -> Serving | None:
        """A version, the newest if None, without a catalogue; `before` is what is served now."""
        spare, self._spare = self._spare, None
        held = before.version.number
        found = self._shelf.changes_since(held, number) if hasattr(before.model, "load_changes") else None
        if found is None:
            return self.whole(number)
        version, states = found
        changes = [state["model"] for state in states]
        serving: Serving | None
        if spare is not None and spare.number == held and spare.readers() is None:
            for missed in (*spare.missed, *changes):
                spare.model.load_changes(missed)
            serving = before._replace(version=version, model=spare.model, readers=Readers(), catalogue=None)
            serving = serving._replace(
                stages=_stages(version, states[-1]), calibration=_calibration(version, states[-1])
            )
        else:
            serving = self.whole(number)
        if serving is not None and serving.version.number == version.number:
            self._spare = _Spare(before.model, weakref.ref(before.readers), changes, version.number)
        return serving


def _calibration(version: Version, state: State) -> Calibrator | None:
    described = version.info.get("calibration")
    return None if described is None else calibrator_from(described, state["calibration"])


def _stages(version: Version, state: State) -> Sequence[Any]:
    """The trainer's preprocessors that add features, as they were published."""
    built = []
    for described, saved in zip(version.info.get("stages", ()), state.get("stages", ()), strict=True):
        if described["type"] not in STAGES:
            raise ConfigError(
                f"version {version.number} was trained with the features of a {described['type']}, which a scorer "
                f"cannot build by itself; register it: streamrec.serving.STAGES[{described['type']!r}] = from_config"
            )
        stage = STAGES[described["type"]](described["config"])
        stage.load_state_dict(saved)
        built.append(stage)
    return built
