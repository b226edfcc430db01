"""Scorer: the newest published version, read-only, in the service that shows the items."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError, StoreError
from streamrec.events import Impression
from streamrec.models import FM
from streamrec.preprocessors import Encoder
from streamrec.protocols import Model
from streamrec.schema import Schema
from streamrec.storage import Store, Version

__all__ = ["Candidate", "Ranked", "Scorer"]

MODELS: Mapping[str, Callable[[Mapping[str, Any]], Model]] = {"FM": FM.from_config}
"""What a scorer can build from a version alone."""


class Candidate(msgspec.Struct, frozen=True):
    """An item that might be shown, with the features of its own."""

    item: str
    features: Mapping[str, Any] = {}


class Ranked(NamedTuple):
    """An item and its click probability."""

    item: str
    score: float


class _Serving(NamedTuple):
    """One version, loaded: replaced as a whole, so that no request sees two."""

    version: Version
    model: Model
    encoder: Encoder


class Scorer:
    """Scores and ranks with the newest version in a store; `refresh` swaps a newer one in between two requests.

    `model`: makes an empty model to load a version into. Only needed for a model of your own; an FM is built from what
    was published with it. Safe to call from several threads. Raises `StoreError` where nothing is published yet.

    >>> from streamrec import FM, Id, Labeled, OnlineTrainer, Schema
    >>> store = Store("memory://scorer-doctest")
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), store=store)
    >>> shown = [Impression(id=f"i{n}", time=float(n), user="u1", item=f"p{n % 3}") for n in range(99)]
    >>> _ = trainer.push([Labeled(one, label=float(one.item == "p2")) for one in shown])
    >>> _ = trainer.publish()
    >>> [ranked.item for ranked in Scorer(store).rank(user="u1", candidates=["p0", "p1", "p2"], k=1)]
    ['p2']
    """

    def __init__(self, store: Store | str | os.PathLike[str], *, model: Callable[[], Model] | None = None) -> None:
        self.store = Store(store) if isinstance(store, (str, os.PathLike)) else store
        self._make = model
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()  # one at a time, so that a slow one brings no older version back
        serving = self._load()
        if serving is None:
            raise StoreError(
                f"nothing is published in {self.store.uri}: run a trainer on it first, or call its publish()"
            )
        self._serving = serving

    def _load(self) -> _Serving | None:
        found = self.store.versions.read()
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
        return _Serving(version, model, Encoder(model.schema))

    @property
    def version(self) -> Version:
        """The version that is served."""
        return self._serving.version

    @property
    def counts(self) -> Mapping[str, int]:
        """Feature values that could not be used and counted as unknown, by field."""
        with self._lock:
            return dict(self._counts)

    def refresh(self) -> bool:
        """Serve the newest version from now on; true where that is another one than before."""
        with self._refreshing:
            newest = self.store.versions.latest()
            if newest is None or newest.number == self._serving.version.number:
                return False
            serving = self._load()
            if serving is None or serving.version.number == self._serving.version.number:
                return False
            self._serving = serving
            return True

    def score(self, impressions: Sequence[Impression]) -> NDArray[np.float32]:
        """float32 `(n,)`: click probabilities. Unseen and missing values are fine."""
        serving = self._serving
        batch, problems = serving.encoder(impressions)
        if problems:
            with self._lock:
                self._counts.update(problem.field for problem in problems)
        return serving.model.predict(batch)

    def rank(
        self,
        *,
        user: str,
        candidates: Sequence[str | Candidate],
        k: int | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> list[Ranked]:
        """The `k` candidates (all: None) this user would most probably click, best first; ties in the order given.

        `features`: those of the user and the moment, shared by all; a candidate's own come on top.
        """
        if k is not None and k < 0:
            raise ConfigError(f"k must be >= 0, got {k!r}")
        shared = dict(features or {})
        shown = []
        for candidate in candidates:
            item, own = (candidate, {}) if isinstance(candidate, str) else (candidate.item, candidate.features)
            shown.append(
                Impression(id="", time=0.0, user=user, item=item, features={**shared, **own} if own else shared)
            )
        scores = self.score(shown)
        best = np.argsort(-scores, kind="stable")[:k]
        return [Ranked(shown[place].item, float(scores[place])) for place in best]
