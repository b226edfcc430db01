"""Optimizers: how one gradient moves a weight. Each keeps its memory per weight; a row that is not touched does not
move.

`SGD`, `Adagrad`, `Adam` follow the formulas of `torch.optim`, so that a kernel can be held against autograd; `FTRL`
follows McMahan et al. 2013, "Ad Click Prediction: a View from the Trenches", algorithm 1.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec
from torch import Tensor

from streamrec.errors import ConfigError

__all__ = ["FTRL", "SGD", "Adagrad", "Adam", "Optimizer", "optimizer_from_dict"]


class _Settings(msgspec.Struct, frozen=True, tag_field="optimizer"):
    """What every optimizer checks of its numbers."""

    # Each rule has `kind`, the number by which the kernels know it; `slots`, float32 numbers remembered per weight; and
    # `row_slots`, those remembered per row besides.

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            # within these, float32 holds whatever the kernels make of it: no weight becomes nan
            if not (1e-30 <= value <= 1e6 or value == 0):
                raise ConfigError(
                    f"{type(self).__name__}: {name} must be a finite number >= 0 (and from 1e-30 to 1e6 where it is "
                    f"not 0), got {value!r}"
                )
            if value < {"lr": 1e-12, "eps": 1e-30}.get(name, 0.0):
                raise ConfigError(f"{type(self).__name__}: {name} must be > 0, got {value!r}")

    def numbers(self, rate: float = 1.0) -> tuple[float, float, float, float, float]:
        """The settings in the order in which the kernels read them, filled up to four, and `rate`, which multiplies
        every step."""
        values = [float(getattr(self, name)) for name in self.__struct_fields__]
        first, second, third, fourth, *_ = [*values, 0.0, 0.0, 0.0, 0.0]
        return rate * first, second, third, fourth, rate


class SGD(_Settings, frozen=True, tag="sgd"):
    """w -= lr (g + l2 w)."""

    kind = 0
    slots = 0
    row_slots = 0
    lr: float = 0.05
    l2: float = 0.0


class Adagrad(_Settings, frozen=True, tag="adagrad"):
    """n += g²; w -= lr g / (√n + eps), with g including l2 w. Duchi et al. 2011.

    `row_wise`: the factors of an id share one n, to which the mean of their g² is added, as in fbgemm's
    `EXACT_ROWWISE_ADAGRAD`. One float32 an id instead of `dim`.
    """

    lr: float = 0.05
    l2: float = 0.0
    eps: float = 1e-10
    row_wise: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.row_wise, bool):
            raise ConfigError(f"Adagrad: row_wise must be True or False, got {self.row_wise!r}")
        super().__post_init__()

    @property
    def kind(self) -> int:
        return 4 if self.row_wise else 1

    @property
    def slots(self) -> int:
        return 0 if self.row_wise else 1

    @property
    def row_slots(self) -> int:
        return 1 if self.row_wise else 0


class FTRL(_Settings, frozen=True, tag="ftrl"):
    """FTRL-proximal: learning rates per weight, `lr` / (`beta` + √n), and exact zeros through `l1`.

    z += g - (√(n + g²) - √n) / lr · w; n += g²; w = 0 where |z| <= l1, else
    -(z - sign(z) l1) / ((beta + √n) / lr + l2).
    """

    kind = 2
    slots = 2
    row_slots = 0
    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta + self.l2 <= 0:
            raise ConfigError(
                "FTRL: beta + l2 must be > 0, or the first weight is divided by zero, "
                f"got {self.beta!r} and {self.l2!r}"
            )

    def numbers(self, rate: float = 1.0) -> tuple[float, float, float, float, float]:
        return 1.0 / self.lr, self.beta, self.l1, self.l2, rate  # the kernels multiply by 1 / lr

    def start(self, weights: Tensor) -> Tensor:
        """The z of weights that have seen no gradient yet: what makes FTRL begin where they stand, not at 0."""
        return -weights * (self.beta / self.lr + self.l2) - self.l1 * weights.sign()


class Adam(_Settings, frozen=True, tag="adam"):
    """Kingma & Ba 2015. The step number that corrects the bias is each row's own: how often it has learned."""

    kind = 3
    slots = 2
    row_slots = 1
    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.beta1, self.beta2) > 1 - 1e-7:  # the next to 1 that float32 knows
            raise ConfigError(f"Adam: beta1 and beta2 must be < 1 - 1e-7, got {self.beta1!r} and {self.beta2!r}")


Optimizer = Union[SGD, Adagrad, FTRL, Adam]


def optimizer_from_dict(saved: Any) -> Optimizer:
    """The optimizer that `msgspec.to_builtins` made plain. Raises `ConfigError` where that is not what it is given."""
    try:
        optimizer: Optimizer = msgspec.convert(saved, Optimizer)
    except msgspec.ValidationError as error:
        raise ConfigError(f"not a saved optimizer: {error}") from error
    return optimizer
