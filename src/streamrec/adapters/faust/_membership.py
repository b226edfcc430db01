"""Which of several workers owns what of a topic: membership of a consumer group, in which no message is fetched.

Either one member holds everything, and keeps it while it lives: when it leaves or dies, the broker gives the topic to a
member that stands by. Or the partitions are shared out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.errors import (
    CommitFailedError,
    IllegalGenerationError,
    IllegalStateError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)

__all__ = ["Claim", "Membership", "NotOwner"]

Claim = Callable[[], int]
"""How far a member is that holds everything: of two that both think they hold it, the one further ahead does."""


_FENCED = (
    CommitFailedError,
    IllegalGenerationError,
    IllegalStateError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)


class NotOwner(Exception):
    """Another worker owns the topic, or this part of it, by now."""


class Membership:
    """A member of `group` for `topic`, until `stop`.

    `won` is awaited with the partitions that are this worker's from now on, `lost` before it gives them up. `failed` is
    awaited with the error where the group puts it out for good. `claim`: one member has them all; None: they are shared
    out.
    """

    def __init__(
        self,
        topic: str,
        group: str,
        settings: Mapping[str, Any],
        *,
        won: Callable[[Sequence[int]], Awaitable[None]],
        lost: Callable[[], Awaitable[None]],
        failed: Callable[[Exception], Awaitable[None]],
        claim: Claim | None,
    ) -> None:
        self.topic = topic
        self._won, self._lost, self._failed = won, lost, failed
        self.owner = False
        self._consumer = AIOKafkaConsumer(
            **settings,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            partition_assignment_strategy=[
                RoundRobinPartitionAssignor if claim is None else _one_owner(lambda: claim() + 1 if self.owner else 0)
            ],
        )
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Join. Raises what aiokafka raises where there is no broker."""
        await self._consumer.start()
        self._consumer.subscribe([self.topic], listener=_Listener(self))
        self._polling = asyncio.get_running_loop().create_task(self._poll())

    async def _poll(self) -> None:
        try:
            while True:  # a member that does not poll is put out of the group; all is paused, so nothing comes
                paused = self._consumer.assignment()
                if paused:
                    self._consumer.pause(*paused)
                await self._consumer.getmany(timeout_ms=500)
        except Exception as error:  # what may pass has been tried again, below; this will not
            await self._failed(error)

    async def stop(self) -> None:
        """Leave the group, so that another may take over at once."""
        if self._polling is not None:
            self._polling.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._polling
        await self._consumer.stop()

    async def commit(self, offsets: Mapping[int, int]) -> None:
        """Tell the group's offsets. Raises `NotOwner` where this worker owns the topic no longer."""
        held = {one.partition for one in self._consumer.assignment()}
        if not self.owner or not held.issuperset(offsets):
            raise NotOwner
        try:
            await self._consumer.commit({TopicPartition(self.topic, number): at for number, at in offsets.items()})
        except _FENCED as error:
            raise NotOwner from error

    async def assigned(self, partitions: set[Any]) -> None:
        if partitions:
            self._consumer.pause(*partitions)
        self.owner = bool(partitions)
        if self.owner:
            await self._won(sorted(one.partition for one in partitions))

    async def revoked(self) -> None:
        if self.owner:
            await self._lost()  # still the owner, for the broker, until this returns


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, election: Membership) -> None:
        self._election = election

    async def on_partitions_revoked(self, revoked: set[Any]) -> None:
        await self._election.revoked()

    async def on_partitions_assigned(self, assigned: set[Any]) -> None:
        await self._election.assigned(assigned)


def _one_owner(claim: Callable[[], int]) -> type[AbstractPartitionAssignor]:
    class OneOwner(AbstractPartitionAssignor):  # type: ignore[misc]
        name = "streamrec-one-owner"
        version = 0

        @classmethod
        def assign(cls, cluster: Any, members: Mapping[str, Any]) -> dict[str, Any]:
            # the owner keeps it; of two that claim it the one ahead; where nobody does, by name
            owner = max(sorted(members), key=lambda member: int(members[member].user_data or b"0"))
            found = {}
            for member, metadata in members.items():
                mine = [
                    (topic, sorted(cluster.partitions_for_topic(topic) or ()))
                    for topic in metadata.subscription
                    if member == owner
                ]
                found[member] = ConsumerProtocolMemberAssignment(cls.version, mine, b"")
            return found

        @classmethod
        def metadata(cls, topics: Any) -> Any:
            return ConsumerProtocolMemberMetadata(cls.version, list(topics), b"%d" % claim())

        @classmethod
        def on_assignment(cls, assignment: Any) -> None:
            pass

    return OneOwner
