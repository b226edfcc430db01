"""JoinedEvents: an archive of events as rows to learn, checked, joined and encoded as in the stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamrec.batch import LabeledRows
from streamrec.events import DeadLetter, Item, Labeled, place_of
from streamrec.preprocessors import DeadLetters, Encoder, LabelJoin, Validate
from streamrec.protocols import Source, Stage, State
from streamrec.schema import Schema
from streamrec.trainers._saved import require_parts, require_target

__all__ = ["JoinedEvents"]


class JoinedEvents:
    """The labeled rows of a source of events, in the order in which an `OnlineTrainer` would learn them.

    `source`: from where it stands now; each epoch begins there. `schema`: what rows are encoded by. `preprocessors`,
    `join`, `target`, `dead_letters`: as in `OnlineTrainer`; without a `join`, `Labeled` items alone give rows. What is
    open in the join when the source ends has no label yet, and gives none: hand the same join to an `OnlineTrainer`,
    which goes on with it.

    For more than a few epochs, encode once: `streamrec.adapters.dask.prepare`, then `EncodedRows`.

    >>> from streamrec import Feedback, Id, Impression, Memory
    >>> shown = [Impression(id=f"i{n}", time=60.0 * n, user="u1", item="p9") for n in range(3)]
    >>> source = Memory([shown[0], Feedback(id="f1", impression_id="i0", time=5.0), *shown[1:]])
    >>> rows = JoinedEvents(source, schema=Schema(Id("user")), join=LabelJoin(windows={"click": 60.0}))
    >>> rows.read(100).labels, rows.read(100) is None
    (array([1.], dtype=float32), True)
    """

    def __init__(
        self,
        source: Source,
        *,
        schema: Schema,
        preprocessors: Sequence[Stage] = (),
        join: LabelJoin | None = None,
        target: str = "click",
        dead_letters: DeadLetters | None = None,
    ) -> None:
        require_target(join, target)
        self.source = source
        self.schema = schema
        self.preprocessors = list(preprocessors)
        self.join = join
        self.target = target
        self.dead_letters = DeadLetters() if dead_letters is None else dead_letters
        self._validate = Validate()
        self._encoder = Encoder(schema)
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> Mapping[str, int]:
        """What became of the events since the beginning of the epoch: `events`, `rows`, `pending`, and those dropped,
        by reason."""
        counts = Counter({"events": self._counts["events"], "rows": self._counts["rows"]})
        counts["pending"] = 0 if self.join is None else self.join.pending
        for part in (*self.preprocessors, self.join, self.dead_letters):
            if part is not None:
                counts.update(part.counts)
        return dict(counts)

    def read(self, limit: int) -> LabeledRows | None:
        """The rows whose labels the next `limit` events bring out, which may be none; None at the end."""
        events = self.source.read(limit)
        return self.push(events) if events else None

    def push(self, events: Sequence[Item]) -> LabeledRows:
        """The rows whose labels these events bring out."""
        return self.encoded(self.labeled(events))

    def labeled(self, events: Sequence[Item]) -> list[Labeled]:
        """The first half of `push`: the impressions whose labels these events bring out, not encoded yet."""
        checked = self._validate.push(events)
        for place, item in enumerate(checked):
            if isinstance(item, DeadLetter):
                position = item.position or place_of(events, place) or {"event": self._counts["events"] + place}
                self.dead_letters.add(DeadLetter(position, item.reason, item.raw))
        kept: list[Any] = [item for item in checked if not isinstance(item, DeadLetter)]
        for stage in self.preprocessors:
            kept = stage.push(kept)
        if self.join is not None:
            kept = self.join.push(kept)
        self._counts["events"] += len(events)
        labeled = [one for one in kept if isinstance(one, Labeled) and one.kind == self.target]
        self._counts["rows"] += len(labeled)
        return labeled

    def encoded(self, labeled: Sequence[Labeled]) -> LabeledRows:
        """The second half of `push`: these as rows."""
        batch, problems = self._encoder([one.impression for one in labeled])
        for problem in problems:
            reason = f"unusable value: {problem.field}: {problem.reason}"
            self.dead_letters.add(DeadLetter({"impression_id": labeled[problem.row].impression.id}, reason))
        labels = np.array([one.label for one in labeled], dtype=np.float32)
        return LabeledRows(batch, labels, np.array([one.weight for one in labeled], dtype=np.float32))

    def begin_after(self, checked: State) -> None:
        """Judge the times of the first events as one that has checked others before, and remembered `checked`."""
        self._validate.load_state_dict(checked)

    @property
    def checked(self) -> State:
        """What it remembers of the times it has checked, for one that goes on after it."""
        return self._validate.state_dict()

    def span(self) -> tuple[float, float] | None:
        """The event times of the first and the last of all rows; None where there is none. Reads the source once."""
        here = self.state_dict()
        first, last = np.inf, -np.inf
        while (rows := self.read(65_536)) is not None:
            if len(rows.labels):
                first, last = min(first, rows.batch.times.min()), max(last, rows.batch.times.max())
        self.load_state_dict(here)
        return (float(first), float(last)) if first <= last else None

    def fraction(self) -> float | None:
        """The share of the source that has been read, where that knows it."""
        known: float | None = getattr(self.source, "fraction", lambda: None)()
        return known

    def state_dict(self) -> State:
        """Where the source stands, and what is remembered of what it gave."""
        return {
            "position": dict(self.source.position()),
            "validate": self._validate.state_dict(),
            "preprocessors": [
                {"type": type(stage).__name__, "state": stage.state_dict()} for stage in self.preprocessors
            ],
            "join": None if self.join is None else self.join.state_dict(),
            "dead_letters": self.dead_letters.state_dict(),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from there. Raises `ConfigError` where the parts differ from those of `state`."""
        require_parts(state, self.preprocessors, self.join)
        self.source.seek(state["position"])
        self._validate.load_state_dict(state["validate"])
        for stage, saved in zip(self.preprocessors, state["preprocessors"], strict=True):
            stage.load_state_dict(saved["state"])
        if self.join is not None:
            self.join.load_state_dict(state["join"])
        self.dead_letters.load_state_dict(state["dead_letters"])
        self._counts = Counter(state["counts"])
