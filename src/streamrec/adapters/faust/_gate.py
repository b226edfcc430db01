"""Gate: an app starts when its broker has answered, or says in time that none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mode import Service

from streamrec.adapters.faust._topics import client
from streamrec.errors import ConfigError
from streamrec.sources._kafka_connect import Plan, connect, stop

__all__ = ["Gate", "GROUP_ONLY"]

GROUP_ONLY = ("session_timeout_ms", "heartbeat_interval_ms")  # nothing for a consumer without a group


class Gate(Service):
    """Started before all else in the app: with a broker that holds connections and says nothing, Faust's own producer
    would wait for twenty minutes, and nothing else would begin.

    Raises `SourceError`, which ends the worker, where no broker has answered for `timeout` seconds, or one has, and
    there is no such topic.
    """

    def __init__(self, app: Any, topics: tuple[str, ...], timeout: float, settings: Mapping[str, Any]) -> None:
        if not timeout > 0:
            raise ConfigError(f"timeout must be > 0 seconds, got {timeout!r}")
        self._app, self._topics, self._timeout = app, topics, timeout
        self._settings = {name: value for name, value in settings.items() if name not in GROUP_ONLY}
        super().__init__()

    @classmethod
    def before(cls, app: Any, topics: tuple[str, ...], timeout: float, settings: Mapping[str, Any] = {}) -> None:
        """Set one before all that the app starts."""
        app.add_dependency(cls(app, topics, timeout, settings))

    async def on_start(self) -> None:
        settings = client(self._app)
        servers = tuple(settings.pop("bootstrap_servers"))
        consumer, _ = await connect(
            Plan(self._topics, servers, None, True, "earliest", self._timeout, 1, None, {**settings, **self._settings})
        )
        await stop(consumer)
