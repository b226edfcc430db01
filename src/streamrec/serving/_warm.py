"""What a request runs, run once before, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from streamrec.events import Impression
from streamrec.models import FM, ranking
from streamrec.preprocessors import Encoder
from streamrec.protocols import Model
from streamrec.schema import Ids
from streamrec.serving._sides import Sides

__all__ = ["warm"]


def warm(model: Model, encoder: Encoder, sides: Callable[[frozenset[str]], Sides]) -> None:
    """Run all there is for this model; a few milliseconds where it is compiled already."""
    # Without any text, and with one of every kind: an empty buffer is of another type to the compiler.
    filled = {field.name: ["a"] if isinstance(field, Ids) else "a" for field in encoder.schema}
    shown = [
        Impression(id="", time=0.0, user="", item=""),
        Impression(id="", time=0.0, user="", item="", features=filled),
    ]
    for one in shown:
        model.predict(encoder([one]).batch)
    model.predict(encoder(shown).batch)
    if not isinstance(model, FM):
        return
    for one in shown:
        some = sides(frozenset())
        some.shared.one(one)
        parts = model.parts(some.own([one]).batch)
    items = np.repeat(parts, 32, axis=0)
    places = np.arange(len(items), dtype=np.int64)
    for k in (1, None):  # by a heap, and by a sort
        ranking.probabilities(ranking.best(model, items[0], items, places, k)[1])
    ranking.top(model, items[0], items, 1, places[:0], ranking.coded(items))
