"""What a checkpoint costs the stream, the disk and a reader: `python -m benchmarks.checkpoints [--rows 1000000]`.

An FM of dim 16 with a million ids. The pause is what the stream waits for: cutting the checkpoint and the version for
scorers at one instant, as copies. Writing, with fsync, goes on in a thread. A reader applies changes in place.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

import streamrec as sr
from benchmarks import _measure
from benchmarks._measure import environment, one_thread
from streamrec.batch import Batch

SHARES = (0.01, 0.1)
SPEED = 150_000  # events a second of the stream that goes on meanwhile: what a trainer does from lines on disk
SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


def learned(ids: Any) -> Batch:
    """A batch with one row for each two ids."""
    starts = np.arange(0, len(ids), 2, dtype=np.int64)
    fields = np.tile(np.array([0, 1], dtype=np.int32), len(starts))
    values = np.ones(len(ids), dtype=np.float32)
    return Batch(ids, values, fields, starts, starts + 2)


def touch(model: sr.FM, ids: Any) -> None:
    """Learn a row of each two of these ids."""
    batch = learned(ids)
    model.learn(batch, (np.arange(len(batch)) % 2).astype(np.float32))


def main(rows: int = 1_000_000, repetitions: int = 7, folder: str | None = None) -> dict[str, float]:
    """Print medians, in milliseconds, and return them by name."""
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(-(2**62), 2**62, size=rows, dtype=np.int64))
    rng.shuffle(ids)
    ids = ids[: len(ids) // 2 * 2]
    model = sr.FM(SCHEMA, dim=16)
    for begin in range(0, len(ids), 8192):
        touch(model, ids[begin : begin + 8192])
    times: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}
    touched: list[int] = []

    def timed(name: str, call: Callable[[], Any]) -> Any:
        gc.collect()
        start = _measure.clock()
        result = call()
        times[name].append(1000 * (_measure.clock() - start))
        return result

    with tempfile.TemporaryDirectory(dir=folder) as place, one_thread():
        store = sr.Store(place, keep=1)
        trainer = sr.OnlineTrainer(model=model, store=store)
        reader = sr.FM(SCHEMA, dim=16)
        for _ in range(repetitions):
            trainer._saver.forget()
            whole = timed("pause, whole", lambda: trainer._cut(None))
            for cut, shelf in zip(whole, (store.versions, store.checkpoints), strict=True):
                name = "write, whole, " + ("version" if cut.published else "checkpoint")
                sizes[name] = timed(name, lambda cut=cut, shelf=shelf: trainer._saver.write(shelf, cut)).bytes
            del whole
            if hasattr(model, "live"):
                trainer._saver.forget()
                trainer._saver.prepared()
                order, start, at = rng.permutation(ids), _measure.clock(), 0
                while trainer._saver.busy:  # the stream goes on while the table is copied
                    touch(model, order[at : (at := at + 512)])  # 256 events, all of other ids
                    time.sleep(max(0.0, start + at / 2 / SPEED - _measure.clock()))
                times["copy, whole, while learning"].append(1000 * (_measure.clock() - start))
                touched.append(at)
                whole = timed("pause, whole, copied while learning", lambda: trainer._cut(None))
                for cut, shelf in zip(whole, (store.versions, store.checkpoints), strict=True):
                    trainer._saver.write(shelf, cut)
                del whole
            _, state = timed("read, whole, version", store.versions.read)
            timed("load, whole, version", lambda state=state: reader.load_state_dict(state["model"]))
            held = store.versions.latest().number
            for share in SHARES:
                some = rng.choice(ids, int(share * len(ids)) // 2 * 2, replace=False)
                touch(model, some)
                changes = timed(f"pause, {share:.0%}", lambda: trainer._cut(None))
                for cut, shelf in zip(changes, (store.versions, store.checkpoints), strict=True):
                    name = f"write, {share:.0%}, " + ("version" if cut.published else "checkpoint")
                    sizes[name] = timed(name, lambda cut=cut, shelf=shelf: trainer._saver.write(shelf, cut)).bytes
                version, found = timed(
                    f"read, {share:.0%}, version", lambda held=held: store.versions.changes_since(held)
                )
                for one in found:
                    timed(f"apply, {share:.0%}, version", lambda one=one: reader.load_changes(one["model"]))
                held = version.number
            batch = learned(ids[:4096])
            if not np.array_equal(reader.predict(batch), model.predict(batch)):
                raise AssertionError("the reader that applied the changes predicts something else")
        scorer = sr.Scorer(store)
        for repetition in range(repetitions + 1):  # the first makes the second model of a scorer that follows
            touch(model, rng.choice(ids, len(ids) // 200 * 2, replace=False))
            trainer.publish()
            timed("refresh, 1%" if repetition else "refresh, whole", scorer.refresh)
        if not np.array_equal(scorer._serving.model.predict(batch), model.predict(batch)):
            raise AssertionError("the scorer that followed predicts something else")
        # all of the changes at once, from the files
        timed("read, chain, checkpoint", store.checkpoints.read)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{environment()}\n\n{len(ids):,} ids, dim 16; medians of {repetitions}:\n")
    print("| | ms | min to max | MB |\n|---|---:|---:|---:|")
    for name, values in times.items():
        size = f"{sizes[name] / 1e6:.1f}" if name in sizes else ""
        print(f"| {name} | {medians[name]:.1f} | {min(values):.1f} to {max(values):.1f} | {size} |")
    if touched:
        print(f"\nLearned while the table was copied: {statistics.median(touched):,.0f} ids.")
    for what in ("checkpoint", "version"):
        ratio = medians[f"write, whole, {what}"] / medians[f"write, 1%, {what}"]
        print(f"\nA {what} of 1 % is written and fsynced in {ratio:.1f} times less time than a whole one.")
    return medians


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--folder", help="where to write; the system's temporary folder if not given")
    given = parser.parse_args()
    main(given.rows, given.repetitions, given.folder)
