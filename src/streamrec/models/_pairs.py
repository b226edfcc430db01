"""Rows of a batch as token pairs, and those that wait for a step to be full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from streamrec.batch import Batch
from streamrec.models._packed import Tokens
from streamrec.models.text_encoder import CHARACTERS, normalised
from streamrec.models.tuning import Pair
from streamrec.protocols import State
from streamrec.schema import Schema

__all__ = ["Example", "PairReader", "Pending", "augmented"]


class PairReader:
    """Reads the two texts of each row as tokens, the same for the same row always.

    Missing and empty texts are empty segments. Only as much of a text is read as its tokens could come from.
    """

    def __init__(self, schema: Schema, pair: Pair, tokenizer: Any, max_tokens: int) -> None:
        self.pair = pair
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer
        self._query, self._item = pair.columns(schema)
        self.mask = tokenizer.mask_token_id
        self.special = frozenset(tokenizer.all_special_ids)

    def __call__(self, batch: Batch) -> list[Tokens]:
        refs = batch.text_refs.reshape(len(batch), -1) if len(batch) else batch.text_refs
        places: dict[tuple[int, ...], int] = {}
        columns = [*self._query, *self._item]
        rows = [places.setdefault(tuple(row), len(places)) for row in refs[:, columns].tolist()] if len(batch) else []
        read: dict[int, str] = {-1: ""}
        for ref in {ref for key in places for ref in key}:
            if ref >= 0:
                read[ref] = normalised(batch.texts[ref][: CHARACTERS * self.max_tokens])
        cut = len(self._query)
        queries = [_joined(read, key[:cut]) for key in places]
        items = [_joined(read, key[cut:]) for key in places]
        distinct = self.tokens(queries, items) if places else []
        return [distinct[place] for place in rows]

    def tokens(self, queries: Sequence[str], items: Sequence[str]) -> list[Tokens]:
        """Of each pair, or of the items alone where no query is read."""
        texts = [list(queries), list(items)] if self._query else [list(items)]
        made = self.tokenizer(
            *texts,
            truncation="longest_first",
            max_length=self.max_tokens,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        ids = made["input_ids"]
        types = made.get("token_type_ids") or [[0] * len(one) for one in ids]
        return [
            Tokens(np.array(a, dtype=np.int32), np.array(b, dtype=np.int8)) for a, b in zip(ids, types, strict=True)
        ]


def _joined(read: dict[int, str], refs: Sequence[int]) -> str:
    return read[refs[0]] if len(refs) == 1 else " ".join(filter(None, map(read.__getitem__, refs)))


def augmented(row: Tokens, reader: PairReader, rng: np.random.Generator) -> Tokens:
    """The row with some tokens under the mask and some left out; special tokens stay."""
    pair = reader.pair
    ids = row.ids.copy()
    plain = np.array([token not in reader.special for token in ids.tolist()], dtype=np.bool_)
    if pair.mask > 0 and reader.mask is not None:
        begins = rng.random(len(ids)) < pair.mask / pair.span
        covered = np.convolve(begins, np.ones(pair.span))[: len(ids)] > 0
        ids[covered & plain] = reader.mask
    if pair.drop > 0:
        kept = ~plain | (rng.random(len(ids)) >= pair.drop)
        return Tokens(ids[kept], row.types[kept])
    return Tokens(ids, row.types)


class Example(NamedTuple):
    """A row to be learned."""

    tokens: Tokens
    label: float
    weight: float


class Pending:
    """Examples that wait until there are as many as a step takes."""

    def __init__(self) -> None:
        self.held: list[Example] = []

    def state_dict(self) -> State:
        """Plain arrays: the tokens of all, one after the other."""
        rows = [one.tokens for one in self.held]
        return {
            "ids": np.concatenate([np.empty(0, dtype=np.int32), *(row.ids for row in rows)]),
            "types": np.concatenate([np.empty(0, dtype=np.int8), *(row.types for row in rows)]),
            "lengths": np.array([len(row.ids) for row in rows], dtype=np.int64),
            "labels": np.array([one.label for one in self.held], dtype=np.float64),
            "weights": np.array([one.weight for one in self.held], dtype=np.float64),
        }

    def load_state_dict(self, state: State) -> None:
        ends = np.cumsum(np.asarray(state["lengths"]))[:-1]
        ids = np.split(np.array(state["ids"]), ends) if len(state["lengths"]) else []
        types = np.split(np.array(state["types"]), ends) if len(state["lengths"]) else []
        labels, weights = np.asarray(state["labels"]).tolist(), np.asarray(state["weights"]).tolist()
        self.held = [Example(Tokens(a, b), c, d) for a, b, c, d in zip(ids, types, labels, weights, strict=True)]
