"""The forward pass of BERT and its kin over packed rows: one token after the other, no padding between them.

What it computes is what `transformers` computes, module by module; only attention is arranged here. Two things follow.
No work is spent on padding, nor, in the last layer, on any token but the first of each row, which alone reaches the
head. And without gradients no row's result depends on its companions, bit for bit: linear layers see a number of rows
that is a multiple of `TILE`, for which the matrix products of a CPU do the same to every row, and attention runs over
rows of equal length, unpadded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FAMILY", "TILE", "Dropout", "Packed", "Tokens"]

FAMILY = frozenset({"bert", "camembert", "roberta", "xlm-roberta"})
"""The `model_type`s whose layers are built of the same modules under the same names."""
TILE = 16
"""Rows of a matrix product come in multiples of this: below four, and with several threads elsewhere too, products of
other heights use other kernels, which add in another order."""


class Tokens(NamedTuple):
    """One row, as a tokenizer gives it. `ids`: int32 `(length,)`; `types`: int8 `(length,)`, the segment of each."""

    ids: NDArray[np.int32]
    types: NDArray[np.int8]

    @property
    def key(self) -> bytes:
        """The same for the same row, and for no other."""
        return self.ids.tobytes() + self.types.tobytes()


class Dropout(nn.Module):
    """`torch.nn.Dropout` from a generator of its own instead of the global one."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p = p
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.empty_like(x).bernoulli_(1.0 - self.p, generator=self._generator)
        return x * kept.div_(1.0 - self.p)

    @classmethod
    def put_into(cls, module: nn.Module, generator: torch.Generator) -> None:
        """In the place of every `torch.nn.Dropout` in `module`."""
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (nn.Dropout, cls)):
                    setattr(parent, name, cls(child.p, generator).train(child.training))


class _Shape(NamedTuple):
    """How rows are packed: `groups` of (length, rows) in the order in which they stand; `firsts`: int64 `(rows,)`."""

    lengths: Sequence[int]
    groups: Sequence[tuple[int, int]]
    firsts: Tensor

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Packed:
    """Runs the encoder and the head of a sequence classifier of the `FAMILY`.

    Rows come in ascending order of length. `hidden` is float32 `(tokens, hidden)`; a row's part of it is `(length,
    hidden)`.
    """

    def __init__(self, classifier: Any) -> None:
        backbone = classifier.base_model
        self._classifier = classifier
        self._embeddings = backbone.embeddings
        self._pooler = getattr(backbone, "pooler", None)
        self.layers: Sequence[Any] = list(backbone.encoder.layer)
        config = classifier.config
        self._heads: int = config.num_attention_heads
        # RoBERTa counts positions from behind its padding token
        self._offset: int = 0 if config.model_type == "bert" else config.pad_token_id + 1
        self._type_limit: int = config.type_vocab_size - 1

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._embeddings.parameters()).device
        return device

    # -- without gradients: a row's result is its own ------------------------------------------------------------------

    @torch.no_grad()
    def lower(self, rows: Sequence[Tokens], layers: int, *, firsts: bool) -> Sequence[Tensor]:
        """The hidden states behind the first `layers` layers, row by row: `(length, hidden)`, or, of the `firsts`
        alone, `(1, hidden)`."""
        shape = self._shape([len(row.ids) for row in rows])
        hidden = _padded(self._embedded(rows, shape))
        hidden = self._run(hidden, shape, self.layers[:layers], firsts=firsts)
        if firsts:
            if not layers:
                hidden = hidden[shape.firsts]
            return [part.clone() for part in torch.split(hidden[: len(rows)], 1)]
        return [part.clone() for part in torch.split(hidden[: shape.tokens], list(shape.lengths))]

    @torch.no_grad()
    def logits(self, hidden: Sequence[Tensor], layers: int) -> Tensor:
        """`(rows, labels)` from what `lower` gave, all layers behind the first `layers` run."""
        shape = self._shape([len(row) for row in hidden])
        firsts = _padded(torch.cat(list(hidden)))
        if layers < len(self.layers):
            firsts = self._run(firsts, shape, self.layers[layers:], firsts=True)
        return self._head(firsts)[: len(hidden)]

    # -- with gradients ------------------------------------------------------------------------------------------------

    def embed(self, rows: Sequence[Tokens]) -> Tensor:
        """`hidden` before the first layer."""
        return self._embedded(rows, self._shape([len(row.ids) for row in rows]))

    def finish(self, hidden: Tensor, lengths: Sequence[int], layers: int) -> Tensor:
        """`(rows, labels)` from `hidden` behind the first `layers` layers, of rows of these lengths."""
        shape = self._shape(lengths)
        padding = _Padding.of(shape, hidden.device)
        for place, layer in enumerate(self.layers[layers:], start=layers):
            last = place == len(self.layers) - 1
            hidden = self._layer(layer, hidden, shape, padding, firsts=last)
        return self._head(hidden)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _shape(self, lengths: Sequence[int]) -> _Shape:
        groups = [(length, len(list(rows))) for length, rows in groupby(lengths)]
        ends = np.cumsum(lengths)
        firsts = torch.from_numpy(ends - np.asarray(lengths)).to(self.device)
        return _Shape(lengths, groups, firsts)

    def _embedded(self, rows: Sequence[Tokens], shape: _Shape) -> Tensor:
        ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
        types = np.minimum(np.concatenate([row.types for row in rows]), self._type_limit).astype(np.int64)
        positions = np.concatenate([np.arange(length) for length in shape.lengths]) + self._offset
        hidden: Tensor = self._embeddings(
            input_ids=torch.from_numpy(ids).to(self.device)[None],
            token_type_ids=torch.from_numpy(types).to(self.device)[None],
            position_ids=torch.from_numpy(positions).to(self.device)[None],
        )
        return hidden[0]

    def _run(self, hidden: Tensor, shape: _Shape, layers: Sequence[Any], *, firsts: bool) -> Tensor:
        for place, layer in enumerate(layers):
            hidden = self._layer(layer, hidden, shape, None, firsts=firsts and place == len(layers) - 1)
        return hidden

    def _layer(self, layer: Any, hidden: Tensor, shape: _Shape, padding: _Padding | None, *, firsts: bool) -> Tensor:
        """One layer; of the `firsts` alone, `(rows, hidden)`, where nothing else is needed behind it."""
        attention = layer.attention.self
        asked = hidden
        if firsts:
            asked = hidden.index_select(0, shape.firsts)
            asked = asked if padding is not None else _padded(asked)
        queries, keys, values = attention.query(asked), attention.key(hidden), attention.value(hidden)
        if padding is None:
            context = self._by_length(queries, keys, values, shape, firsts=firsts)
        else:
            context = padding.attend(queries, keys, values, self._heads, attention.dropout, firsts=firsts)
        attended = layer.attention.output(context, asked)
        found: Tensor = layer.output(layer.intermediate(attended), attended)
        return found

    def _by_length(self, queries: Tensor, keys: Tensor, values: Tensor, shape: _Shape, *, firsts: bool) -> Tensor:
        sizes = [length * rows for length, rows in shape.groups]
        asked = [rows for _, rows in shape.groups] if firsts else sizes
        rest = len(keys) - sum(sizes)
        found = []
        parts = zip(
            shape.groups,
            torch.split(queries, [*asked, len(queries) - sum(asked)]),
            torch.split(keys, [*sizes, rest]),
            torch.split(values, [*sizes, rest]),
            strict=False,
        )
        for (_, rows), *vectors in parts:
            q, k, v = (x.view(rows, -1, self._heads, x.shape[1] // self._heads).transpose(1, 2) for x in vectors)
            if firsts:  # four times the same: a single query takes another way, which with two threads is not its own
                q = q.expand(-1, -1, 4, -1)
            context = functional.scaled_dot_product_attention(q, k, v)
            context = context[:, :, :1] if firsts else context
            found.append(context.transpose(1, 2).reshape(-1, queries.shape[1]))
        found.append(queries.new_zeros(len(queries) - sum(asked), queries.shape[1]))
        return torch.cat(found)

    def _head(self, firsts: Tensor) -> Tensor:
        alone = firsts[:, None]
        if self._pooler is not None:
            found: Tensor = self._classifier.classifier(self._classifier.dropout(self._pooler(alone)))
        else:
            found = self._classifier.classifier(alone)
        return found


class _Padding(NamedTuple):
    """Packed rows as a rectangle, for attention alone. `tokens`: int64 `(rows * longest,)`, the token of each place;
    `back`: int64 `(tokens,)`, the place of each token; `mask`: bool `(rows, 1, 1, longest)`, None where all are as
    long.
    """

    rows: int
    tokens: Tensor
    back: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, shape: _Shape, device: torch.device) -> _Padding:
        lengths = np.asarray(shape.lengths)
        there = np.arange(max(lengths))[None] < lengths[:, None]  # (rows, longest)
        index = np.full(there.shape, shape.tokens)
        index[there] = np.arange(shape.tokens)
        mask = None if there.all() else torch.from_numpy(there).to(device)[:, None, None]
        back = torch.from_numpy(np.flatnonzero(there)).to(device)
        return cls(len(lengths), torch.from_numpy(index.reshape(-1)).to(device), back, mask)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, heads: int, drop: Any, *, firsts: bool) -> Tensor:
        width = queries.shape[1]
        k, v = (self._spread(x).view(self.rows, -1, heads, width // heads).transpose(1, 2) for x in (keys, values))
        asked = queries if firsts else self._spread(queries)
        q = asked.view(self.rows, -1, heads, width // heads).transpose(1, 2)
        if drop.training and drop.p > 0:
            scores = q @ k.transpose(2, 3) * (width // heads) ** -0.5
            if self.mask is not None:
                scores = scores.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
            context: Tensor = drop(scores.softmax(dim=-1)) @ v
        else:
            context = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        context = context.transpose(1, 2).reshape(-1, width)
        return context if firsts or self.mask is None else context.index_select(0, self.back)

    def _spread(self, x: Tensor) -> Tensor:
        """To the rectangle; places without a token are zero."""
        return x if self.mask is None else functional.pad(x, (0, 0, 0, 1)).index_select(0, self.tokens)


def _padded(rows: Tensor) -> Tensor:
    """With rows of zeros, up to a multiple of `TILE`."""
    return functional.pad(rows, (0, 0, 0, -len(rows) % TILE))
