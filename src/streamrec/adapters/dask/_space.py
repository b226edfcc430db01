"""Where the points of a search come from: who chooses in its space."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
import numpy as np

from streamrec.errors import ConfigError
from streamrec.models.space import Choice, Params, Space, Whole

__all__ = ["Asked", "OptunaPoints", "Points", "RandomPoints"]


class Asked(Protocol):
    """Points being chosen in one search, in the order of their numbers."""

    def ask(self, number: int) -> Params:
        """Point `number`, from 0 on."""
        ...

    def tell(self, number: int, loss: float | None) -> None:
        """How point `number` did with the smallest budget; None: it could not be judged."""
        ...


class Points(Protocol):
    """Who chooses the points of a search."""

    @property
    def group(self) -> int | None:
        """How many are asked for before the first of them is told; None: all."""
        ...

    def begin(self, space: Space) -> Asked:
        """Begin to choose in this space: the same points each time."""
        ...


class RandomPoints(msgspec.Struct, frozen=True):
    """Points at random, each by `seed` and its number alone."""

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed!r}")

    @property
    def group(self) -> None:
        """All can be asked for at once."""
        return None

    def begin(self, space: Space) -> Asked:
        """See `Points`."""
        return _Drawn(space, self.seed)


class _Drawn:
    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def ask(self, number: int) -> Params:
        rng = np.random.default_rng([self._seed, number])
        return {name: one.draw(rng) for name, one in self._space.items()}

    def tell(self, number: int, loss: float | None) -> None:
        pass  # chance learns nothing


class OptunaPoints:
    """Points that a sampler of Optuna chooses by what it was told of those before: `pip install "streamrec[optuna]"`.

    `sampler`: gives a new one, seeded, each time it is called: `lambda: TPESampler(seed=0)`; a search that is resumed
    asks and tells it again what it was asked and told. `group`: points are asked for so many at a time, however many
    workers there are, so that the points do not depend on them; a sampler learns more from small groups, and large ones
    keep more workers busy. Raises `ConfigError`.
    """

    def __init__(self, sampler: Any, *, group: int = 8) -> None:
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise ConfigError('this needs Optuna: pip install "streamrec[optuna]"') from error
        if not callable(sampler):
            raise ConfigError(f"sampler must be a function that makes one, such as lambda: {sampler!r}")
        if group < 1:
            raise ConfigError(f"group must be >= 1 point, got {group!r}")
        self._sampler = sampler
        self.group = group

    def __repr__(self) -> str:
        return f"OptunaPoints({type(self._sampler()).__name__}, group={self.group})"

    def begin(self, space: Space) -> Asked:
        """See `Points`."""
        return _Studied(space, self._sampler())


class _Studied:
    def __init__(self, space: Space, sampler: Any) -> None:
        import optuna
        from optuna import distributions as of

        self._space = space
        self._study = optuna.create_study(sampler=sampler)
        self._trials: list[Any] = []
        self._kinds: dict[str, of.BaseDistribution] = {}
        for name, one in space.items():
            if isinstance(one, Choice):  # by place, for Optuna would keep only plain values
                self._kinds[name] = of.CategoricalDistribution(range(len(one.values)))
            elif isinstance(one, Whole):
                self._kinds[name] = of.IntDistribution(one.low, one.high, log=one.log)
            else:
                self._kinds[name] = of.FloatDistribution(one.low, one.high, log=one.log)

    def ask(self, number: int) -> Params:
        assert number == len(self._trials), "points are asked for in order"
        trial = self._study.ask(self._kinds)
        self._trials.append(trial)
        return {
            name: one.values[trial.params[name]] if isinstance(one, Choice) else trial.params[name]
            for name, one in self._space.items()
        }

    def tell(self, number: int, loss: float | None) -> None:
        from optuna.trial import TrialState

        if loss is None:
            self._study.tell(self._trials[number], state=TrialState.FAIL)
        else:
            self._study.tell(self._trials[number], loss)
