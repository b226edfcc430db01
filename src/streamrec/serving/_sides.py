"""The two sides of a row: the fields that are the item's own, and those that all candidates of a request share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from streamrec.batch import Batch
from streamrec.events import Impression
from streamrec.preprocessors import Encoder
from streamrec.preprocessors.encode import Problem
from streamrec.schema import Schema

__all__ = ["Sides", "encoded_in_blocks"]


class Sides:
    """`own`: the item and the fields of `names`; `shared`: all others. The user is never an item's own."""

    def __init__(self, schema: Schema, names: frozenset[str]) -> None:
        own = frozenset(name for name in schema.names if name == "item" or (name in names and name != "user"))
        self.own = Encoder(schema, only=own)
        self.shared = Encoder(schema, only=frozenset(schema.names) - own)


def encoded_in_blocks(side: Encoder, blocks: Iterable[Sequence[Impression]]) -> tuple[Batch, list[Problem]]:
    """One batch of all blocks, row after row, without their impressions being there at once; and the problems."""
    batches, problems = [side([]).batch], list[Problem]()
    for block in blocks:
        batch, found = side(block)
        batches.append(batch)
        problems += found
    return Batch.concatenated(batches), problems
