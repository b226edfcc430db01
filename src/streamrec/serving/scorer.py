"""Scorer: the version that is to be served, read-only, in the service that shows the items."""

from __future__ import annotations

import os
import threading
import time as _time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError, StoreError
from streamrec.events import Impression
from streamrec.preprocessors.encode import Problem
from streamrec.protocols import Model
from streamrec.serving._catalogue import Catalogue, with_parts
from streamrec.serving._loader import Loader
from streamrec.serving.candidates import Candidate, Ranked, Shortlist
from streamrec.serving.view import View
from streamrec.storage import Store, Version

__all__ = ["Scorer", "Status"]


class Status(NamedTuple):
    """What a service tells of its scorer. Seconds of waiting are of a clock that never jumps; those of `age` are not.

    `version`: the number that is served, and `age`: seconds since it was published, by the store's clock, 0 at least.
    `looked`: seconds since the store last answered. `failed`: refreshes that failed since then, and `error`: what the
    last one failed of, None where none did.
    """

    version: int
    age: float
    looked: float
    failed: int
    error: str | None


class Scorer:
    """Scores and ranks with the newest version in a store; `refresh` swaps a newer one in between two requests.

    Where `store.served` was told to serve another version, by a rollback, say, it is that one. A `Follower` calls
    `refresh` on a thread of its own.

    `model`: makes an empty model to load a version into. Only needed for a model of your own; an FM is built from what
    was published with it. `clock`: seconds, by which it is told how long the store has been silent. Safe to call from
    several threads. Raises `StoreError` where nothing is published yet.

    For an FM, `rank` and `retrieve` compute what the candidates share once, and keep what the items of the catalogue
    bring. Their scores are those of `score` but for the order in which float32 numbers are added: to 1e-5, where the
    features' values are of ordinary size. What is compiled is compiled when a scorer is made, not in its first request.

    >>> from streamrec import FM, Id, Labeled, OnlineTrainer, Schema
    >>> store = Store("memory://scorer-doctest")
    >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), store=store)
    >>> shown = [Impression(id=f"i{n}", time=float(n), user="u1", item=f"p{n % 3}") for n in range(99)]
    >>> _ = trainer.push([Labeled(one, label=float(one.item == "p2")) for one in shown])
    >>> _ = trainer.publish()
    >>> scorer = Scorer(store)
    >>> [ranked.item for ranked in scorer.rank(user="u1", candidates=["p0", "p1", "p2"], k=1)]
    ['p2']
    >>> scorer.set_catalogue(["p0", "p1", "p2"])
    >>> [ranked.item for ranked in scorer.retrieve(user="u1", k=1)]
    ['p2']
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        model: Callable[[], Model] | None = None,
        clock: Callable[[], float] = _time.monotonic,
    ) -> None:
        self.store = Store(store) if isinstance(store, (str, os.PathLike)) else store
        self._loader = Loader(self.store.versions, model)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()  # one at a time, so that a slow one brings no older version back
        serving = self._loader.whole(self.store.served.pinned())
        if serving is None:
            raise StoreError(
                f"nothing is published in {self.store.uri}: run a trainer on it first, or call its publish()"
            )
        self._serving = serving
        self._passed_over: Version | None = None  # the newest, where it was damaged: not read again and again
        self._clock = clock
        self._looked: tuple[float, int, str | None] = (clock(), 0, None)  # replaced as a whole

    @property
    def version(self) -> Version:
        """The version that is served."""
        return self._serving.version

    @property
    def counts(self) -> Mapping[str, int]:
        """Feature values that could not be used and counted as unknown, by field."""
        with self._lock:
            return dict(self._counts)

    def _count(self, problems: Iterable[Problem], times: int = 1) -> None:
        with self._lock:
            for problem in problems:
                self._counts[problem.field] += times

    def refresh(self) -> bool:
        """Serve the newest version from now on, or the one that `store.served` was told; true where that is another one
        than before.

        Meanwhile requests see the old version; the catalogue's parts are computed for the new one first and swapped in
        with it. Where the store has it as changes of the one that is served, only they are read, and they go into a
        second model, which is kept for that: a scorer that follows a trainer holds its model twice.
        """
        with self._refreshing:
            _, failed, _ = self._looked
            try:
                swapped = self._refresh()
            except Exception as error:
                self._looked = (self._looked[0], failed + 1, f"{type(error).__name__}: {error}")
                raise
            self._looked = (self._clock(), 0, None)
            return swapped

    def _refresh(self) -> bool:
        pinned = self.store.served.pinned()
        before = self._serving
        newest = self.store.versions.latest() if pinned is None else None
        number = pinned if newest is None else newest.number
        if number is None or number == before.version.number or (newest is not None and newest == self._passed_over):
            return False
        serving = self._loader.after(before, pinned)
        self._passed_over = newest if serving is None or serving.version != newest else None
        if serving is None or serving.version.number == before.version.number:
            return False
        if before.catalogue is not None:
            # encoding knows no weights: by the same schema, the batch is the same
            kept = before.catalogue.by_fm if before.model.schema == serving.model.schema else None
            batch = None if kept is None else kept.batch
            catalogue, _ = with_parts(before.catalogue, serving.model, serving.sides, batch)
            serving = serving._replace(catalogue=catalogue)
        self._serving = serving
        return True

    def status(self) -> Status:
        """What is served and how fresh it is: for a service's readiness and its dashboards."""
        looked, failed, error = self._looked
        version = self.version
        age = max(0.0, self.store.clock() - version.created)
        return Status(version.number, age, self._clock() - looked, failed, error)

    def view(self) -> View:
        """What is served now, for one request: all that it answers is by one version, and it says which."""
        return View(self._serving, self._count)

    def score(self, impressions: Sequence[Impression]) -> NDArray[np.float32]:
        """float32 `(n,)`: click probabilities; see `View.score`."""
        return self.view().score(impressions)

    def rank(
        self,
        *,
        user: str,
        candidates: Sequence[str | Candidate],
        k: int | None = None,
        features: Mapping[str, Any] | None = None,
        time: float | None = None,
    ) -> list[Ranked]:
        """The `k` candidates (all: None) this user would most probably click, best first; see `View.rank`."""
        return self.view().rank(user=user, candidates=candidates, k=k, features=features, time=time)

    def retrieve(
        self,
        *,
        user: str,
        k: int | None,
        features: Mapping[str, Any] | None = None,
        exclude: Iterable[str] = (),
        time: float | None = None,
    ) -> list[Ranked]:
        """The `k` items (all: None) of the catalogue this user would most probably click; see `View.retrieve`."""
        return self.view().retrieve(user=user, k=k, features=features, exclude=exclude, time=time)

    def set_catalogue(self, candidates: Sequence[str | Candidate]) -> None:
        """The items there are, for `retrieve`, and for `rank` to know by their names; in place of those before.

        A field that any of them has features for is the items' own: an item without it has it unknown, whatever the
        `features` of a request say. For an FM an item takes 5 (dim + 1) bytes and 16 for each of its features, encoded
        once; a refresh computes only the weights' part again. Raises `ConfigError` where an item stands twice.
        """
        catalogue = Catalogue.of(tuple(candidates))
        with self._refreshing:
            serving = self._serving
            catalogue, problems = with_parts(catalogue, serving.model, serving.sides, None)
            self._serving = serving._replace(catalogue=catalogue)
        self._count(problems)

    def shortlist(self, items: Iterable[str]) -> Shortlist:
        """These items of the catalogue, looked up once, for a service that ranks the same ones again and again.

        `rank` takes it in place of the names, and finds without a dictionary what is kept of them. Raises `ConfigError`
        where there is no catalogue, or one of them is not in it.

        >>> from streamrec import FM, Id, OnlineTrainer, Schema
        >>> trainer = OnlineTrainer(model=FM(Schema(Id("user"), Id("item"))), store="memory://shortlist-doctest")
        >>> _ = trainer.publish()
        >>> scorer = Scorer("memory://shortlist-doctest")
        >>> scorer.set_catalogue(["p0", "p1", "p2"])
        >>> front_page = scorer.shortlist(["p2", "p0"])
        >>> len(scorer.rank(user="u1", candidates=front_page)), front_page.places.tolist()
        (2, [2, 0])
        """
        catalogue = self._serving.catalogue
        if catalogue is None:
            raise ConfigError("there is no catalogue to look items up in: call set_catalogue(candidates) first")
        if isinstance(items, str):
            raise ConfigError(f"shortlist takes several items, got the one text {items!r}; pass [{items!r}]")
        items = tuple(items)
        places = catalogue.find(items)
        if places is None:
            stranger = next(item for item in items if item not in catalogue.places)
            raise ConfigError(f"{stranger!r} is not in the catalogue: leave it out, or set a catalogue that has it")
        return Shortlist(items, places, catalogue.mark)
