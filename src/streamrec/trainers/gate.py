"""Gate: a new version is served when it is not worse than the one that is, and taken back when it turns out to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.batch import Batch
from streamrec.errors import ConfigError, DamagedError, StoreError, UnreachableError
from streamrec.evaluators._accumulate import CLIP
from streamrec.protocols import Model
from streamrec.storage import Store
from streamrec.trainers._compare import Comparison, Watch
from streamrec.trainers._recent import Recent

__all__ = ["Gate"]

_SCORES = ("before", "champion", "challenger")


class Gate:
    """Tries each new version in the shadow of the one that is served, on the same impressions, before it is served.

    What is served is the *champion*. The newest version that a trainer has published becomes the *challenger*. Both
    score every impression as it comes, frozen as they are, and their losses are compared when its label is known. As
    soon as an interval that holds at all times (see `LossDifference`) lies below `worse`, the challenger is certainly
    not worse by more than that, and `store.served` is pinned to it; as soon as it lies above 0, it is certainly worse,
    and is turned down; after `patience` labels without an answer it is turned down, too. Then the newest is tried.

    A champion is watched: for `watch` labels the one *before* it goes on scoring, and is served again when the champion
    is certainly worse by more than `worse`, over all of them or over the last `every` at most, so that what went well
    for long does not hide what goes wrong now. What comes before is the newest that was promoted `watch` labels ago,
    however many were promoted since: wrong labels may promote what they taught, again and again, but for as long as
    there were fewer of them than that, what to go back to was there before them.

    `recover`: the learner is watched, too, by the scores it gives itself. When it is certainly worse, by more than
    `worse`, than the version before, or the champion where that is watched no more, then the trainer goes back to the
    checkpoint of the newest version since whose loss on these labels is not told apart from the least: to its weights,
    optimizer memory, ids, normalisers and calibration. The source, the join and the metrics go on where they are.
    Labels that were flipped for an hour cannot be told from a world that has changed while they come; they are
    unlearned when the labels are right again.

    Each decision and its reason is in `store.served.history()`. Decisions are made between two pushes: one that is due
    makes a checkpoint due.

    `worse`: a share of the log loss, and so of the normalized entropy. `confidence`: of one trial, and of `watch`
    labels of a watch: of equally good challengers so many at least are not turned down as worse, of champions that
    are not worse so many are not taken back, and of learners that are not so many go on. Of challengers that are worse
    by `worse` or more, half of the others at most are promoted.

    Memory: two more models, three while a champion is watched; their versions and, with `recover`, their checkpoints
    stay in the store. Raises `ConfigError` for arguments that cannot work.
    """

    notes = np.dtype(
        [(name, np.int64) for name in ("trial", "watch", "learning")]
        + [(name, np.float32) for name in (*_SCORES, "learner")]
    )
    """What is noted of an impression: which comparisons it is part of, and what each model says of it."""

    def __init__(
        self,
        *,
        worse: float = 0.0075,
        confidence: float = 0.95,
        patience: int = 500_000,
        watch: int = 50_000,
        every: int = 2_500,
        recover: bool = True,
    ) -> None:
        if not 0 < worse < 1:
            raise ConfigError(f"worse must be a share of the log loss in (0, 1), got {worse!r}")
        if not 0.5 < confidence < 1:
            raise ConfigError(f"confidence must be a probability in (0.5, 1), got {confidence!r}")
        for name, value in (("patience", patience), ("watch", watch), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a number of labels >= 1, got {value!r}")
        if every > watch:
            raise ConfigError(f"every must be at most watch={watch!r} labels, got {every!r}")
        self.worse = worse
        self.confidence = confidence
        self.patience = patience
        self.watch = watch
        self.every = every
        self.recover = recover
        self._trial = Comparison(confidence)
        self._watch = Watch(worse, confidence, every, watch)
        self._learning = Watch(worse, confidence, every, watch)
        self._models: dict[str, Model | None] = dict.fromkeys(_SCORES)
        self._versions: dict[str, int | None] = dict.fromkeys(_SCORES)
        self._line: list[tuple[int, int]] = []  # champions since the one before, and at which label
        self._past: list[int] = []  # those that were in it when the one before was served again
        self._recent = Recent(every)  # what the learner's watch has seen
        self._earlier: set[int] = set()  # of the checkpoint on disk: a run that breaks now goes on from that one
        self._store: Store | None = None
        self._load: Callable[[int], Model] | None = None
        self._labels = 0
        self._time: float | None = None  # of the newest impression whose label is known

    def forget(self) -> None:
        """Let go of the last impressions, for a user of them is to be forgotten."""
        self._watch_learner()

    def attach(self, store: Store, load: Callable[[int], Model]) -> None:
        """Decide for this store; `load` gives the model of one of its versions. A trainer does that."""
        self._store, self._load = store, load
        store.hold(lambda: self._used() | self._earlier, checkpoints=self.recover)

    def _used(self) -> set[int]:
        used = [*self._versions.values(), *self._past, *(version for version, _ in self._line)]
        return {version for version in used if version is not None}

    # -- what each impression and each label brings --------------------------------------------------------------------

    def note(self, batch: Batch) -> NDArray[Any]:
        """`(rows,)`: the scores of the models that are compared; that of the learner is `learned` later."""
        notes = np.zeros(len(batch), dtype=self.notes)
        notes["trial"], notes["watch"] = self._trial.number, self._watch.number
        notes["learning"] = self._learning.number
        for name, model in self._models.items():
            if model is not None:
                notes[name] = model.predict(batch)
        return notes

    def update(self, labels: NDArray[np.float32], notes: NDArray[Any], shown: Batch) -> None:
        """Compare what was noted of these impressions by their labels, in order; notes of a comparison that is over are
        left out."""
        self._labels += len(labels)
        if len(shown.times):
            self._time = max(float(shown.times.max()), -math.inf if self._time is None else self._time)
        here = notes["trial"] == self._trial.number
        if self._models["challenger"] is not None:
            self._trial.update(labels[here], notes["challenger"][here], notes["champion"][here])
        here = notes["watch"] == self._watch.number
        if self._models["before"] is not None:
            self._watch.update(labels[here], notes["champion"][here], notes["before"][here])
        here = notes["learning"] == self._learning.number
        if self.recover and self._anchor is not None:
            self._learning.update(labels[here], notes["learner"][here], notes[self._anchor][here])
            self._recent.add(shown.take(np.flatnonzero(here)), labels[here])

    @property
    def _anchor(self) -> str | None:
        """What the learner is compared to."""
        return next((name for name in ("before", "champion") if self._models[name] is not None), None)

    # -- decisions -----------------------------------------------------------------------------------------------------

    @property
    def regressed(self) -> bool:
        """Whether the learner has to go back, which is not to wait for anything."""
        return self.recover and self._anchor is not None and self._learning.regressed

    @property
    def due(self) -> bool:
        """Whether there is something to decide."""
        if self.regressed or self._watch.regressed or self._watched:
            return True
        return self._models["challenger"] is not None and self._answered

    @property
    def _watched(self) -> bool:
        """Whether the first in the line has been watched for long enough."""
        return bool(self._line) and self._labels - self._line[0][1] >= self.watch

    @property
    def _answered(self) -> bool:
        trial = self._trial
        return trial.high < self.worse or trial.low > 0 or trial.seen >= self.patience

    def decide(self, restore: Callable[[int], Callable[[], object]] | None = None, *, saved: bool = True) -> None:
        """Promote, turn down, roll back, and begin the next trial; where nothing is due, that alone. Writes to the
        store. Raises `StoreError`: what could not be written is decided the next time.

        `restore`: reads what the learner was when a version was cut, and returns what makes it so; raises
        `DamagedError` where the checkpoint of that cannot be read, and an older one is tried. `saved`: the checkpoint
        before this is on disk.
        """
        store = self._require()
        self._earlier = self._used() if saved else self._earlier | self._used()
        if store.served.pinned() not in self._used():
            self._follow()  # somebody else has decided, and not this gate just before a crash
        if self.regressed:
            self._go_back(restore)
        if self._watch.regressed:
            self._roll_back()
        if self._watched:
            self._move_up()
        trial, versions = self._trial, self._versions
        if self._models["challenger"] is not None and self._answered:
            told = f"its log loss differs by {trial.low:+.2%} to {trial.high:+.2%} over {trial.seen:,} labels"
            if trial.high < self.worse:
                self._serve(versions["challenger"], f"not worse than version {versions['champion']}: {told}")
                self._promote()
            else:
                why = "it is worse" if trial.low > 0 else "no answer"
                store.served.note(f"version {versions['challenger']} is turned down: {why}: {told}", time=self._time)
            self._end_trial()
        self._begin()

    def _roll_back(self) -> None:
        (low, seen), before = self._watch.found, self._versions["before"]
        self._serve(
            before,
            f"version {self._versions['champion']} is worse than {before}: its log loss is higher by {low:.2%} at "
            f"least, over {seen:,} labels",
        )
        model, past = self._models["before"], [version for version, _ in self._line]
        self._follow()
        self._models["champion"], self._versions["champion"] = model, before
        self._past = past  # they may be better than the one that is served now: the learner's turn will show

    def _go_back(self, restore: Callable[[int], Callable[[], object]] | None) -> None:
        """To the newest version that is as good as the best, of those there were since the one before, by the labels
        that say that the learner is worse; that is served, too, unless what is served is as good."""
        store = self._require()
        (low, seen), anchor, champion = self._learning.found, self._anchor, self._versions["champion"]
        assert anchor is not None and champion is not None
        good, fair = self._candidates(seen)
        why = f"{low:.2%} more log loss at least than version {self._versions[anchor]}, over {seen:,} labels"
        for back in (*good, *fair):
            try:
                take_back = None if restore is None else restore(back)
                break
            except DamagedError as error:
                store.served.note(f"the checkpoint of version {back} cannot be read: {error}", time=self._time)
        else:
            told = f"the learner has {why}; it goes on as it is, for no checkpoint of that is left"
            store.served.note(told, time=self._time)
            self._watch_learner()
            return
        if champion not in good:
            # the version can be read, whatever has become of its checkpoint
            best = good[0] if good else back
            self._serve(best, f"version {champion} is worse than it, of a learner that has {why}")
        store.served.note(f"the learner goes back to the checkpoint of version {back}: it has {why}", time=self._time)
        newest = store.versions.latest()
        if take_back is not None:
            take_back()  # after all that may fail: a learner does not go back twice
        self._follow()
        self._trial.last = None if newest is None else newest.number  # of the learner as it was

    def _candidates(self, seen: int) -> tuple[list[int], list[int]]:
        """The versions to go back to, by the last `seen` labels, newest first: those whose loss is not told apart from
        the least; and others that are not worse than what the learner is compared to, by more than `worse`."""
        store, rows = self._require(), self._recent.last(min(seen, self.every))
        anchor = self._versions[self._anchor or "champion"]
        there = {one.number for one in store.versions.list()}
        names = {*self._past, *(version for version, _ in self._line)} | {
            version for name in ("before", "champion") if (version := self._versions[name]) is not None
        }
        losses: dict[int, NDArray[np.float64]] = {}
        for version in sorted(names & there, reverse=True):
            if rows is None or store.checkpoint_of(version) is None:
                continue
            try:
                scores = np.clip(self._read(version).predict(rows.batch).astype(np.float64), CLIP, 1 - CLIP)
            except DamagedError as error:
                store.served.note(f"version {version} cannot be read: {error}", time=self._time)
                continue
            loss = -np.log(np.where(rows.labels > 0.5, scores, 1 - scores))
            if np.isfinite(loss).all():
                losses[version] = loss
        if not losses:
            return [], []
        means = {version: float(loss.mean()) for version, loss in losses.items()}
        best = losses[min(means, key=lambda version: means[version])]
        good = [
            version
            for version, loss in losses.items()
            if (loss - best).mean() <= 2 * (loss - best).std() / math.sqrt(len(best))
        ]
        reference = next((loss for version, loss in losses.items() if version == anchor), best)
        most = (1 + self.worse) * float(reference.mean())
        return good, [version for version in means if version not in good and means[version] <= most]

    def _serve(self, version: int | None, why: str) -> None:
        store = self._require()
        assert version is not None
        if store.served.pinned() != version:  # decided before a crash, and now once more
            store.served.pin(version, why=why, time=self._time)

    def _promote(self) -> None:
        models, versions = self._models, self._versions
        if models["before"] is None:
            models["before"], versions["before"] = models["champion"], versions["champion"]
            self._watch_learner()  # what it is compared to has another name
        models["champion"], versions["champion"] = models["challenger"], versions["challenger"]
        self._join_line()
        self._watch.begin()

    def _join_line(self) -> None:
        """At most one for each quarter of a watch, so that the line is short."""
        champion = self._versions["champion"]
        assert champion is not None
        if not self._line or self._labels - self._line[-1][1] >= self.watch / 4:
            self._line.append((champion, self._labels))

    def _end_trial(self) -> None:
        self._models["challenger"] = self._versions["challenger"] = None
        self._trial.begin()

    def _move_up(self) -> None:
        """The newest of the line that has been watched long enough is what comes before; where that is the champion,
        nothing does."""
        watched = sum(self._labels - label >= self.watch for _, label in self._line)  # the line is in order
        following, _ = self._line[watched - 1]
        model = None if following == self._versions["champion"] else self._read(following)  # before anything changes
        del self._line[:watched]
        if model is None:
            self._models["before"] = self._versions["before"] = None
        else:
            self._models["before"], self._versions["before"] = model, following
            if not self._line:
                self._join_line()
        self._past = []
        self._watch.begin()
        self._watch_learner()

    def _watch_learner(self) -> None:
        self._learning.begin()
        self._recent.clear()

    def _follow(self) -> None:
        """Go on with what the store says is served, in place of what was compared until now."""
        self._end_trial()
        self._models = dict.fromkeys(self._models)
        self._versions = dict.fromkeys(self._versions)
        self._line, self._past = [], []
        self._watch.begin()
        self._watch_learner()

    def _begin(self) -> None:
        """The next trial, if there is a version newer than what was tried last."""
        store = self._require()
        newest = store.versions.latest()
        if newest is None:
            return
        served = store.served.pinned()
        if served is None:
            store.served.pin(newest.number, why="the first version, with nothing to compare it to", time=self._time)
            served = newest.number
        if served != self._versions["champion"]:  # at first, after a rollback, or when somebody has decided otherwise
            self._follow()
            self._models["champion"], self._versions["champion"] = self._read(served), served
        if self._models["challenger"] is None and newest.number not in (served, self._trial.last):
            model = self._read(newest.number)
            store.served.challenge(newest.number, time=self._time)
            self._models["challenger"], self._versions["challenger"] = model, newest.number
            self._trial.last = newest.number

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
            "learning": self._learning.state_dict(),
            "recent": self._recent.state_dict(),
            "line": [list(one) for one in self._line],
            "past": list(self._past),
            "labels": self._labels,
            "time": self._time,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from; the models are read from the store."""
        self._trial.load_state_dict(state["trial"])
        self._watch.load_state_dict(state["watch"])
        self._learning.load_state_dict(state["learning"])
        self._recent.load_state_dict(state["recent"])
        self._labels, self._time = int(state["labels"]), state["time"]
        self._past = [*map(int, state["past"])]
        self._line = [(int(version), int(label)) for version, label in state["line"]]
        self._versions = {name: state["versions"][name] for name in _SCORES}
        self._earlier = self._used()
        try:
            self._models = {name: None if n is None else self._read(n) for name, n in self._versions.items()}
        except UnreachableError:
            raise
        except StoreError:  # turned down and removed before the process was killed: there is nothing left to compare
            self._follow()
