"""A space of settings to search in, and the FM that a point of it describes. Without memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import msgspec
import numpy as np

from streamrec.errors import ConfigError
from streamrec.models.fm import FM
from streamrec.models.optimizers import Optimizer

__all__ = [
    "OF_FM",
    "Choice",
    "Dimension",
    "Params",
    "Real",
    "Space",
    "Whole",
    "best_of",
    "require_names",
    "with_settings",
]

OF_FM = ("dim", "init", "seed", "optimizer", "linear_optimizer")
"""The arguments of an FM that a point may have, by name; of the last two a setting as well, as `"optimizer.lr"`."""
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

    def near(self, value: float, share: float, reach: float) -> float:
        """A neighbour of `value`: the `share`, from -1 to 1, of the way to `reach` times as much or as little; or, of a
        space that is not logarithmic, of a quarter of it times log10 `reach`.

        >>> Real(0.001, 1.0, log=True).near(0.1, 0.5, reach=4.0), Real(0.0, 1.0).near(0.9, 1.0, reach=10.0)
        (0.2, 1.0)
        """
        span = (self.high - self.low) / 4 * math.log10(reach)
        found = value * reach**share if self.log else value + share * span
        return min(self.high, max(self.low, found))

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

    def near(self, value: float, share: float, reach: float) -> int:
        """A neighbour of `value`, as `Real.near`, rounded."""
        return round(Real(self.low, self.high, self.log).near(value, share, reach))

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

    def near(self, value: Any, share: float, reach: float) -> Any:
        """`value` for three quarters of all `share`, from -1 to 1, else each of them for as many: names have no
        neighbours."""
        beyond = max(0.0, (abs(share) - 0.75) * 4)
        return value if not beyond else self.values[min(int(beyond * len(self.values)), len(self.values) - 1)]

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


def best_of(losses: Mapping[int, float | None], count: int) -> list[int]:
    """The `count` numbers with the lowest loss, in ascending order: those that successive halving goes on with.

    Ties go to the lower number; None and nan are of what could not be judged, which never goes on.

    >>> best_of({0: 0.5, 1: 0.4, 2: None, 3: 0.4}, 2)
    [1, 3]
    """
    judged = [(loss, one) for one, loss in losses.items() if loss is not None and not math.isnan(loss)]
    return sorted(one for _, one in sorted(judged)[:count])


def require_names(names: Iterable[str], more: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for a name that is none of an FM's, and none of `more`."""
    for name in names:
        of, dot, _ = name.partition(".")
        if name not in (*OF_FM, *more) and not (dot and of in ("optimizer", "linear_optimizer")):
            raise ConfigError(
                f"an FM has no {name!r} to search in: it has {', '.join((*OF_FM, *more))}, and settings such as "
                '"optimizer.lr"; for a model of your own pass make'
            )


def with_settings(base: FM, params: Params) -> dict[str, Any]:
    """The arguments of an FM that is as `base` but for a point's settings. Raises `ConfigError`."""
    found = {name: params.get(name, getattr(base, name)) for name in OF_FM}
    changed: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        of, dot, setting = name.partition(".")
        if dot:
            changed.setdefault(of, {})[setting] = value
    for of, settings in changed.items():
        found[of] = _changed(found[of], settings)
    return found


def _changed(optimizer: Optimizer, settings: Mapping[str, Any]) -> Optimizer:
    unknown = [name for name in settings if name not in optimizer.__struct_fields__]
    if unknown:
        raise ConfigError(f"{type(optimizer).__name__} has no {', '.join(unknown)}; it is {optimizer!r}")
    # by the constructor, which checks them
    return type(optimizer)(**{name: getattr(optimizer, name) for name in optimizer.__struct_fields__} | dict(settings))
