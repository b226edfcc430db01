"""A label join as a Bytewax dataflow, for an interpreter that has `bytewax` and need not have streamrec.

    python benchmarks/_with_bytewax.py EVENTS OUT [--key NAME] [--operator NAME] [--batch N] [--window F] [--lateness F]

EVENTS: JSON, a list of `[impression id, time, whether it is a click]`. Writes the labels to OUT, a JSON list of
`[impression id, label]` in the order in which they came out, and prints the CPU seconds as JSON.

A window closes when the time of other impressions' events passes it, but Bytewax's operators see one key at a time, and
its clock for `notify_at` is the machine's. Two ways out, both with less to do than ours: no early feedback, no bound on
memory, one kind, no checks for duplicates or lateness.

`--key impression`: as Bytewax is meant to be used, a state for each impression; the source is given, beforehand, an
event more for each that closes its window. `--key all`: one key, whose state is the whole join, hand-written; Bytewax
is then a loop around it, with one state that it cannot spread over workers.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import deque
from collections.abc import Iterable
from importlib.metadata import version
from time import process_time
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.operators import StatefulBatchLogic
from bytewax.testing import TestingSink, TestingSource, run_main

Event = tuple[str, float, bool]  # impression, time, whether it is a click
Label = tuple[str, float]
END: Event = ("", float("inf"), True)  # closes all that is open


class Join:
    """The state of a join, and one event's work on it."""

    def __init__(self, window: float, lateness: float) -> None:
        self.window, self.lateness = window, lateness
        self.shown: dict[str, float] = {}
        self.clicked: set[str] = set()
        self.waiting: deque[tuple[float, str]] = deque()

    def take(self, event: Event) -> list[Label]:
        name, time, is_click = event
        closed: list[Label] = []
        due = time - self.lateness - self.window
        waiting = self.waiting
        while waiting and waiting[0][0] < due:
            _, gone = waiting.popleft()
            del self.shown[gone]
            closed.append((gone, 1.0 if gone in self.clicked else 0.0))
            self.clicked.discard(gone)
        if not is_click:
            self.shown[name] = time
            waiting.append((time, name))
        elif name in self.shown and time <= self.shown[name] + self.window:
            self.clicked.add(name)
        return closed


class BatchJoin(StatefulBatchLogic[Event, Label, Any]):
    """The same for `stateful_batch`: one call for all of a batch's events."""

    def __init__(self, join: Join) -> None:
        self.join = join

    def on_batch(self, values: list[Event]) -> tuple[Iterable[Label], bool]:
        found: list[Label] = []
        for event in values:
            found += self.join.take(event)
        return found, StatefulBatchLogic.RETAIN

    def snapshot(self) -> Any:
        return None  # nothing is recovered here


def closing(events: list[Event], window: float, lateness: float) -> list[tuple[str, float, bool | None]]:
    """The events, and one more for each impression, `(id, time, None)`, when its window closes."""
    ends = [(name, time + window + lateness, None) for name, time, is_click in events if not is_click]
    return sorted([*events, *ends], key=lambda event: event[1])


def by_impression(events: list[Event], size: int, window: float, lateness: float) -> tuple[float, list[Label]]:
    """CPU seconds, and the labels, with a state for each impression: its time and whether it was clicked."""
    found: list[tuple[str, float]] = []

    def mapper(
        state: tuple[float, float] | None, event: tuple[str, float, bool | None]
    ) -> tuple[tuple[float, float] | None, Iterable[float]]:
        _, time, is_click = event
        if state is None:
            return (None if is_click else (time, 0.0)), ()
        if is_click is None:
            return None, (state[1],)
        return (state[0], 1.0 if time <= state[0] + window else state[1]), ()

    flow = Dataflow("join")
    source = TestingSource(closing(events, window, lateness), size)
    keyed = op.key_on("key", op.input("events", flow, source), lambda event: event[0])
    op.output("labels", op.stateful_flat_map("join", keyed, mapper), TestingSink(found))
    gc.freeze()
    start = process_time()
    run_main(flow)
    return process_time() - start, found


def in_one(events: list[Event], operator: str, size: int, window: float, lateness: float) -> tuple[float, list[Label]]:
    """CPU seconds, and the labels, with one key for all."""
    found: list[tuple[str, Label]] = []
    flow = Dataflow("join")
    source = TestingSource([*events, END], size)
    keyed = op.key_on("key", op.input("events", flow, source), lambda event: "all")
    if operator == "stateful_batch":
        labels = op.stateful_batch("join", keyed, lambda resumed: BatchJoin(Join(window, lateness)))
    else:

        def mapper(state: Join | None, event: Event) -> tuple[Join | None, Iterable[Label]]:
            join = Join(window, lateness) if state is None else state
            return join, join.take(event)

        labels = op.stateful_flat_map("join", keyed, mapper)
    op.output("labels", labels, TestingSink(found))
    gc.freeze()
    start = process_time()
    run_main(flow)
    return process_time() - start, [label for _, label in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("events")
    parser.add_argument("out")
    parser.add_argument("--key", choices=("impression", "all"), default="impression")
    parser.add_argument("--operator", choices=("stateful_flat_map", "stateful_batch"), default="stateful_flat_map")
    parser.add_argument("--batch", type=int, default=256, help="events the source gives at once")
    parser.add_argument("--window", type=float, default=600.0)
    parser.add_argument("--lateness", type=float, default=0.0)
    options = parser.parse_args()
    with open(options.events, encoding="utf-8") as file:
        events = [tuple(event) for event in json.load(file)]
    if options.key == "impression":
        seconds, labels = by_impression(events, options.batch, options.window, options.lateness)
    else:
        seconds, labels = in_one(events, options.operator, options.batch, options.window, options.lateness)
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(labels, file)
    print(json.dumps({"seconds": seconds, "bytewax": version("bytewax")}))


if __name__ == "__main__":
    main()
