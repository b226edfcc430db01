"""The two sides of a row: the fields that are the item's own, and those that all candidates of a request share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.preprocessors import Encoder
from streamrec.preprocessors.encode import Encoded, Problem
from streamrec.schema import Schema

__all__ = ["Side", "Sides", "encoded_in_blocks"]


class Side:
    """Encodes some fields of a schema, to the entries that the whole row would have of them."""

    def __init__(self, schema: Schema, names: frozenset[str]) -> None:
        places = [place for place, field in enumerate(schema) if field.name in names]
        fields = [schema.fields[place] for place in places]
        # the hashes are seeded by the fields' names and the schema's seed: they are the same in a schema of a part
        self._encoder = Encoder(Schema(*fields, seed=schema.seed)) if fields else None
        self._places = np.array([*places, *(len(schema) + place for place in places)], dtype=np.int32)

    def __call__(self, impressions: Sequence[Impression]) -> Encoded:
        if self._encoder is None:
            return Encoded(_nothing(len(impressions)), ())
        batch, problems = self._encoder(impressions)
        return Encoded(Batch(batch.ids, batch.values, self._places[batch.fields], batch.starts, batch.ends), problems)

    def one(self, user: str, features: Mapping[str, Any]) -> Encoded:
        """A single row, as `__call__` has it, of a request without an item."""
        return self([Impression(id="", time=0.0, user=user, item="", features=features)])


class Sides:
    """`own`: the item and the fields of `names`; `shared`: all others. The user is never an item's own."""

    def __init__(self, schema: Schema, names: frozenset[str]) -> None:
        own = frozenset(name for name in schema.names if name == "item" or (name in names and name != "user"))
        self.own = Side(schema, own)
        self.shared = Side(schema, frozenset(schema.names) - own)


def encoded_in_blocks(side: Side, blocks: Iterable[Sequence[Impression]]) -> tuple[Batch, list[Problem]]:
    """One batch of all blocks, row after row, without their impressions being there at once; and the problems."""
    batches, problems = [_nothing(0)], list[Problem]()
    for block in blocks:
        batch, found = side(block)
        batches.append(batch)
        problems += found
    lengths = np.concatenate([batch.ends - batch.starts for batch in batches])
    ends = np.cumsum(lengths)
    whole = Batch(
        np.concatenate([batch.ids for batch in batches]),
        np.concatenate([batch.values for batch in batches]),
        np.concatenate([batch.fields for batch in batches]),
        ends - lengths,
        ends,
    )
    return whole, problems


def _nothing(rows: int) -> Batch:
    starts = np.zeros(rows, dtype=np.int64)
    return Batch(
        np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int32), starts, starts.copy()
    )
