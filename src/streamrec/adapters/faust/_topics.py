"""Topics by name, raw; messages and dead letters that are sent; the app's own way to its brokers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka.errors import MessageSizeTooLargeError

from streamrec.errors import ConfigError
from streamrec.events import DeadLetter

__all__ = ["bury", "client", "raw_topic", "send", "send_all", "topic_name"]

_CUT = 4096  # bytes kept of a message that the broker refuses as too large for the dead letters' topic


def topic_name(topic: Any) -> str:
    """The name of a topic: a string, or one of Faust's channels of exactly one topic."""
    if isinstance(topic, str) and topic:
        return topic
    names = list(getattr(topic, "topics", None) or ())
    if len(names) != 1:
        raise ConfigError(f"topic must be a name, or app.topic() of one name, got {topic!r}")
    return str(names[0])


def raw_topic(app: Any, topic: Any) -> Any:
    """A topic whose values are the bytes as they came: our decoders read them, and no bad one stops a stream."""
    return app.topic(topic_name(topic), key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


async def send_all(app: Any, topic: str, messages: Sequence[tuple[bytes, bytes]]) -> None:
    """Send keys with values, in order, and wait until the broker has them all."""
    producer = await app.maybe_start_producer()
    sent = [await producer.send(topic, key, value, None, None, {}) for key, value in messages]
    await asyncio.gather(*sent)


async def send(app: Any, topic: str, key: bytes, value: bytes, headers: Mapping[str, bytes] | None = None) -> None:
    """Send, and wait until the broker has it."""
    producer = await app.maybe_start_producer()
    await producer.send_and_wait(topic, key, value, None, None, dict(headers or {}))


async def bury(app: Any, topic: str, letter: DeadLetter) -> None:
    """Send a dead letter to its topic."""
    headers = {name: str(value).encode() for name, value in letter.position.items()}
    headers["reason"] = letter.reason.encode("utf-8", "replace")
    key = headers.get("topic", b"") + b"/" + headers.get("partition", b"") + b"/" + headers.get("offset", b"")
    try:
        await send(app, topic, key, letter.raw, headers)
    except MessageSizeTooLargeError:
        headers["cut"] = str(len(letter.raw)).encode()  # its size before
        await send(app, topic, key, letter.raw[:_CUT], headers)


def client(app: Any, *, servers: bool = True) -> dict[str, Any]:
    """The app's own way to its brokers, as settings for aiokafka."""
    from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

    conf = app.conf
    auth = dict(credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context))
    auth["client_id"] = conf.broker_client_id
    if servers:
        auth["bootstrap_servers"] = [f"{url.host}:{url.port or 9092}" for url in conf.broker]
    return auth
