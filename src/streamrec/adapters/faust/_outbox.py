"""Outbox: what is sent to topics goes one after the other, in the order in which it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aiokafka.errors import MessageSizeTooLargeError, RecordTooLargeError

from streamrec.events import DeadLetter

__all__ = ["Message", "Outbox"]

_CUT = 4096  # bytes kept of a dead letter that is too large for its topic
_TOO_LARGE = (MessageSizeTooLargeError, RecordTooLargeError)


class Message(NamedTuple):
    key: bytes
    value: bytes
    headers: Mapping[str, bytes] = {}


class Outbox:
    """Sends by the app's own producer, in turns: a topic's messages are handed to it in the order of the calls.

    Without turns they would not be. Where the producer has no room for a message, its sender waits for some; and
    aiokafka wakes all that wait at once, to go on in any order. With a hundred batches waiting, what was asked for
    first went out last, in among the others, or its wait ran out.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._turns: dict[str, asyncio.Lock] = {}

    async def send(self, topic: str, messages: Sequence[Message]) -> list[int]:
        """Send, and wait until the broker has them all; returns the places of those that are too large for it."""
        accepted: dict[int, Any] = {}
        large: list[int] = []
        async with self._turns.setdefault(topic, asyncio.Lock()):
            producer = await self._app.maybe_start_producer()
            for place, (key, value, headers) in enumerate(messages):
                try:
                    accepted[place] = await producer.send(topic, key, value, None, None, dict(headers))
                except Exception as error:  # Faust wraps what aiokafka raises
                    if not isinstance(error, _TOO_LARGE) and not isinstance(error.__cause__, _TOO_LARGE):
                        raise
                    large.append(place)
        answers = await asyncio.gather(*accepted.values(), return_exceptions=True)
        for place, answer in zip(accepted, answers, strict=True):
            if isinstance(answer, _TOO_LARGE):
                large.append(place)
            elif isinstance(answer, BaseException):
                raise answer
        return sorted(large)

    async def bury(self, topic: str, letter: DeadLetter) -> None:
        """Send a dead letter; one that is too large for its topic is cut, and says so in its header `cut`."""
        headers = {name: str(value).encode() for name, value in letter.position.items()}
        headers["reason"] = letter.reason.encode("utf-8", "replace")
        key = b"/".join(headers.get(name, b"") for name in ("topic", "partition", "offset"))
        if await self.send(topic, [Message(key, letter.raw, headers)]):
            headers["cut"] = str(len(letter.raw)).encode()  # its size before
            await self.send(topic, [Message(key, letter.raw[:_CUT], headers)])
