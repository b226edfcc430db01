"""From JSON lines on disk to learned: read, decode, dedup, join, encode, predict, metrics, learn, checkpoints on."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import deque
from pathlib import Path

from river import metrics

import streamrec as sr
from benchmarks import _measure
from benchmarks._measure import one_thread
from benchmarks.peers import RiverFM, named
from benchmarks.streams import SCHEMA, movielens

WINDOW = 600.0


def ours(log: Path) -> tuple[float, sr.Report]:
    """Seconds for the whole log, everything on."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        trainer = sr.OnlineTrainer(
            model=sr.FM(SCHEMA, dim=16, seed=0),
            preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)],
            join=sr.LabelJoin(windows={"click": WINDOW}),
            metrics=[sr.AUC(), sr.LogLoss(), sr.NormalizedEntropy(), sr.Calibration(), sr.CTR()],
            store=folder,
        )
        source = sr.JsonLines(log)
        start = _measure.clock()
        report = trainer.run(source)
        return _measure.clock() - start, report


def river(log: Path, events: int) -> float:
    """Seconds for the first `events` lines: its FM, its AUC and log loss, json, and the least of a join: a deque."""
    model = RiverFM().model()
    auc, loss = metrics.ROCAUC(), metrics.LogLoss()
    waiting: deque[tuple[float, str, dict[str, float], float]] = deque()
    clicked: set[str] = set()
    seen: set[tuple[str, str]] = set()
    start = _measure.clock()
    with log.open("rb") as lines:
        for _, line in zip(range(events), lines, strict=False):
            event = json.loads(line)
            key = (event["type"], event["id"])
            if key in seen:
                continue
            seen.add(key)
            while waiting and waiting[0][0] + WINDOW < event["time"]:
                _, shown, row, score = waiting.popleft()
                label = shown in clicked
                clicked.discard(shown)
                auc.update(label, score)
                loss.update(label, score)
                model.learn_one(row, label)
            if event["type"] == "impression":
                row = named(sr.Impression(event["id"], event["time"], event["user"], event["item"], event["features"]))
                waiting.append((event["time"], event["id"], row, model.predict_proba_one(row)[True]))
            else:
                clicked.add(event["impression_id"])
    return _measure.clock() - start


def main(repetitions: int = 5, river_events: int = 6_000) -> None:
    """Print the medians and their ratio."""
    dataset = movielens.load()
    log = movielens.event_log(dataset)
    with log.open("rb") as lines:
        total = sum(1 for _ in lines)
    ours(log)  # compiles what there is to compile
    theirs, mine = [], []
    for _ in range(repetitions):
        seconds, report = ours(log)
        mine.append(total / seconds)
        theirs.append(river_events / river(log, river_events))
    fast, slow = statistics.median(mine), statistics.median(theirs)
    print(f"\nEnd to end from JSON lines, {dataset.name}, labels {WINDOW:.0f} s late, checkpoints on:\n")
    print(f"  streamrec  {fast:>9,.0f} events/s ({min(mine):,.0f} to {max(mine):,.0f}), all {total:,} events")
    print(f"  River FM   {slow:>9,.0f} events/s ({min(theirs):,.0f} to {max(theirs):,.0f}), the first {river_events:,}")
    print(f"  ratio      {fast / slow:>9,.1f}")
    print(f"  AUC {report.metrics['AUC']:.4f}, log loss {report.metrics['LogLoss']:.4f}\n")


if __name__ == "__main__":
    main()
