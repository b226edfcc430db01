"""Where the points of a search come from: a typed space, and who chooses in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, Union

import msgspec
import numpy as np

from streamrec.errors import ConfigError

__all__ = ["Asked", "Choice", "Dimension", "OptunaPoints", "Params", "Points", "RandomPoints", "Real", "Space", "Whole"]

Params = Mapping[str, Any]
"""One point: a value for each name of the space."""


class Real(msgspec.Struct, frozen=True):
    """A number from `low` to `high`; `log`: even in its logarithm, as learning rates should be.

    Raises `ConfigError` where there is no such number.

    >>> 0.01 <= Real(0.01, 1.0, log=True).draw(np.random.default_rng(0)) <= 1.0
    True
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def draw(self, rng: np.random.Generator) -> float:
        """A value at random."""
        if self.log:
            return min(self.high, max(self.low, math.exp(rng.uniform(math.log(self.low), math.log(self.high)))))
        return float(rng.uniform(self.low, self.high))


class Whole(msgspec.Struct, frozen=True):
    """A whole number from `low` to `high`, both included; `log`: even in its logarithm.

    >>> {Whole(1, 3).draw(np.random.default_rng(n)) for n in range(20)} == {1, 2, 3}
    True
    """

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        for value in (self.low, self.high):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"Whole takes whole numbers, got {value!r}; Real takes others")
        _check(self)

    def draw(self, rng: np.random.Generator) -> int:
        """A value at random."""
        if self.log:
            drawn = math.floor(math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1))))
            return min(self.high, max(self.low, drawn))
        return int(rng.integers(self.low, self.high, endpoint=True))


class Choice(msgspec.Struct, frozen=True):
    """One of these values, whatever they are: optimizers, numbers, names.

    >>> Choice((8, 16)).draw(np.random.default_rng(0)) in (8, 16)
    True
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if type(self.values) not in (list, tuple) or not self.values:
            raise ConfigError(f"Choice takes a tuple of one value or more, got {self.values!r}")
        msgspec.structs.force_setattr(self, "values", tuple(self.values))

    def draw(self, rng: np.random.Generator) -> Any:
        """One of them at random."""
        return self.values[int(rng.integers(len(self.values)))]


def _check(one: Real | Whole) -> None:
    if not -math.inf < one.low <= one.high < math.inf:
        raise ConfigError(f"{one!r}: low must not be above high, and both finite")
    if one.log and not one.low > 0:
        raise ConfigError(f"{one!r}: with log=True, low must be > 0")


Dimension = Union[Real, Whole, Choice]
Space = Mapping[str, Dimension]


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
