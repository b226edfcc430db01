"""Ten minutes at full speed: memory flat within 5 % after the first, no event unaccounted for.

`make soak` runs it; `python -m tests.soak.test_full_speed [seconds]` alone prints what it sees every ten seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.events import Item, Position

pytestmark = pytest.mark.soak

SCHEMA = sr.Schema(sr.Id("user", ttl="1h"), sr.Id("item"), sr.Ids("tags"), sr.Number("price", log=True))
GAP = 0.01  # seconds of event time between two impressions


class Endless:
    """Impressions and clicks, made as they are read, until it is told to stop; some twice, some clicks too late.

    Users come and go: of 50,000 the oldest is replaced every ten seconds of event time, and the model forgets those of
    whom it has not heard for an hour.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: float | None = None
        self._next = 0
        rng = np.random.default_rng(0)
        self._users = (50_000 * rng.random(8_191) ** 2).astype(int).tolist()
        self._items = [f"p{n}" for n in rng.integers(0, 5_000, 4_093)]
        self._features: list[Any] = [
            {"tags": [*"abcdefgh"[n % 5 : n % 8]], "price": float(n % 97)} for n in range(1_021)
        ]
        self._clicked = (rng.random(4_096) < 0.1).tolist()
        self.given = {"impressions": 0, "feedback": 0, "doubles": 0, "late": 0}
        self.resident: list[float] = []
        self._looked = 0.0

    def read(self, limit: int) -> list[Item]:
        now = time.monotonic()
        if self._ends is None:
            self._ends = now + self._seconds
        if now >= self._ends:
            return []
        if now - self._looked >= 10.0:
            self._looked = now
            with open("/proc/self/statm", encoding="ascii") as file:
                self.resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        given, events = self.given, []
        first, drift = self._next, self._next // 1_000
        for n in range(first, first + limit // 2):
            user = f"u{drift + self._users[n % 8_191]}"
            shown = sr.Impression(f"i{n}", 1e9 + GAP * n, user, self._items[n % 4_093], self._features[n % 1_021])
            events.append(shown)
            given["impressions"] += 1
            if n % 101 == 0:
                events.append(shown)
                given["doubles"] += 1
            if n >= 10_000 and self._clicked[n % 4_096]:
                delay = 9_000 if n % 50 == 0 else 2_000  # 90 s, which is too late, or 20 s
                events.append(sr.Feedback(f"c{n}", f"i{n - delay}", 1e9 + GAP * n))
                given["late" if delay == 9_000 else "feedback"] += 1
        self._next += limit // 2
        return events

    def position(self) -> Position:
        return {"next": self._next}

    def seek(self, position: Position) -> None:
        self._next = position["next"]


def soak(seconds: float) -> tuple[list[float], dict[str, int], dict[str, int], float]:
    """MiB resident every ten seconds, what was given, the counts, the seconds."""
    source = Endless(seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sr.OnlineTrainer(
            model=sr.FM(SCHEMA, dim=8),
            preprocessors=[
                sr.Dedup(ttl=300.0, capacity=100_000),
                sr.RateLimit(most=100_000, within="1m"),
            ],
            join=sr.LabelJoin(windows={"click": 60.0}, capacity=100_000),
            metrics=[sr.AUC(), sr.LogLoss(), sr.CTR()],
            store=sr.Store(folder, keep=2),
            checkpoint_every=1_000_000,
        )
        report = trainer.run(source)
    counts = dict(report.counts)
    counts["positives"] = round(report.metrics["CTR"] * counts["learned"])
    return source.resident, source.given, counts, report.seconds


def check(resident: list[float], given: dict[str, int], counts: dict[str, int]) -> None:
    """Nothing unaccounted for, and memory flat after a minute."""
    assert counts["events"] == sum(given.values())
    assert counts["duplicate"] == given["doubles"]
    assert counts["learned"] + counts["pending"] == counts["impressions"] == given["impressions"]
    dropped = counts["outside_window"] + counts["unmatched"] + counts["repeated"]
    late = counts["late_feedback"]
    # clicks on what is open are in no count yet: at most one for each impression that waits
    assert dropped + late >= given["late"]
    assert 0 <= given["feedback"] + given["late"] - dropped - late - counts["positives"] <= counts["pending"]
    after = resident[7:]
    assert max(after) < 1.05 * resident[6], [round(one) for one in resident]


def test_ten_minutes() -> None:
    resident, given, counts, _ = soak(600.0)
    check(resident, given, counts)


if __name__ == "__main__":
    resident, given, counts, seconds = soak(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0)
    print("MiB resident, every 10 s:", *(f"{one:.0f}" for one in resident))
    print(f"{counts['events']:,} events in {seconds:.0f} s, {counts['events'] / seconds:,.0f} a second")
    print("given:", given)
    print("counts:", {name: count for name, count in counts.items() if count})
    check(resident, given, counts)
