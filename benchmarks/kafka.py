"""From a Kafka topic to learned: `streamrec.sources.Kafka`, the Faust adapter, and Faust agents that drop it all.

    python -m benchmarks.kafka [--events N] [--repetitions N]

Broker and client share the machine. Each in a process of its own, so that its CPU seconds are its own; the rates are by
the wall clock, and the column "a CPU second" is what one core of the client would do. Needs the broker of the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any

import streamrec as sr
from streamrec.events import encode_event
from streamrec.sources import Kafka

KINDS = ("streamrec.sources.Kafka", "Faust adapter", "Faust agent, take(256)", "Faust agent, one by one")


def make_trainer(store: str) -> sr.OnlineTrainer:
    fields = [sr.Id("user"), sr.Id("item"), *(sr.Id(f"f{n}") for n in range(6)), sr.Ids("tags"), sr.Number("price")]
    return sr.OnlineTrainer(
        model=sr.FM(sr.Schema(*fields), dim=16), join=sr.LabelJoin(windows={"click": 600.0}, lateness=60.0),
        preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)], metrics=[sr.AUC(), sr.NormalizedEntropy()],
        store=store,
    )  # fmt: skip


def values(events: int) -> list[tuple[int, bytes | None]]:
    """Impressions with ten fields, and a click on every fifth."""
    found: list[tuple[int, bytes | None]] = []
    n = 0
    while len(found) < events:
        features: dict[str, Any] = {f"f{m}": str(n % (7 + m)) for m in range(6)}
        features |= {"tags": ["a", "b"], "price": float(n % 50)}
        shown = sr.Impression(f"i{n}", 1e9 + n, f"u{n % 1000}", f"p{n % 300}", features)
        found.append((n % 4, encode_event(shown)))
        if n % 5 == 0:
            found.append((n % 4, encode_event(sr.Feedback(f"c{n}", f"i{n}", 1e9 + n + 5.0))))
        n += 1
    return found[:events]


def work(kind: str, address: str, topic: str, events: int) -> None:
    """Read it all; prints seconds, CPU seconds and what was learned."""
    warm = make_trainer(tempfile.mkdtemp())
    warm.push([sr.Impression("i", 1e9, "u", "p"), sr.Labeled(sr.Impression("j", 1e9, "u", "p"), 1.0)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder + "/store")
        if kind == KINDS[0]:
            begun, used = time.perf_counter(), cpu()
            with Kafka(topic, address) as source:
                count = trainer.run(source).counts["events"]
            took, used = time.perf_counter() - begun, cpu() - used
        else:
            took, used, count = asyncio.run(faust(kind, address, topic, events, trainer, folder))
    print(json.dumps({"seconds": took, "cpu": used, "count": count}))


async def faust(
    kind: str, address: str, topic: str, events: int, trainer: sr.OnlineTrainer, folder: str
) -> tuple[float, float, int]:
    import faust as library

    from streamrec.adapters.faust import train

    app = library.App(
        f"bench-{uuid.uuid4().hex}", broker=f"kafka://{address}", store="memory://", datadir=folder, web_enabled=False,
        broker_session_timeout=4.0, broker_heartbeat_interval=0.5, stream_wait_empty=False,
    )  # fmt: skip
    seen = [0]

    async def take(stream: Any) -> None:
        async for batch in stream.take(256, within=0.5):
            seen[0] += len(batch)

    async def one_by_one(stream: Any) -> None:
        async for _ in stream:
            seen[0] += 1

    if kind == KINDS[1]:
        train(app, topic, trainer)
    else:
        raw = app.topic(topic, value_type=bytes, value_serializer="raw")
        app.agent(raw)(take if kind == KINDS[2] else one_by_one)

    def done() -> int:
        return app.monitor.metric_counts["streamrec_events"] if kind == KINDS[1] else seen[0]

    await app.start()
    while not done():
        await asyncio.sleep(0.001)
    first, begun, used = done(), time.perf_counter(), cpu()
    while done() < events - 255:  # take(256) keeps the last ones for a while
        await asyncio.sleep(0.005)
    took, used, count = time.perf_counter() - begun, cpu() - used, done() - first
    await app.stop()
    return took, used, count


def cpu() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    from tests.kafka.broker import Broker, new_topic, send

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--work", nargs=3)
    given = parser.parse_args()
    if given.work:
        kind, address, topic = given.work
        work(kind, address, topic, given.events)
        return
    broker = Broker("tansu")
    try:
        topic = new_topic(broker.address, 4)
        send(broker.address, topic, values(given.events))
        walls: dict[str, list[float]] = {kind: [] for kind in KINDS}
        cpus: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(given.repetitions):
            for kind in KINDS:
                command = [sys.executable, "-m", "benchmarks.kafka", "--events", str(given.events)]
                done = subprocess.run(
                    [*command, "--work", kind, broker.address, topic], capture_output=True, text=True, check=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                walls[kind].append(found["count"] / found["seconds"])
                cpus[kind].append(found["count"] / found["cpu"])
    finally:
        broker.close()
    slow = statistics.median(walls[KINDS[2]])
    print(f"From topic to learned, {given.events:,} events, 4 partitions, tansu; the agents learn nothing:\n")
    print(f"  {'':26}{'events/s':>10}{'a CPU second':>15}{'times take(256)':>17}")
    for kind in KINDS:
        rate = statistics.median(walls[kind])
        print(f"  {kind:26}{rate:>10,.0f}{statistics.median(cpus[kind]):>15,.0f}{rate / slow:>17.1f}")


if __name__ == "__main__":
    main()
