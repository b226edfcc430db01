"""Tuner: several FMs learn the same stream by different settings; bad ones make room for others near the best."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.evaluators import CTR, LogLoss
from streamrec.evaluators.formulas import normalized_entropy
from streamrec.models.fm import FM
from streamrec.models.space import Choice, Params, Real, Space, Whole, best_of, require_names, with_settings
from streamrec.models.variants import variant
from streamrec.protocols import State

__all__ = ["Rung", "Tuner"]

LOOK = 256
"""Events between two looks at whether a rung is over: the same ones, however the stream is cut."""
_ROWS = 32  # of the table for each label of a rung: to copy so many costs less than a tenth of what learning one does
_LONGEST = 100  # times `every`: a rung is no longer, so that an endless stream is searched without end
_KEPT = 0.5  # of what a learner lost in earlier rungs, how much counts still
_STAY = 0.5  # the share of the learners that goes on after a rung
_RUNGS = 200  # kept to be told


class Rung(NamedTuple):
    """What came out of one: `labels` by which the learners were judged, the `loss` of the best and of the worst in
    nats, the settings of the `best`, and how many were `stopped`."""

    labels: int
    loss: float
    worst: float
    best: Params
    stopped: int


class Tuner:
    """A model for `OnlineTrainer`: `learners` FMs on one stream, of which the best serves.

    The first is `model`; the others go on from it, too, by settings around its own in `space`: a `Real`, `Whole` or
    `Choice` (of `streamrec.models`) by name, as `"optimizer.lr"`, `"linear_optimizer.l2"`, `"dim"` or `"optimizer"`.
    Each scores and learns every event; decoding, joining and encoding happen once. A *rung* is over when `every` labels
    have come of impressions that were scored in it; as the stream grows long, a twentieth of all labels so far, or a
    32nd of the leader's rows if that is more, up to 100 times `every`. Each learner is judged by the log loss of the
    scores it gave when the impression was shown, all by the same impressions. Then the worse half is stopped, and in
    its place others begin that have learned what the best has (see `models.variants`), with settings around its: the
    first at most `reach` times as large or as small, the next √`reach` times, and so on. Where even the best was worse
    than always saying the average click rate, they begin untrained: what it has learned is of no use. The best is
    served, and published as the FM it is; a gate tries it like any other version.

    The size of micro-batches is no setting: it changes no bit of any result. `threads`: learners at work at a time.
    A `dim` that is new to this machine is compiled for some seconds when it is first tried: give a `Choice` of few.

    Memory: that of all learners. A checkpoint holds all of them, whole. Time: that of all learners, and of what comes
    before the model once; docs/tuning.md says how much. Raises `ConfigError`.

    >>> from streamrec import FM, FTRL, Id, Impression, Labeled, OnlineTrainer, Schema, Tuner
    >>> model = FM(Schema(Id("item")), dim=4, linear_optimizer=FTRL(lr=0.002))
    >>> tuner = Tuner(model, {"linear_optimizer.lr": Real(1e-4, 10.0, log=True)}, learners=4, every=500)
    >>> trainer = OnlineTrainer(model=tuner)
    >>> shown = [Impression(f"i{n}", float(n), "u1", f"p{n % 2}") for n in range(4096)]
    >>> _ = trainer.push([Labeled(one, float(one.item == "p1")) for one in shown])
    >>> tuner.rungs > 3, tuner.best["linear_optimizer.lr"] > 0.01
    (True, True)
    """

    def __init__(
        self,
        model: FM,
        space: Space,
        *,
        learners: int = 8,
        every: int = 2_000,
        reach: float = 10.0,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        if type(model) is not FM:
            raise ConfigError(f"model must be an FM, got a {type(model).__name__}")
        if not space:
            raise ConfigError('space must name what to search in, such as {"optimizer.lr": Real(1e-4, 1.0, log=True)}')
        for name, one in space.items():
            if not isinstance(one, (Real, Whole, Choice)):
                raise ConfigError(f"{name!r} must be a Real, Whole or Choice, got {one!r}")
        if "seed" in space:
            raise ConfigError("seed is no setting to search for: leave it out of the space")
        require_names(space)
        for name, value, least in (("learners", learners, 2), ("every", every, 1), ("threads", threads, 1)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}")
        if not 1 < reach <= 1e6:
            raise ConfigError(f"reach must be a factor from 1 (excluded) to 1e6, got {reach!r}")
        if seed < 0:
            raise ConfigError(f"seed must be >= 0, got {seed!r}")
        self.space = dict(space)
        self.every = every
        self.reach = reach
        self.seed = seed
        self.threads = threads
        self.rungs = 0
        """How many are over."""
        self.history: deque[Rung] = deque(maxlen=_RUNGS)
        """The last 200 of them."""
        self._base = FM.from_config(model.config())  # for its settings: the model itself learns
        self._pool = ThreadPoolExecutor(threads, "streamrec tuner") if threads > 1 else None
        self._labels = 0  # in all rungs that are over
        self._place = 0  # of the leader
        self._rate = CTR()  # of the labels of this rung
        start = {name: _start(model, name, one) for name, one in space.items()}
        self._learners = [_Learner(dict(start), model)]
        # evenly, each setting by itself (a Latin hypercube): however few they are, some are on the right side
        rng = np.random.default_rng([seed, 0])
        shares = np.stack([(rng.permutation(learners - 1) + 0.5) / (learners - 1) * 2 - 1 for _ in space], axis=1)
        for place in range(1, learners):
            params = self._near(start, self.reach, shares[place - 1])
            self._learners.append(_Learner(params, variant(model, self._settings(params))))
        self.notes = np.dtype([("rung", np.int64), ("scores", np.float32, (learners,))])
        """What is noted of an impression: in which rung it was scored, and what each learner said of it."""

    def _settings(self, params: Params) -> dict[str, Any]:
        return with_settings(self._base, params)

    def _near(self, params: Params, reach: float, shares: NDArray[np.float64]) -> dict[str, Any]:
        return {
            name: one.near(params[name], share, reach)
            for (name, one), share in zip(self.space.items(), shares.tolist(), strict=True)
        }

    # -- a model -------------------------------------------------------------------------------------------------------

    @property
    def schema(self) -> Any:
        """That of all learners."""
        return self._base.schema

    @property
    def leader(self) -> FM:
        """The learner that serves."""
        return self._learners[self._place].model

    @property
    def best(self) -> Params:
        """Its settings."""
        return dict(self._learners[self._place].params)

    @property
    def left_out(self) -> int:
        """Rows that the leader has not learned because something in them was not finite."""
        return self.leader.left_out

    weighs = True  # as FMs do

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows,)`: what the leader says. Changes nothing."""
        return self.leader.predict(batch)

    def predictions(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows, learners)`: what each says. Changes nothing."""
        return np.stack([one.model.predict(batch) for one in self._learners], axis=1)

    def learn(self, batch: Batch, labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """All learn these rows, in order."""
        self._all(lambda model: model.learn(batch, labels, weights))

    def step(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """See `streamrec.protocols.OrderedModel`: all learn, and the leader's scores come back."""
        return np.ascontiguousarray(self.steps(batch, rows, ops, labels, weights)[:, self._place])

    def steps(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """As `step`; float32 `(operations, learners)`: the scores of each."""
        return np.stack(self._all(lambda model: model.step(batch, rows, ops, labels, weights)), axis=1)

    def _all(self, work: Any) -> list[Any]:
        models = [one.model for one in self._learners]
        return [*map(work, models)] if self._pool is None else [*self._pool.map(work, models)]

    def forget(self, field: str, value: str) -> int:
        """As `FM.forget`, of all learners; how many rows of the leader went."""
        gone = [one.model.forget(field, value) for one in self._learners]
        return gone[self._place]

    # -- rungs ---------------------------------------------------------------------------------------------------------

    def noted(self, scores: NDArray[np.float32]) -> NDArray[Any]:
        """`(n,)` of the type `notes`, of `(n, learners)` scores that were given just now."""
        notes = np.empty(len(scores), dtype=self.notes)
        notes["rung"], notes["scores"] = self.rungs, scores
        return notes

    def served(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of `(n, learners)` scores, those of the leader."""
        return np.ascontiguousarray(scores[:, self._place])

    def judge(self, labels: NDArray[np.float32], weights: NDArray[np.float32], notes: NDArray[Any]) -> None:
        """Judge the learners by the scores they gave, in order. What was scored in an earlier rung is left out: others
        were there then."""
        here = notes["rung"] == self.rungs
        if not here.all():
            labels, weights, notes = labels[here], weights[here], notes[here]
        self._rate.update(labels, labels, weights)
        for place, one in enumerate(self._learners):
            one.loss.update(labels, np.ascontiguousarray(notes["scores"][:, place]), weights)
            one.labels += len(labels)

    @property
    def rung_length(self) -> int:
        """By how many labels the learners are judged in this rung."""
        return min(max(self.every, self._labels // 20, self.leader.ids.used // _ROWS), _LONGEST * self.every)

    def turn(self) -> bool:
        """Begin the next rung where this one is over, and say so. Between two events, every `LOOK` of them."""
        if self._learners[0].labels < self.rung_length:
            return False
        losses = {place: one.loss.compute() for place, one in enumerate(self._learners)}
        finite = [loss for loss in losses.values() if math.isfinite(loss)]
        if not finite:
            return False  # no label could be judged
        # differences to the best of the rung, not losses: some rungs are harder than others
        least = min(finite)
        for place, one in enumerate(self._learners):
            one.excess = _KEPT * one.excess + losses[place] - least
        ranked = {place: one.excess for place, one in enumerate(self._learners)}
        staying = best_of(ranked, max(1, round(len(self._learners) * _STAY))) or [self._place]
        self._place = min(staying, key=lambda place: (ranked[place], place))
        leader = self._learners[self._place]
        spoilt = normalized_entropy(losses[self._place], self._rate.compute(), 1.0) > 1
        self._rate = CTR()
        reach, stopped = self.reach, 0
        self.rungs += 1
        rng = np.random.default_rng([self.seed, self.rungs])  # by its number: nothing random need be saved
        for place, one in enumerate(self._learners):
            if place not in staying:
                params = self._near(leader.params, reach, rng.uniform(-1.0, 1.0, len(self.space)))
                settings = self._settings(params)
                model = FM(self.schema, **settings) if spoilt else variant(leader.model, settings)
                self._learners[place] = _Learner(params, model, leader.excess)
                reach, stopped = math.sqrt(reach), stopped + 1
            else:
                one.loss = LogLoss()
        judged = leader.labels
        for one in self._learners:
            one.labels = 0
        self._labels += judged
        self.history.append(Rung(judged, losses[self._place], max(finite), dict(leader.params), stopped))
        return True

    def __str__(self) -> str:
        """The learners, the one that serves first."""
        names = list(self.space)
        lines = [["", *names]]
        order = sorted(range(len(self._learners)), key=lambda place: (self._learners[place].excess, place))
        for place in [self._place, *(one for one in order if one != self._place)]:
            params = self._learners[place].params
            told = [f"{params[name]:.4g}" if isinstance(params[name], float) else str(params[name]) for name in names]
            lines.append(["serves" if place == self._place else "", *told])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)
        return f"{table}\n\n{self.rungs} rungs, {self._labels:,} labels"

    # -- saving --------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as what JSON can hold, but for `threads`, which change nothing."""
        return {
            "model": self._base.config(),
            "space": {name: [type(one).__name__, _plain(one)] for name, one in self.space.items()},
            "learners": len(self._learners),
            "every": self.every,
            "reach": self.reach,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The tuner that `config` describes, untrained. Raises `ConfigError` where its choices are no plain values."""
        kinds = {kind.__name__: kind for kind in (Real, Whole, Choice)}
        space: dict[str, Any] = {name: kinds[kind](**settings) for name, (kind, settings) in config["space"].items()}
        rest = {name: config[name] for name in ("learners", "every", "reach", "seed")}
        return cls(FM.from_config(config["model"]), space, **rest)

    def published(self) -> State:
        """What a scorer needs of the leader, whose `config` it is built by."""
        return self.leader.published()

    def state_dict(self) -> dict[str, Any]:
        """All learners with their settings, and how this rung stands; cut now."""
        return {
            "learners": [
                {
                    "params": {name: _packed(self.space[name], value) for name, value in one.params.items()},
                    "model": dict(one.model.state_dict()),
                    "excess": one.excess,
                    "loss": one.loss.state_dict(),
                    "labels": one.labels,
                }
                for one in self._learners
            ],
            "leader": self._place,
            "rungs": self.rungs,
            "labels": self._labels,
            "rate": self._rate.state_dict(),
            "history": [
                {**rung._asdict(), "best": {name: _packed(self.space[name], rung.best[name]) for name in self.space}}
                for rung in self.history
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where that had other learners or another space."""
        saved: Sequence[Mapping[str, Any]] = state["learners"]
        if len(saved) != len(self._learners) or any(set(one["params"]) != set(self.space) for one in saved):
            raise ConfigError(
                f"the state is of {len(saved)} learners that differ in {', '.join(saved[0]['params'])}, not of "
                f"{len(self._learners)} in {', '.join(self.space)}: give the tuner the settings it had"
            )
        learners = []
        for one in saved:
            params = self._unpacked(one["params"])
            learner = _Learner(params, FM(self.schema, **self._settings(params)), float(one["excess"]))
            learner.model.load_state_dict(dict(one["model"]))
            learner.loss.load_state_dict(one["loss"])
            learner.labels = int(one["labels"])
            learners.append(learner)
        self._learners = learners
        self._place, self.rungs, self._labels = int(state["leader"]), int(state["rungs"]), int(state["labels"])
        self._rate.load_state_dict(state["rate"])
        told = [Rung(**{**rung, "best": self._unpacked(rung["best"])}) for rung in state["history"]]
        self.history = deque(told, maxlen=_RUNGS)

    def _unpacked(self, packed: Mapping[str, Any]) -> dict[str, Any]:
        space = self.space
        return {
            name: choice.values[packed[name]] if isinstance(choice := space[name], Choice) else packed[name]
            for name in space
        }


class _Learner:
    """One of them: its settings, and how it does. `excess`: nats by which it was worse than the best, in this rung and
    half as much in each before."""

    def __init__(self, params: dict[str, Any], model: FM, excess: float = 0.0) -> None:
        self.params = params
        self.model = model
        self.excess = excess
        self.loss = LogLoss()
        self.labels = 0  # in this rung, those that cannot be judged among them


def _start(model: FM, name: str, one: Any) -> Any:
    """What a model has under the name of a setting. Raises `ConfigError` where that is outside of the space."""
    of, dot, setting = name.partition(".")
    value = getattr(model, of)
    if dot:
        if setting not in value.__struct_fields__:
            raise ConfigError(f"{type(value).__name__} has no {setting}; it is {value!r}")
        value = getattr(value, setting)
    inside = value in one.values if isinstance(one, Choice) else one.low <= value <= one.high
    if not inside:
        raise ConfigError(f"the model has {name}={value!r}, which is not in {one!r}: the search begins there")
    return value


def _plain(one: Any) -> Any:
    return msgspec.to_builtins(one, enc_hook=repr)


def _packed(one: Any, value: Any) -> Any:
    """A setting as a state may hold it: of a choice, which it is."""
    return one.values.index(value) if isinstance(one, Choice) else value
