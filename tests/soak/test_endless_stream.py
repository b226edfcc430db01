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

import pytest

import streamrec as sr
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
