"""From JSON lines on disk to learned: read, decode, dedup, join, encode, predict, metrics, learn, checkpoints on.

And what an archive of it costs. MovieLens spans seven months: an hour of it, which is a file, is thirty events. So for
that the same events are spread over one day, 1.8 a second; the files of a busier service cost less an event. In seconds
of the run, and in CPU seconds of the process, in which the thread that makes Parquet counts as well. Then once as they
are: a thin history, whose hours are thousands of files.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import deque
from pathlib import Path
from time import process_time

import msgspec
from river import metrics

import streamrec as sr
from benchmarks import _measure
from benchmarks._measure import one_thread
from benchmarks.peers import RiverFM, named
from benchmarks.streams import SCHEMA, movielens
from streamrec.events import decode_event, encode_lines

WINDOW = 600.0
DAY = 1_700_006_400.0


def one_day(log: Path, path: Path) -> Path:
    """The same events, spread over one day."""
    events = list(map(decode_event, log.read_bytes().splitlines()))
    times = [event.time for event in events]  # type: ignore[union-attr]
    first, span = min(times), max(times) - min(times)
    day = [
        msgspec.structs.replace(one, time=DAY + (time - first) / span * 86_400.0)  # type: ignore[type-var]
        for one, time in zip(events, times, strict=True)
    ]
    path.write_bytes(encode_lines(day))
    return path


def ours(log: Path, *, archived: bool = False) -> tuple[float, float, sr.Report]:
    """Seconds and CPU seconds for the whole log, everything on."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        trainer = sr.OnlineTrainer(
            model=sr.FM(SCHEMA, dim=16, seed=0),
            preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)],
            join=sr.LabelJoin(windows={"click": WINDOW}),
            metrics=[sr.AUC(), sr.LogLoss(), sr.NormalizedEntropy(), sr.Calibration(), sr.CTR()],
            store=f"{folder}/store",
            archive=f"{folder}/archive" if archived else None,
        )
        source = sr.JsonLines(log)
        start, cpu = _measure.clock(), process_time()
        report = trainer.run(source)
        return _measure.clock() - start, process_time() - cpu, report


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


def archive(log: Path, repetitions: int) -> None:
    """Print what one costs."""
    with tempfile.TemporaryDirectory() as folder:
        day = one_day(log, Path(folder) / "day.jsonl")
        ours(day, archived=True)
        pairs = [(ours(day), ours(day, archived=True)) for _ in range(repetitions)]
    thin, filed = ours(log)[0], ours(log, archived=True)[0]
    for which, name in enumerate(("seconds", "CPU seconds")):
        ratio = statistics.median(b[which] / a[which] for a, b in pairs)
        without, with_one = (statistics.median(pair[n][which] for pair in pairs) for n in range(2))
        print(
            f"  an archive: {with_one:.2f} {name} for one day of these events, {without:.2f} without: {ratio:.2f} times"
        )
    print(
        f"  an archive of the seven months they took: {filed:.1f} seconds, {thin:.1f} without: {filed / thin:.1f} times"
    )
    print()


def main(repetitions: int = 5, river_events: int = 6_000) -> None:
    """Print the medians and their ratio."""
    dataset = movielens.load()
    log = movielens.event_log(dataset)
    with log.open("rb") as lines:
        total = sum(1 for _ in lines)
    ours(log)  # compiles what there is to compile
    theirs, mine = [], []
    for _ in range(repetitions):
        seconds, _, report = ours(log)
        mine.append(total / seconds)
        theirs.append(river_events / river(log, river_events))
    fast, slow = statistics.median(mine), statistics.median(theirs)
    print(f"\nEnd to end from JSON lines, {dataset.name}, labels {WINDOW:.0f} s late, checkpoints on:\n")
    print(f"  streamrec  {fast:>9,.0f} events/s ({min(mine):,.0f} to {max(mine):,.0f}), all {total:,} events")
    print(f"  River FM   {slow:>9,.0f} events/s ({min(theirs):,.0f} to {max(theirs):,.0f}), the first {river_events:,}")
    print(f"  ratio      {fast / slow:>9,.1f}")
    print(f"  AUC {report.metrics['AUC']:.4f}, log loss {report.metrics['LogLoss']:.4f}\n")
    archive(log, repetitions)


if __name__ == "__main__":
    main()
