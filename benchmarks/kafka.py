"""From a Kafka topic to learned: `streamrec.sources.Kafka`, the Faust adapter, and Faust agents that drop it all; and
from published to served, by notices; and how late the app's event loop is meanwhile.

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
from pathlib import Path
from typing import Any

import streamrec as sr
from streamrec.events import encode_event
from streamrec.serving import StoreNotifier
from streamrec.sources import Kafka

NOTICES = "notices"
VERSIONS = 10
KINDS = ("streamrec.sources.Kafka", "Faust adapter", "Faust agent, take(256)", "Faust agent, one by one")


def make_trainer(store: str) -> sr.OnlineTrainer:
    fields = [sr.Id("user"), sr.Id("item"), *(sr.Id(f"f{n}") for n in range(6)), sr.Ids("tags"), sr.Number("price")]
    return sr.OnlineTrainer(
        model=sr.FM(sr.Schema(*fields), dim=16), join=sr.LabelJoin(windows={"click": 600.0}, lateness=60.0),
        preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)], metrics=[sr.AUC(), sr.NormalizedEntropy()],
        store=store,
    )  # fmt: skip


def values(events: int, since: int = 0) -> list[tuple[int, bytes | None]]:
    """Impressions with ten fields, and a click on every fifth."""
    found: list[tuple[int, bytes | None]] = []
    n = since
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
    with tempfile.TemporaryDirectory() as folder:
        warm = make_trainer(folder + "/warm")
        warm.push([sr.Impression("i", 1e9, "u", "p"), sr.Labeled(sr.Impression("j", 1e9, "u", "p"), 1.0)])
        trainer = make_trainer(folder + "/store")
        if kind == KINDS[0]:
            begun, used = time.perf_counter(), cpu()
            with Kafka(topic, address) as source:
                count = trainer.run(source).counts["events"]
            took, used = time.perf_counter() - begun, cpu() - used
        elif kind == NOTICES:
            print(json.dumps(asyncio.run(notices(address, topic, trainer, folder))))
            return
        else:
            took, used, count = asyncio.run(faust(kind, address, topic, events, trainer, folder))
    print(json.dumps({"seconds": took, "cpu": used, "count": count}))


async def faust(
    kind: str, address: str, topic: str, events: int, trainer: sr.OnlineTrainer, folder: str
) -> tuple[float, float, int]:
    from streamrec.adapters.faust import train

    app = make_app(address, folder)
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


def make_app(address: str, folder: str) -> Any:
    import faust as library

    return library.App(
        f"bench-{uuid.uuid4().hex}", broker=f"kafka://{address}", store="memory://", datadir=folder, web_enabled=False,
        broker_session_timeout=4.0, broker_heartbeat_interval=0.5, stream_wait_empty=False,
    )  # fmt: skip


async def notices(address: str, topic: str, trainer: sr.OnlineTrainer, folder: str) -> dict[str, list[float]]:
    """A scorer that is told of versions, while the worker learns what comes: seconds from a version's last file to the
    scorer that serves it; and how late the app's loop was, tick by tick, with what this process computed meanwhile."""
    from streamrec.adapters.faust import train
    from tests.kafka.broker import new_topic, send

    told = await asyncio.to_thread(new_topic, address)
    trainer.checkpoint_seconds = 1.0
    trainer.publish()
    app = make_app(address, folder)
    train(app, topic, trainer, notices=told)
    scorer = sr.Scorer(trainer.store)
    heard: list[float] = []
    ticks: list[float] = []
    ended = False

    def follow() -> None:
        served = scorer.version.number
        while not ended:
            if scorer.version.number != served:
                served, now = scorer.version.number, time.time()
                heard.append(now - Path(folder, "store", "versions", f"{served:010d}.json").stat().st_mtime)
            time.sleep(0.005)

    def produce() -> None:
        for n in range(VERSIONS):
            send(address, topic, values(200, since=10_000 * (n + 1)))
            time.sleep(1.5)

    with StoreNotifier(scorer, told, address, every=3600.0) as notifier:
        await asyncio.to_thread(notifier.start, 60.0)
        await app.start()
        loop = asyncio.get_running_loop()
        work = [loop.run_in_executor(None, follow), loop.run_in_executor(None, produce)]
        while not work[1].done():
            now = time.perf_counter()
            await asyncio.sleep(0.01)
            ticks.append(time.perf_counter() - now - 0.01)
        ended = True
        await asyncio.gather(*work)
        await app.stop()
    return {"heard": heard, "ticks": ticks}


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
        other = new_topic(broker.address, 4)
        walls: dict[str, list[float]] = {kind: [] for kind in KINDS}
        cpus: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(given.repetitions):
            for kind in KINDS:
                found = in_process(kind, broker.address, topic, given.events)
                walls[kind].append(found["count"] / found["seconds"])
                cpus[kind].append(found["count"] / found["cpu"])
        found = in_process(NOTICES, broker.address, other, given.events)
    finally:
        broker.close()
    slow = statistics.median(walls[KINDS[2]])
    print(f"From topic to learned, {given.events:,} events, 4 partitions, tansu; the agents learn nothing:\n")
    print(f"  {'':26}{'events/s':>10}{'a CPU second':>15}{'times take(256)':>17}")
    for kind in KINDS:
        rate = statistics.median(walls[kind])
        print(f"  {kind:26}{rate:>10,.0f}{statistics.median(cpus[kind]):>15,.0f}{rate / slow:>17.1f}")
    heard, ticks = sorted(found["heard"]), sorted(found["ticks"])
    print(f"\nFrom a published version to the scorer that serves it, by notices, {len(heard)} versions:")
    print(f"  median {1000 * statistics.median(heard):.0f} ms, longest {1000 * heard[-1]:.0f} ms")
    print(f"How late the app's loop was meanwhile, {len(ticks)} ticks of 10 ms:")
    late = [ticks[int(share * (len(ticks) - 1))] for share in (0.5, 0.99, 1.0)]
    print("  median {:.1f} ms, 99 % under {:.1f} ms, longest {:.1f} ms".format(*(1000 * one for one in late)))


def in_process(kind: str, address: str, topic: str, events: int) -> Any:
    """What `work` prints, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kafka", "--events", str(events), "--work", kind, address, topic]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
