"""Gate: a new version is served when it is not worse than the one that is, and taken back when it turns out to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.errors import ConfigError, StoreError
from streamrec.evaluators import LogLoss, LossDifference
from streamrec.protocols import Model
from streamrec.storage import Store

__all__ = ["Gate"]

_SCORES = ("before", "champion", "challenger")


class Gate:
    """Tries each new version in the shadow of the one that is served, on the same impressions, before it is served.

    What is served is the *champion*. The newest version that a trainer has published becomes the *challenger*. Both
    score every impression as it comes, frozen as they are, and their losses are compared when its label is known. As
    soon as an interval that holds at all times (see `LossDifference`) lies below `worse`, the challenger is certainly
    not worse by more than that, and `store.served` is pinned to it; as soon as it lies above 0, it is certainly worse,
    and is turned down; after `patience` labels without an answer it is turned down, too. Then the newest is tried.

    A champion is watched: for `watch` labels after its promotion the one before it goes on scoring. Every `every`
    labels the comparison begins anew, so that what went well for long does not hide what goes wrong now; when the
    champion is certainly worse by more than `worse`, the one before is served again. Each decision and its reason is in
    `store.served.history()`. Decisions are made between two pushes: one that is due makes a checkpoint due.

    `worse`: a share of the log loss, and so of the normalized entropy. `confidence`: of one trial, and of one watch as
    a whole: of equally good challengers so many at least are not turned down as worse, and of champions that are not
    worse so many are not taken back.

    Memory: two more models, three while a champion is watched. Raises `ConfigError` for arguments that cannot work.
    """

    notes = np.dtype([("trial", np.int64), ("watch", np.int64), *((name, np.float32) for name in _SCORES)])
    """What is noted of an impression: which trial and which watch it is part of, and what each model says of it."""

    def __init__(
        self,
        *,
        worse: float = 0.01,
        confidence: float = 0.95,
        patience: int = 500_000,
        watch: int = 100_000,
        every: int = 10_000,
    ) -> None:
        if not 0 < worse < 1:
            raise ConfigError(f"worse must be a share of the log loss in (0, 1), got {worse!r}")
        for name, value in (("patience", patience), ("watch", watch), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a number of labels >= 1, got {value!r}")
        self.worse = worse
        self.confidence = confidence
        self.patience = patience
        self.watch = watch
        self.every = every
        looks = -(-watch // every)
        self._trial = _Comparison(confidence)
        self._watch = _Comparison(1 - (1 - confidence) / looks)
        self._models: dict[str, Model | None] = dict.fromkeys(_SCORES)
        self._versions: dict[str, int | None] = dict.fromkeys(_SCORES)
        self._store: Store | None = None
        self._load: Callable[[int], Model] | None = None
        self._left = 0  # labels for which the champion is still watched

    def attach(self, store: Store, load: Callable[[int], Model]) -> None:
        """Decide for this store; `load` gives the model of one of its versions. A trainer does that."""
        self._store, self._load = store, load

    # -- what each impression and each label brings --------------------------------------------------------------------

    def note(self, batch: Batch) -> NDArray[Any]:
        """`(rows,)`: the scores of the models that are compared."""
        notes = np.zeros(len(batch), dtype=self.notes)
        notes["trial"], notes["watch"] = self._trial.number, self._watch.number
        for name, model in self._models.items():
            if model is not None:
                notes[name] = model.predict(batch)
        return notes

    def update(self, labels: NDArray[np.float32], notes: NDArray[Any]) -> None:
        """Compare what was noted by the labels, in order; notes of a comparison that is over are left out."""
        here = notes["trial"] == self._trial.number
        if self._models["challenger"] is not None:
            self._trial.update(labels[here], notes["challenger"][here], notes["champion"][here])
        here = notes["watch"] == self._watch.number
        if self._models["before"] is None:
            return
        while here.any():  # in pieces that end where a comparison begins anew, however the labels come
            rows = np.flatnonzero(here)
            if self._watch.seen < self.every:
                rows = rows[: self.every - self._watch.seen]
            self._watch.update(labels[rows], notes["champion"][rows], notes["before"][rows])
            self._left -= len(rows)
            here[: rows[-1] + 1] = False
            if self._watch.seen == self.every and not self._regressed():
                self._watch.again()

    def _regressed(self) -> bool:
        return self._watch.low > self.worse

    # -- decisions -----------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether there is something to decide."""
        if self._models["before"] is not None and (self._regressed() or self._left <= 0):
            return True
        trial = self._trial
        on = self._models["challenger"] is not None
        return on and (trial.high < self.worse or trial.low > 0 or trial.seen >= self.patience)

    def decide(self) -> None:
        """Promote, turn down, roll back, and begin the next trial; where nothing is due, that alone. Writes to the
        store. Raises `StoreError`."""
        store, versions = self._require(), self._versions
        if store.served.pinned() not in versions.values():
            self._follow()  # somebody else has decided
        if self._models["before"] is not None and self._regressed():
            self._serve(
                versions["before"],
                f"version {versions['champion']} is worse than {versions['before']}: its log loss is higher by "
                f"{self._watch.low:.2%} at least, over {self._watch.seen:,} labels",
            )
            self._follow()
        elif self._models["before"] is not None and self._left <= 0:
            self._end_watch()
        trial = self._trial
        if self._models["challenger"] is not None and self.due:
            told = f"its log loss differs by {trial.low:+.2%} to {trial.high:+.2%} over {trial.seen:,} labels"
            if trial.high < self.worse:
                self._serve(versions["challenger"], f"not worse than version {versions['champion']}: {told}")
                self._versions.update(before=versions["champion"], champion=versions["challenger"])
                self._models.update(before=self._models["champion"], champion=self._models["challenger"])
                self._watch.begin()
                self._left = self.watch
            else:
                why = "it is worse" if trial.low > 0 else "no answer"
                store.served.note(f"version {versions['challenger']} is turned down: {why}: {told}")
            self._end_trial()
        self._begin()

    def _serve(self, version: int | None, why: str) -> None:
        store = self._require()
        assert version is not None
        if store.served.pinned() != version:  # decided before a crash, and now once more
            store.served.pin(version, why=why)

    def _end_trial(self) -> None:
        self._models["challenger"] = self._versions["challenger"] = None
        self._trial.begin()

    def _end_watch(self) -> None:
        self._models["before"] = self._versions["before"] = None
        self._watch.begin()

    def _follow(self) -> None:
        """Go on with what the store says is served, in place of what was compared until now."""
        self._end_trial()
        self._end_watch()
        self._models["champion"] = self._versions["champion"] = None

    def _begin(self) -> None:
        """The next trial, if there is a version newer than what was tried last."""
        store = self._require()
        newest = store.versions.latest()
        if newest is None:
            return
        served = store.served.pinned()
        if served is None:
            store.served.pin(newest.number, why="the first version, with nothing to compare it to")
            served = newest.number
        if served != self._versions["champion"]:  # at first, after a rollback, or when somebody has decided otherwise
            self._follow()
            self._models["champion"], self._versions["champion"] = self._read(served), served
        if self._models["challenger"] is None and newest.number not in (served, self._trial.last):
            self._models["challenger"], self._versions["challenger"] = self._read(newest.number), newest.number
            self._trial.last = newest.number
            store.served.challenge(newest.number)

    def _read(self, version: int) -> Model:
        self._require()
        assert self._load is not None
        return self._load(version)

    def _require(self) -> Store:
        if self._store is None:
            raise ConfigError("this gate has no store: give it to a trainer that has one, OnlineTrainer(gate=, store=)")
        return self._store

    # -- saving --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The versions that are compared, by number, and the comparisons; cut now."""
        return {
            "versions": dict(self._versions),
            "trial": self._trial.state_dict(),
            "watch": self._watch.state_dict(),
            "left": self._left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from; the models are read from the store."""
        self._trial.load_state_dict(state["trial"])
        self._watch.load_state_dict(state["watch"])
        self._left = int(state["left"])
        self._versions = {name: state["versions"][name] for name in _SCORES}
        try:
            self._models = {name: None if n is None else self._read(n) for name, n in self._versions.items()}
        except StoreError:  # turned down and removed before the process was killed: there is nothing left to compare
            self._follow()


class _Comparison:
    """Of two models, as shares of the second one's log loss. `number`: which one it is, so that notes find theirs."""

    def __init__(self, confidence: float) -> None:
        self._difference = LossDifference(confidence=confidence)
        self._loss = LogLoss()
        self.number = 1
        self.last: int | None = None
        """The version tried last."""

    @property
    def seen(self) -> int:
        """Labels so far, those that could not be judged among them."""
        return self._difference.count + self._difference.skipped

    @property
    def low(self) -> float:
        """The share of log loss that the first loses more, at least."""
        return self._share(self._difference.interval()[0])

    @property
    def high(self) -> float:
        """The same, at most."""
        return self._share(self._difference.interval()[1])

    def _share(self, nats: float) -> float:
        loss = self._loss.compute()
        return nats / loss if loss > 0 else (np.inf if nats > 0 else -np.inf)

    def update(self, labels: NDArray[np.float32], first: NDArray[np.float32], second: NDArray[np.float32]) -> None:
        self._difference.update(labels, first, second)
        self._loss.update(labels, second)

    def again(self) -> None:
        """Forget the labels so far."""
        self._difference, self._loss = self._difference.fresh(), self._loss.fresh()

    def begin(self) -> None:
        """The next one: notes taken until now are of none."""
        self.again()
        self.number += 1

    def state_dict(self) -> dict[str, Any]:
        parts = {"difference": self._difference.state_dict(), "loss": self._loss.state_dict()}
        return {**parts, "number": self.number, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._difference.load_state_dict(state["difference"])
        self._loss.load_state_dict(state["loss"])
        self.number, self.last = int(state["number"]), state["last"]
