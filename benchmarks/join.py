"""The label join alone, in one process: streamrec's `LabelJoin` beside Bytewax's stateful operators.

    python -m benchmarks.join [--repetitions N] [--bytewax-python PATH]

The same decoded events in time order, the same window, and the same labels out: where one differs, it says so and
fails. CPU seconds, the garbage collector kept from the events, which are in memory beforehand; medians of interleaved
runs. `--bytewax-python`: an interpreter that has `bytewax`, where this one has not.

Bytewax is fast or slow by how it is used, so it stands here five times: keyed by impression or as a loop around one
hand-written state, with a source that hands on 256 events at once or one, as its `TestingSource` does by default.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

import streamrec as sr
from benchmarks import _elsewhere
from benchmarks._measure import environment
from benchmarks.streams import movielens
from streamrec.preprocessors.label_join import Closed

WINDOW, LATENESS = 600.0, 60.0
Label = tuple[str, float]
Run = Callable[[], tuple[float, list[Label]]]
OPERATORS = {
    "Bytewax stateful_flat_map, 256 a batch": ("impression", "stateful_flat_map", 256),
    "Bytewax stateful_flat_map, 1 a batch": ("impression", "stateful_flat_map", 1),
    "a join by hand in one state of Bytewax, stateful_flat_map, 256 a batch": ("all", "stateful_flat_map", 256),
    "a join by hand in one state of Bytewax, stateful_flat_map, 1 a batch": ("all", "stateful_flat_map", 1),
    "a join by hand in one state of Bytewax, stateful_batch, 256 a batch": ("all", "stateful_batch", 256),
}
"""By key, operator and batch: see `_with_bytewax`."""


def pushed(events: Sequence[Any], size: int) -> Run:
    """`push` and `flush`: `Labeled` out."""

    def run() -> tuple[float, list[Label]]:
        join = sr.LabelJoin(windows={"click": WINDOW}, lateness=LATENESS)
        found = []
        start = process_time()
        for begin in range(0, len(events), size):
            found += join.push(events[begin : begin + size])
        found += join.flush()
        seconds = process_time() - start
        return seconds, [(labeled.impression.id, labeled.label) for labeled in found]

    return run


def stepped(events: Sequence[Any]) -> Run:
    """`step` and `drain` with a number for each impression: what the trainer does."""
    names = [event.id for event in events]

    def run() -> tuple[float, list[Label]]:
        join = sr.LabelJoin(windows={"click": WINDOW}, lateness=LATENESS)
        found: list[Closed] = []
        start = process_time()
        for place, event in enumerate(events):
            closed = join.step(event, place)
            if closed:
                found += closed
        found += join.drain()
        seconds = process_time() - start
        return seconds, [(names[closed.payload], closed.label) for closed in found]

    return run


def stepped_at_once(events: Sequence[Any], size: int) -> Run:
    """`codes` and `steps`, many events a call, and `drain`: what the trainer does where the join has them."""
    names = [event.id for event in events]
    places = np.arange(len(events), dtype=np.int64)

    def run() -> tuple[float, list[Label]]:
        join: Any = sr.LabelJoin(windows={"click": WINDOW}, lateness=LATENESS)
        found = []
        start = process_time()
        for begin in range(0, len(events), size):
            part = events[begin : begin + size]
            found.append(join.steps(part, join.codes(part), places[begin : begin + size]))
        rest = join.drain()
        seconds = process_time() - start
        labels = [(names[row["payload"]], float(row["label"])) for closed in found for row in closed]
        return seconds, labels + [(names[closed.payload], closed.label) for closed in rest]

    return run


def bytewax(python: str, events: Path, key: str, operator: str, size: int) -> Run:
    def run() -> tuple[float, list[Label]]:
        out = events.with_name("labels.json")
        options = ["--key", key, "--operator", operator, "--batch", size, "--window", WINDOW, "--lateness", LATENESS]
        said = _elsewhere.run(python, "_with_bytewax.py", events, out, *options)
        labels = [(name, label) for name, label in json.loads(out.read_text())]
        return said["seconds"], labels

    return run


def main(repetitions: int = 5, bytewax_python: str | None = None) -> None:
    """Print a table."""
    dataset = movielens.load()
    events = dataset.events()
    python = _elsewhere.interpreter(bytewax_python, "bytewax")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "events.json")
        file.write_text(
            json.dumps(
                [
                    (e.impression_id, e.time, True) if isinstance(e, sr.Feedback) else (e.id, e.time, False)
                    for e in events
                ]
            )
        )
        runs = {
            "streamrec LabelJoin.push, 256 a call": pushed(events, 256),
            "streamrec LabelJoin.push, 1 a call": pushed(events, 1),
            "streamrec LabelJoin.step": stepped(events),
        }
        if hasattr(sr.LabelJoin, "steps"):
            stepped_at_once(events[:1000], 256)()
            runs["streamrec LabelJoin.steps, 256 a call"] = stepped_at_once(events, 256)
        if python is not None:
            runs |= {name: bytewax(python, file, *how) for name, how in OPERATORS.items()}
        for compile_it in (pushed(events[:1000], 256), pushed(events[:1000], 1), stepped(events[:1000])):
            compile_it()
        gc.freeze()  # nobody's work: to look, again and again, through the events that are all in memory beforehand
        found: dict[str, list[tuple[float, list[Label]]]] = {name: [] for name in runs}
        for repetition in range(repetitions):
            for name in runs if repetition % 2 == 0 else reversed(runs):
                found[name].append(runs[name]())
    expected = found["streamrec LabelJoin.step"][0][1]
    speeds = {name: statistics.median(len(events) / seconds for seconds, _ in got) for name, got in found.items()}
    base, plain = (speeds.get(name) for name in list(OPERATORS)[:2])
    print(f"Label join, {dataset.name}, {len(events):,} events, window {WINDOW:.0f} s, lateness {LATENESS:.0f} s:\n")
    print("| | events per CPU second | positives | negatives | times Bytewax, 256 | times Bytewax, 1 |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, speed in speeds.items():
        labels = found[name][0][1]
        if sorted(labels) != sorted(expected):
            raise SystemExit(f"{name} gave other labels: {len(labels):,} of them, expected {len(expected):,}")
        positives = sum(label == 1.0 for _, label in labels)
        ratios = " | ".join("" if other is None else f"{speed / other:.1f}" for other in (base, plain))
        print(f"| {name} | {speed:,.0f} | {positives:,} | {len(labels) - positives:,} | {ratios} |")
    if python is None:
        print("\nBytewax is not here: --bytewax-python PATH")
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--bytewax-python", help="an interpreter that has bytewax")
    options = parser.parse_args()
    print(f"{environment()}\n")
    main(options.repetitions, options.bytewax_python)
