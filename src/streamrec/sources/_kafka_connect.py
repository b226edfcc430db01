"""The way to a broker: what a Kafka source needs to know of it, and a client that has found it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from streamrec.errors import ConfigError, SourceError

__all__ = ["Partition", "Plan", "connect", "names_of", "stop"]


class Partition(NamedTuple):
    topic: str
    number: int


class Plan(NamedTuple):
    """What a connection needs to know."""

    topics: tuple[str, ...]
    servers: str | tuple[str, ...]
    partitions: tuple[int, ...] | None
    follow: bool
    start: str
    timeout: float
    prefetch: int
    group: str | None
    client: Mapping[str, Any]


async def connect(plan: Plan) -> tuple[Any, list[Partition]]:
    """A started `AIOKafkaConsumer`, and the partitions that are to be read; `stop` ends it.

    Raises `SourceError` where no broker has answered for `plan.timeout` seconds, or one has, and a topic or a partition
    is not there; `ConfigError` where a setting cannot work.
    """
    try:
        from aiokafka import AIOKafkaConsumer
    except ImportError as error:
        raise ConfigError('the Kafka source needs aiokafka: pip install "streamrec[faust]"') from error
    loop = asyncio.get_running_loop()
    deadline = loop.time() + plan.timeout
    # shorter than the whole, so that a client gives up by itself: one that is cancelled leaks its connection
    asked = min(max(0.5, plan.timeout / 2), 40.0)
    settings: dict[str, Any] = {"request_timeout_ms": int(1000 * asked)}
    settings |= plan.client
    settings |= {
        "bootstrap_servers": plan.servers if isinstance(plan.servers, str) else list(plan.servers),
        "group_id": plan.group,
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
    }
    trouble: BaseException | None = None
    while True:
        left = deadline - loop.time()
        if left <= 0:
            raise SourceError(
                f"no broker has answered at {names_of(plan.servers)} for {plan.timeout:g} s"
                f"{f' ({trouble})' if trouble and str(trouble) else ''}; check bootstrap_servers, and that the "
                "broker is up and lets this machine in"
            )
        try:
            consumer = AIOKafkaConsumer(**settings)
        except Exception as error:
            raise ConfigError(f"aiokafka refuses these settings: {error}") from error
        try:
            await asyncio.wait_for(consumer.start(), left + 2 * asked)
            found = await asyncio.wait_for(_partitions(plan, consumer), max(0.1, deadline - loop.time()))
        except (SourceError, ConfigError):
            await stop(consumer)
            raise
        except asyncio.CancelledError:
            await stop(consumer)
            raise
        except Exception as error:
            # refused, reset, no address, not the leader yet, ...: whatever it is, it may pass
            trouble = error if not isinstance(error, asyncio.TimeoutError) else trouble
            await stop(consumer)
            await asyncio.sleep(min(0.2, max(0.0, left)))
        else:
            return consumer, found


async def _partitions(plan: Plan, consumer: Any) -> list[Partition]:
    """What to read. Raises `SourceError` where a topic or a partition is not there."""
    there = await consumer.topics()
    found = []
    for topic in plan.topics:
        numbers = consumer.partitions_for_topic(topic) if topic in there else None
        if not numbers:
            raise SourceError(
                f"the broker has no topic {topic!r}; create it first, or check the name: it has "
                f"{', '.join(sorted(there)[:10]) or 'none'}"
            )
        wanted = sorted(numbers) if plan.partitions is None else plan.partitions
        missing = set(wanted) - set(numbers)
        if missing:
            raise SourceError(f"topic {topic!r} has partitions {sorted(numbers)}, not {sorted(missing)}")
        found += [Partition(topic, number) for number in wanted]
    return found


async def stop(consumer: Any) -> None:
    """End a client that is given up."""
    with suppress(Exception):  # there is an error to be told already
        await asyncio.wait_for(consumer.stop(), 5.0)


def names_of(servers: str | tuple[str, ...]) -> str:
    """For a message."""
    return servers if isinstance(servers, str) else ", ".join(servers)
