"""Learning-rate schedules: what multiplies the optimizers' steps, by how far a training has come."""

from __future__ import annotations

import math

import msgspec

from streamrec.errors import ConfigError

__all__ = ["Cosine", "Linear"]


class _Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """`warmup`: the share of the training in which the rate rises from 0 to 1. `end`: the rate at its end."""

    warmup: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must be a share of the training from 0 to 1 (excluded), got {self.warmup!r}")
        if not 0 <= self.end <= 1:
            raise ConfigError(f"end must be a rate from 0 to 1, got {self.end!r}")

    def __call__(self, progress: float) -> float:
        """The rate where the share `progress` of the training is done."""
        if progress < self.warmup:
            return progress / self.warmup
        left = 1.0 - min(1.0, (progress - self.warmup) / (1.0 - self.warmup))
        return self.end + (1.0 - self.end) * self._fall(left)

    def _fall(self, left: float) -> float:
        raise NotImplementedError


class Linear(_Schedule, frozen=True):
    """The rate falls in a straight line from 1 to `end`, after it has risen over the share `warmup`.

    >>> Linear(end=0.5)(0.0), Linear(end=0.5)(0.5), Linear(end=0.5)(1.0)
    (1.0, 0.75, 0.5)
    """

    def _fall(self, left: float) -> float:
        return left


class Cosine(_Schedule, frozen=True):
    """The rate falls along half a cosine from 1 to `end`, after it has risen over the share `warmup`.

    Loshchilov & Hutter 2017, eq. 5, without restarts.

    >>> Cosine()(0.0), Cosine()(1.0), Cosine(warmup=0.5)(0.25)
    (1.0, 0.0, 0.5)
    """

    def _fall(self, left: float) -> float:
        return (1.0 - math.cos(math.pi * left)) / 2.0
