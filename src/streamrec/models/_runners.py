"""How a sequence classifier is run: without gradients, so that a row's result is its own; and to learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from streamrec.models._activations import Activations
from streamrec.models._packed import FAMILY, Dropout, Packed, Tokens
from streamrec.models.tuning import Top, Tune

__all__ = ["Runner", "runner"]

AT_ONCE = 4096
"""Tokens that go through a model at once where nothing is learned."""


class Runner(Protocol):
    """Rows come distinct and in ascending order of length; logits are float32 `(rows, labels)`."""

    def infer(self, rows: Sequence[Tokens]) -> Tensor:
        """Without gradients and dropout. A row's logits do not depend on the others, bit for bit."""
        ...

    def learn(self, rows: Sequence[Tokens], *, bf16: bool) -> Tensor:
        """With both."""
        ...


def runner(module: Any, tune: Tune, generator: torch.Generator, cache: Activations, version: Any) -> Runner:
    """`version()`: of what does not learn. `generator`: what dropout draws from."""
    if module.config.model_type in FAMILY and getattr(module.config, "position_embedding_type", "absolute") in (
        None,
        "absolute",
    ):
        Dropout.put_into(module, generator)
        return _InLayers(module, tune, cache, version)
    return _Whole(module, generator)


class _InLayers:
    """One of the BERT family, packed: its frozen layers are run once a row."""

    def __init__(self, module: Any, tune: Tune, cache: Activations, version: Any) -> None:
        self._module = module
        self._packed = Packed(module)
        self._depth = len(self._packed.layers) - tune.layers if isinstance(tune, Top) else 0
        self._frozen = isinstance(tune, Top)
        self._cache, self._version = cache, version
        backbone = module.base_model
        learning = [*self._packed.layers[self._depth :], getattr(backbone, "pooler", None)]
        learning += [child for child in module.children() if child is not backbone]
        self._learning = [part for part in learning if part is not None] if self._frozen else [module]

    def infer(self, rows: Sequence[Tokens]) -> Tensor:
        found = []
        for part in _parts(rows):
            lower = self._lower(part) if self._frozen else self._packed.lower(part, 0, firsts=False)
            found.append(self._packed.logits(lower, self._depth))
        return torch.cat(found).float()

    def learn(self, rows: Sequence[Tokens], *, bf16: bool) -> Tensor:
        lengths = [len(row.ids) for row in rows]
        lower = torch.cat(self._lower(rows)) if self._frozen else None
        if self._frozen and self._depth == len(self._packed.layers):
            lengths = [1] * len(rows)  # the first tokens alone
        with _training(self._learning), _autocast(self._packed.device, bf16):
            hidden = self._packed.embed(rows) if lower is None else lower
            return self._packed.finish(hidden, lengths, self._depth).float()

    def _lower(self, rows: Sequence[Tokens]) -> list[Tensor]:
        """Of each row what the frozen layers made of it, now or before."""
        firsts = self._depth == len(self._packed.layers)

        def make(missing: Sequence[Tokens]) -> list[Tensor]:
            return [one for part in _parts(missing) for one in self._packed.lower(part, self._depth, firsts=firsts)]

        places: dict[bytes, int] = {}
        for row in rows:
            places.setdefault(row.key, len(places))
        distinct = list({row.key: row for row in rows}.values())
        found = self._cache.get(self._version(), distinct, make)
        return [found[places[row.key]] for row in rows]


class _Whole:
    """Any other: as transformers runs it, in groups of equal length where a row's result must be its own."""

    def __init__(self, module: Any, generator: torch.Generator) -> None:
        self._module = module
        self._generator = generator

    @torch.no_grad()
    def infer(self, rows: Sequence[Tokens]) -> Tensor:
        found = []
        for part in _parts(rows):
            for _, group in groupby(part, key=lambda row: len(row.ids)):
                some = list(group)
                least = -(-16 // len(some[0].ids))  # see `_packed.TILE`: four rows for the head, sixteen tokens below
                filled = [*some, *some[-1:] * (max(-(-len(some) // 4) * 4, least) - len(some))]
                found.append(self._logits(filled)[: len(some)])
        return torch.cat(found).float()

    def learn(self, rows: Sequence[Tokens], *, bf16: bool) -> Tensor:
        device = self._generator.device
        # its own modules draw from torch's generator, which is put back as it was
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _training([self._module]):
            drawn = torch.randint(2**62, (1,), generator=self._generator, device=device)
            torch.manual_seed(int(drawn))
            with _autocast(device, bf16):
                return self._logits(rows).float()

    def _logits(self, rows: Sequence[Tokens]) -> Tensor:
        device = self._generator.device
        longest = max(len(row.ids) for row in rows)
        inputs = {
            "input_ids": torch.full((len(rows), longest), self._module.config.pad_token_id or 0),
            "attention_mask": torch.zeros((len(rows), longest), dtype=torch.long),
            "token_type_ids": torch.zeros((len(rows), longest), dtype=torch.long),
        }
        for place, row in enumerate(rows):
            inputs["input_ids"][place, : len(row.ids)] = torch.from_numpy(row.ids)
            inputs["attention_mask"][place, : len(row.ids)] = 1
            inputs["token_type_ids"][place, : len(row.ids)] = torch.from_numpy(row.types)
        if getattr(self._module.config, "type_vocab_size", 0) < 2:
            del inputs["token_type_ids"]
        found: Tensor = self._module(**{name: value.to(device) for name, value in inputs.items()}).logits
        return found


def _parts(rows: Sequence[Tokens]) -> Iterator[Sequence[Tokens]]:
    """Them, in order, so many at a time as have `AT_ONCE` tokens."""
    begin = tokens = 0
    for place, row in enumerate(rows):
        if tokens and tokens + len(row.ids) > AT_ONCE:
            yield rows[begin:place]
            begin, tokens = place, 0
        tokens += len(row.ids)
    if begin < len(rows):
        yield rows[begin:]


@contextmanager
def _training(parts: Sequence[nn.Module]) -> Iterator[None]:
    for part in parts:
        part.train()
    try:
        yield
    finally:
        for part in parts:
            part.eval()


def _autocast(device: torch.device, enabled: bool) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
