"""Sources: read and decode JSON lines and Parquet, and hand events in, beside what Python has.

    python -m benchmarks.sources [--repetitions N] [--events N]

The stream is MovieLens-100K and its clicks, written by this run, where it can be had; else a synthetic one of the same
form. Reading is in CPU seconds of the process, on one thread (pyarrow's own threads off), medians of interleaved runs.
Handing in is by the wall clock, for its producers and its reader are threads, and in CPU seconds of all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time

import msgspec

import streamrec as sr
from benchmarks._measure import environment
from benchmarks.streams import movielens
from streamrec._event_columns import table_of
from streamrec.events import decode_event

BATCH = 256


def drained(source: object) -> int:
    """How many events a source gives, 256 a read."""
    count = 0
    while events := source.read(BATCH):  # type: ignore[attr-defined]
        count += len(events)
    return count


def by_json(path: str) -> int:
    count = 0
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)
            count += 1
    return count


def by_msgspec(path: str, decode: Callable[[bytes], object]) -> int:
    count = 0
    with open(path, "rb") as file:
        for line in file:
            decode(line)
            count += 1
    return count


def reading(log: str, repetitions: int) -> None:
    """A table of how many events a second are read."""
    import pyarrow
    from pyarrow import parquet

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    events = list(map(decode_event, Path(log).read_bytes().splitlines()))
    events.sort(key=lambda event: event.time)  # type: ignore[union-attr]
    shown = [event for event in events if isinstance(event, sr.Impression)]
    with tempfile.TemporaryDirectory() as folder:
        parquet.write_table(table_of(events), f"{folder}/events.parquet", row_group_size=65_536)
        names = sorted({name for one in shown for name in one.features})
        columns = {
            "id": [one.id for one in shown],
            "time": [one.time for one in shown],
            "user": [one.user for one in shown],
            "item": [one.item for one in shown],
            **{name: [one.features.get(name) for one in shown] for name in names},
        }
        parquet.write_table(pyarrow.table(columns), f"{folder}/columns.parquet", row_group_size=65_536)
        ways: dict[str, Callable[[], int]] = {
            "json.loads, dicts": lambda: by_json(log),
            "msgspec.json.decode, dicts": lambda: by_msgspec(log, msgspec.json.decode),
            "JsonLines": lambda: drained(sr.JsonLines(log)),
            "JsonLines(follow=True)": lambda: drained(sr.JsonLines(log, follow=True, idle=0.0)),
            "Parquet, the default layout": lambda: drained(sr.Parquet(f"{folder}/events.parquet")),
            f"Parquet, impressions, {len(names)} feature columns": lambda: drained(
                sr.Parquet(f"{folder}/columns.parquet")
            ),
            "pyarrow's to_pylist of the same, dicts": lambda: len(
                parquet.read_table(f"{folder}/columns.parquet").to_pylist()
            ),
        }
        for way in ways.values():
            way()
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(repetitions):
            for name in ways if repetition % 2 == 0 else reversed(ways):
                begun = process_time()
                count = ways[name]()
                speeds[name].append(count / (process_time() - begun))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    print(f"Read and decode, {len(events):,} events, 256 a read, one thread, per CPU second:\n")
    print("| | events/s | min to max | times json.loads |\n|---|---:|---:|---:|")
    for name, speed in medians.items():
        spread = f"{min(speeds[name]):,.0f} to {max(speeds[name]):,.0f}"
        print(f"| {name} | {speed:,.0f} | {spread} | {speed / medians['json.loads, dicts']:.2f} |")
    print()


def handed_in(source: sr.Push, batches: Sequence[Sequence[sr.Impression]], producers: int = 4) -> tuple[float, float]:
    """Wall and CPU seconds until all have been accepted, from so many threads, and read."""

    def produce(which: int) -> None:
        for batch in batches[which::producers]:
            source.put(batch)

    threads = [threading.Thread(target=produce, args=(which,)) for which in range(producers)]
    wall, cpu = perf_counter(), process_time()
    for thread in threads:
        thread.start()
    left = sum(map(len, batches))
    while left:
        left -= len(source.read(BATCH))
    for thread in threads:
        thread.join()
    return perf_counter() - wall, process_time() - cpu


def pushing(count: int, repetitions: int) -> None:
    """A table of how many events a second 4 threads hand in, while one reads."""
    shown = [
        sr.Impression(f"i{n}", float(n), f"u{n % 1000}", f"p{n % 300}", {"tags": ["a", "b"], "price": float(n % 50)})
        for n in range(count)
    ]
    print(f"Push: 4 producing threads, 1 reading, {count:,} events, capacity 10,000, {os.cpu_count()} cores:\n")
    print("| | batches of | events/s | an event, CPU us |\n|---|---:|---:|---:|")
    for kind in ("in memory", "with a log", "with a log, sync"):
        for size in (1, 256):
            if kind.endswith("sync") and size == 1:
                continue
            some = shown if size > 1 else shown[: count // 10]
            batches = [some[start : start + size] for start in range(0, len(some), size)]
            found = []
            for _ in range(repetitions):
                with tempfile.TemporaryDirectory() as folder:
                    log = None if kind == "in memory" else folder
                    with sr.Push(capacity=10_000, log=log, sync=kind.endswith("sync")) as source:
                        found.append(handed_in(source, batches))
            wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"| {kind} | {size} | {len(some) / wall:,.0f} | {cpu / len(some) * 1e6:.2f} |")
    print()


def main(repetitions: int = 5, count: int = 200_000) -> None:
    """Print the tables."""
    reading(str(movielens.event_log(movielens.load())), repetitions)
    pushing(count, repetitions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--events", type=int, default=200_000, help="events handed in")
    options = parser.parse_args()
    print(f"{environment()}\n")
    main(options.repetitions, options.events)
