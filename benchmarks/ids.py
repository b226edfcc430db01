"""The table of ids: look-up, insertion, pauses and memory, to ten million ids.

    python -m benchmarks.ids [--repetitions N] [--most N]

Each measurement is a process of its own, so that memory is what the system says (resident set) and nobody grows into
another's. Ids are SplitMix64 of a counter: spread as hashed ids are, each once. Times are CPU time of one thread;
pauses are given by the clock on the wall too, which counts what other jobs took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import environment, one_thread
from streamrec.batch import Batch
from streamrec.models.id_table import IdTable

CALL = 10_000  # ids at once
FIELDS = 10  # of the FM that is measured


def mixed(numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64 `(n,)`: an id for each number, no two the same for different numbers."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids: NDArray[np.int64] = (z ^ (z >> np.uint64(31))).view(np.int64)
    return ids


def fresh(start: int, count: int) -> NDArray[np.int64]:
    """int64 `(count,)`: ids number `start` and on."""
    return mixed(np.arange(start, start + count, dtype=np.uint64))


def resident() -> int:
    """Bytes this process has in memory now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the most it ever had
        return most_resident()


def most_resident() -> int:
    """Bytes this process had in memory at its largest."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def grow(call: Callable[[NDArray[np.int64]], Any], count: int) -> dict[str, float]:
    """Hand `count` new ids to `call`, 10,000 at a time: seconds in all, longest call, by both clocks."""
    spent, longest, longest_wall = 0.0, 0.0, 0.0
    for start in range(0, count, CALL):
        ids = fresh(start, min(CALL, count - start))
        wall, begin = perf_counter(), process_time()
        call(ids)
        taken, taken_wall = process_time() - begin, perf_counter() - wall
        spent, longest, longest_wall = spent + taken, max(longest, taken), max(longest_wall, taken_wall)
    return {"seconds": spent, "longest": longest, "longest_wall": longest_wall}


def table(count: int) -> dict[str, float]:
    """An `IdTable` from nothing to `count` ids, then a million look-ups of known ids, and of unknown ones."""
    warm = IdTable()
    grow(warm.insert, 10 * CALL)  # compiled, growth included
    warm.find(fresh(0, CALL))
    del warm
    before = resident()
    ids = IdTable()
    found = grow(ids.insert, count)
    found["bytes"] = (resident() - before) / count
    found["most_bytes"] = (most_resident() - before) / count
    rng = np.random.default_rng(0)
    for name, first in (("known", 0), ("unknown", count)):
        spent = 0.0
        for _ in range(1_000_000 // CALL):
            asked = mixed(rng.integers(first, first + count, CALL, dtype=np.uint64))
            begin = process_time()
            rows = ids.find(asked)
            spent += process_time() - begin
            if bool((rows < 0).any()) != (name == "unknown"):
                raise AssertionError(f"{name} ids were not")
        found[name] = spent / 1_000_000
    return found


def fm(count: int) -> dict[str, float]:
    """An FM of dim 16 with row-wise Adagrad that learns `count` ids, ten new ones a row, 1,000 rows a call."""
    schema = sr.Schema(*(sr.Id(f"c{field}") for field in range(FIELDS)))
    rows = CALL // FIELDS
    starts = np.arange(rows, dtype=np.int64) * FIELDS
    ones = np.ones(CALL, dtype=np.float32)
    fields = np.tile(np.arange(FIELDS, dtype=np.int32), rows)
    labels = (np.arange(rows) % 4 == 0).astype(np.float32)

    def learner() -> tuple[sr.FM, Callable[[NDArray[np.int64]], None]]:
        model = sr.FM(schema, dim=16, optimizer=sr.Adagrad(row_wise=True))
        return model, lambda ids: model.learn(Batch(ids, ones, fields, starts, starts + FIELDS), labels)

    grow(learner()[1], 10 * CALL)  # compiled, growth included
    before = resident()
    model, learn = learner()
    found = grow(learn, count // CALL * CALL)
    if len(model.ids) != count // CALL * CALL:
        raise AssertionError(f"{len(model.ids):,} rows for {count:,} ids")
    return {**found, "resident": resident(), "most": most_resident(), "before": before}


def apart(part: str, count: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ids", "--part", part, "--most", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} of {count:,} ids ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(repetitions: int = 3, most: int = 10_000_000) -> None:
    """Print the medians; the pauses are the longest of all runs, and the least of them."""
    sizes = sorted({min(1_000_000, most), most})
    parts = [("table", size) for size in sizes] + [("fm", most)]
    runs: dict[tuple[str, int], list[dict[str, float]]] = {part: [] for part in parts}
    for _ in range(repetitions):
        for part in parts:
            runs[part].append(apart(*part))

    def median(part: tuple[str, int], name: str) -> float:
        return statistics.median(run[name] for run in runs[part])

    def pause(part: tuple[str, int], name: str) -> str:
        taken = [1000 * run[name] for run in runs[part]]
        return f"{min(taken):.1f} to {max(taken):.1f}"

    print(f"`IdTable`, {CALL:,} ids a call, from an empty table:\n")
    print(
        "| ids | known id, ns | unknown id, ns | new id, ns | longest insert of 10,000, CPU ms | by the wall, ms "
        "| bytes an id | at its largest |\n|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for part in parts[:-1]:
        cells = [f"{part[1]:,}", f"{1e9 * median(part, 'known'):.1f}", f"{1e9 * median(part, 'unknown'):.1f}"]
        cells += [f"{1e9 * median(part, 'seconds') / part[1]:.0f}", pause(part, "longest"), pause(part, "longest_wall")]
        cells += [f"{median(part, name):.1f}" for name in ("bytes", "most_bytes")]
        print(f"| {' | '.join(cells)} |")
    part = parts[-1]
    whole, largest, before = (median(part, name) / 1e9 for name in ("resident", "most", "before"))
    print(
        f"\nFM of dim 16, row-wise Adagrad, {part[1]:,} ids learned, 10 new ones a row: the process has "
        f"{whole:.2f} GB, {largest:.2f} GB at its largest, {before:.2f} GB of them before the first id; "
        f"{1e9 * median(part, 'seconds') / part[1]:.0f} ns an id; longest call of 1,000 rows "
        f"{pause(part, 'longest')} ms of CPU, {pause(part, 'longest_wall')} ms by the wall\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--most", type=int, default=10_000_000, help="ids")
    parser.add_argument("--part", choices=("table", "fm"), help="one measurement, in this process, as JSON")
    options = parser.parse_args()
    if options.part:
        with one_thread():
            print(json.dumps({"table": table, "fm": fm}[options.part](options.most)))
    else:
        print(f"{environment()}\n")
        main(options.repetitions, options.most)
