"""Minutes of stream: memory stays flat, and a trainer that is killed again and again ends where one left alone does.

`make soak` runs it; `make test` does not.
"""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import Batch
from streamrec.protocols import LEARN, SCORE
from streamrec.testing._state import first_difference

pytestmark = pytest.mark.soak

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("tags"), sr.Number("price", log=True, standardize=True))


def events(count: int, *, seed: int = 0) -> Iterator[sr.Impression | sr.Feedback]:
    """Impressions from 50,000 users, out of order, with duplicates, clicks, and clicks outside the window."""
    rng = random.Random(seed)
    clicks: list[tuple[float, int, str]] = []  # a heap: each comes when it is its time
    for n in range(count):
        time = n * 0.1 + rng.uniform(-5.0, 0.0) + 100.0
        while clicks and clicks[0][0] < n * 0.1 + 100.0:
            clicked, number, of = heappop(clicks)
            yield sr.Feedback(id=f"c{number}", impression_id=of, time=clicked)
        tags = rng.sample("abcdefgh", rng.randrange(4))
        shown = sr.Impression(
            id=f"i{n}",
            time=time,
            user=f"u{rng.randrange(50_000)}",
            item=f"p{rng.randrange(5_000)}",
            features={"tags": tags, "price": rng.expovariate(0.05)},
        )
        yield shown
        if rng.random() < 0.01:
            yield shown
        if rng.random() < 0.1:
            heappush(clicks, (time + rng.uniform(0.0, 70.0), n, shown.id))


def make_trainer(store: str | None) -> sr.OnlineTrainer:
    return sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=8),
        preprocessors=[sr.Dedup(ttl=300.0, capacity=100_000)],
        join=sr.LabelJoin(windows={"click": 60.0}, lateness=10.0, capacity=100_000),
        metrics=[sr.AUC(), sr.LogLoss(), sr.Calibration()],
        window=3600.0,
        store=store,
        checkpoint_every=20_000,
    )


def test_memory_stays_flat() -> None:
    trainer = make_trainer(None)
    batch: list[sr.Impression | sr.Feedback] = []
    peaks = []
    for n, event in enumerate(events(3_000_000)):
        batch.append(event)
        if len(batch) == 256:
            trainer.push(batch)
            batch = []
        if n % 500_000 == 499_999:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    counts = trainer.report().counts
    assert counts["learned"] > 2_600_000 and counts["duplicate"] > 25_000 and counts["outside_window"] > 10_000, counts
    assert peaks[-1] - peaks[1] < 32, f"MiB at every 500,000 events: {peaks}"


POLICED = sr.Schema(sr.Id("user", admit=2, ttl="1d"), sr.Id("item", ttl="7d"), sr.Id("hour"))


def test_twenty_million_ids_pass_through_a_bounded_table() -> None:
    """50 M events of 20 M users who come, are seen now and then for hours, and go, and of items that are replaced."""
    rng = np.random.default_rng(0)
    model = sr.FM(POLICED, dim=8)
    size, batches, rate = 5_000, 10_000, 100.0  # events at once, how often, events a second of event time
    fields = np.tile(np.arange(3, dtype=np.int32), size)
    values, ones = np.ones(3 * size, dtype=np.float32), np.ones(size, dtype=np.float32)
    starts = np.arange(0, 3 * size, 3, dtype=np.int64)
    rows, ops = np.arange(size), np.full(size, SCORE | LEARN, dtype=np.int8)
    newest, peaks, held = 0, [], []
    for n in range(batches):
        events = n * size + np.arange(size)
        is_new = rng.random(size) < 0.4
        newest_now = newest + np.cumsum(is_new)
        # the youngest come most often: half of the visits of a user fall within some 20,000 newcomers
        ages = np.minimum((20_000 * rng.pareto(1.0, size)).astype(np.int64), newest_now)
        users = np.where(is_new, newest_now, newest_now - ages)
        newest = int(newest_now[-1])
        items = events // 2_000 + rng.integers(0, 5_000, size)
        raw = np.stack([users, items, events // 360_000 % 24], axis=1) * 3 + np.arange(3)
        ids = (raw.astype(np.uint64).ravel() * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
        batch = Batch(ids, values, fields, starts, starts + 3, times=events / rate)
        labels = ((users + items) % 7 < 2).astype(np.float32)
        scores = model.step(batch, rows, ops, labels, ones)
        assert scores.min() > 0 and scores.max() < 1
        if n % 500 == 499:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            held.append(len(model.ids))
    assert newest > 19_900_000
    half = len(peaks) // 2
    # a day of event time is 8.6 M events: the first fifth of the stream fills the table
    assert max(held) < 3_000_000, held
    assert peaks[-1] - peaks[half] < 32, f"MiB at every 2.5 M events: {peaks}"
    assert max(held[half:]) < 1.05 * max(held[:half]), held
    print(f"\nids held: {held[half]:,} to {max(held[half:]):,}; MiB: {peaks[half]:.0f} to {peaks[-1]:.0f}")


CHILD = """
import sys
sys.path.insert(0, {here!r})
from test_endless_stream import make_trainer
import streamrec as sr
make_trainer(sys.argv[2]).run(sr.JsonLines(sys.argv[1]))
"""


def test_thirty_kills(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log.open("wb") as lines:
        for event in events(400_000, seed=1):
            lines.write(sr.events.encode_event(event) + b"\n")
    child = [sys.executable, "-c", CHILD.format(here=str(Path(__file__).parent)), str(log), str(tmp_path / "killed")]
    rng = random.Random(2)
    kills = 0
    for _ in range(200):
        running = subprocess.Popen(child, stderr=subprocess.DEVNULL)
        try:
            running.wait(timeout=None if kills >= 30 else rng.uniform(2.5, 4.5))
        except subprocess.TimeoutExpired:
            running.kill()
        if running.wait() == 0:
            break
        assert running.returncode == -signal.SIGKILL
        kills += 1
    assert running.returncode == 0
    assert kills >= 1
    report = make_trainer(str(tmp_path / "whole")).run(sr.JsonLines(log))
    assert report.counts["learned"] > 390_000
    whole, killed = (sr.Store(str(tmp_path / name)).checkpoints.read() for name in ("whole", "killed"))
    assert whole is not None and killed is not None
    for part in ("model", "metrics", "counts", "preprocessors", "dead_letters"):
        assert first_difference(whole[1][part], killed[1][part]) is None, part
