"""Fine-tuning: which weights of an encoder learn, by what steps, and from what it reads. Settings, without memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Union

import msgspec

from streamrec.errors import ConfigError
from streamrec.schema import Schema, Text

__all__ = ["AdamW", "Full", "LoRA", "Pair", "Top", "Tune"]


class Full(msgspec.Struct, frozen=True, tag_field="tune", tag="full"):
    """All weights learn."""


class Top(msgspec.Struct, frozen=True, tag_field="tune", tag="top"):
    """The last `layers` layers and the head learn; 0: the head alone.

    What the layers below make of a pair never changes, so it is computed once a pair and kept: at most `cache_bytes`
    of it, the least recently used go first. A title of nine tokens at a width of 384 takes 14 kB, or, for the head
    alone, 1.5 kB.
    """

    layers: int = 2
    cache_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        _whole(self, "layers", 0)
        _whole(self, "cache_bytes", 0)


class LoRA(msgspec.Struct, frozen=True, tag_field="tune", tag="lora"):
    """Hu et al. 2021, by `peft`: beside the matrices of the modules named `targets`, a product of two of rank `rank`,
    times `alpha` / `rank`, learns; and the head. Needs `pip install "streamrec[lora]"`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = msgspec.field(default_factory=lambda: ["query", "value"])

    def __post_init__(self) -> None:
        _whole(self, "rank", 1)
        _number(self, "alpha", 1e-6, 1e6)
        _number(self, "dropout", 0.0, 0.99)
        if not self.targets:
            raise ConfigError("LoRA: targets must name modules, such as query and value, got none")


Tune = Union[Full, Top, LoRA]


class AdamW(msgspec.Struct, frozen=True, kw_only=True):
    """One step of fine-tuning: `torch.optim.AdamW` over `batch_size` examples.

    `micro_batch`: examples that go through the model at once, in ascending order of length, their gradients summed;
    None: all of them. Where memory runs out it is halved, and the step begins again. `clip`: the largest norm of a
    step's gradient; None: any. `warmup`: the steps in which the rate rises to `lr`. `weight_decay`: of matrices, not of
    biases and norms. `bf16`: autocast to bfloat16 while learning, for processors that have it.

    With `weight_decay=0` and `clip=None` it is Adam, by which BERT was first fine-tuned:

    >>> AdamW(lr=1e-4, weight_decay=0.0, clip=None).batch_size
    16
    """

    lr: float = 2e-5
    batch_size: int = 16
    micro_batch: int | None = None
    warmup: int = 0
    clip: float | None = 1.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    bf16: bool = False

    def __post_init__(self) -> None:
        _whole(self, "batch_size", 1)
        _whole(self, "warmup", 0)
        if self.micro_batch is not None:
            _whole(self, "micro_batch", 1)
        if self.clip is not None:
            _number(self, "clip", 1e-12, 1e12)
        for name, least, most in (
            ("lr", 1e-12, 1e3),
            ("weight_decay", 0.0, 1e3),
            ("beta1", 0.0, 0.9999999),
            ("beta2", 0.0, 0.9999999),
            ("eps", 1e-30, 1.0),
        ):
            _number(self, name, least, most)


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """What a cross-encoder reads of a row: two texts, each made of `Text` fields joined by a space.

    `query`, `item`: names of fields; without `query` it reads the item's text alone. `max_tokens`: of both together,
    special tokens among them, the longer one is cut first; None: 128, or what
    the model has positions for. While learning, and off by default: `drop`: the share of
    tokens left out (special ones never are), `mask`: the share of tokens put under the mask token, in spans of `span`.
    """

    query: list[str] = msgspec.field(default_factory=list)
    item: list[str] = msgspec.field(default_factory=list)
    max_tokens: int | None = None
    drop: float = 0.0
    mask: float = 0.0
    span: int = 3

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _whole(self, "max_tokens", 5)
        _whole(self, "span", 1)
        _number(self, "drop", 0.0, 0.9)
        _number(self, "mask", 0.0, 0.9)
        if not self.item:
            raise ConfigError('Pair: item must name a Text field of the schema, such as ["title"], got none')

    @property
    def augments(self) -> bool:
        """Whether tokens are changed while learning."""
        return self.drop > 0 or self.mask > 0

    def columns(self, schema: Schema) -> tuple[Sequence[int], Sequence[int]]:
        """Which columns of a batch's `text_refs` are the query's, and which the item's. Raises `ConfigError`."""
        texts = [field.name for field in schema if isinstance(field, Text)]
        lost = [name for name in (*self.query, *self.item) if name not in texts]
        if lost:
            raise ConfigError(
                f"{', '.join(map(repr, lost))} is no Text field of the schema, which has {', '.join(texts) or 'none'}: "
                "add Text(name) to it, or name another"
            )
        return [texts.index(name) for name in self.query], [texts.index(name) for name in self.item]

    @classmethod
    def of(cls, schema: Schema) -> Pair:
        """The schema's only Text field as the item, or its first of two as the query. Raises `ConfigError`."""
        texts = [field.name for field in schema if isinstance(field, Text)]
        if not 1 <= len(texts) <= 2:
            raise ConfigError(
                f"the schema has {len(texts)} Text fields: say which are read, as "
                'pair=Pair(query=["query"], item=["title"])'
            )
        return cls(query=texts[:-1], item=texts[-1:])


def _whole(settings: Any, name: str, least: int) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{type(settings).__name__}: {name} must be a whole number >= {least}, got {value!r}")


def _number(settings: Any, name: str, least: float, most: float) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ConfigError(
            f"{type(settings).__name__}: {name} must be a number from {least:g} to {most:g}, got {value!r}"
        )
    if not math.isfinite(value):
        raise ConfigError(f"{type(settings).__name__}: {name} must be finite, got {value!r}")
