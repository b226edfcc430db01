"""Served: which version the services are to serve, who decided it, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from streamrec.errors import ConfigError, StoreError
from streamrec.storage.shelf import Shelf

__all__ = ["Decision", "Served"]


class Decision(NamedTuple):
    """From `at` on, POSIX seconds by the store's clock, `version` is served, the newest if None; `why` says why.

    `time`: the event time that it was decided at, where a stream has made one think of it; else None.
    """

    version: int | None
    why: str
    at: float
    time: float | None = None


class Served:
    """The newest version, unless somebody has decided otherwise. Scorers look here when they refresh.

    Each decision is a file of its own, written as versions are, all or nothing; the newest counts. The version that is
    served and the one before it are never removed from the store.

    >>> from streamrec.storage import Store
    >>> store = Store("memory://doc/served", clock=lambda: 1700000000.0)
    >>> for auc in (0.75, 0.76, 0.52):
    ...     version = store.versions.write({"bias": 0.5}, {"metrics": {"AUC": auc}})
    >>> store.served.version()
    3
    >>> store.served.rollback(why="AUC fell to 0.52")
    Decision(version=2, why='AUC fell to 0.52', at=1700000000.0, time=None)
    >>> store.served.version(), store.served.follow(why="mended").version, store.served.version()
    (2, None, 3)
    """

    def __init__(self, decisions: Shelf, versions: Shelf) -> None:
        self._decisions = decisions
        self._versions = versions
        self.held: Callable[[], Collection[int]] = tuple
        """Other versions that must not be removed: see `Store.hold`."""

    def version(self) -> int | None:
        """The number of the version to be served now; None where there is none yet. Raises `StoreError`."""
        pinned = self.pinned()
        if pinned is not None:
            return pinned
        newest = self._versions.latest()
        return None if newest is None else newest.number

    def pinned(self) -> int | None:
        """The version that was decided for; None where the newest is to be served."""
        latest = self._decisions.latest()
        return None if latest is None else latest.info["version"]

    def pin(self, version: int, *, why: str, time: float | None = None) -> Decision:
        """Serve this version until another decision, whatever is published. Raises `StoreError` if it is not there."""
        there = [one.number for one in self._versions.list()]
        if version not in there:
            raise StoreError(
                f"there is no version {version} to serve; there are {', '.join(map(str, there)) or 'none'}"
            )
        before = self.pinned()
        decision = self._decide(version, why, time=time)
        if version not in [one.number for one in self._versions.list()]:  # removed by the trainer at this very moment
            self._decide(before, f"version {version} is gone")
            raise StoreError(f"version {version} was removed while it was decided for: choose a newer one")
        return decision

    def rollback(self, *, to: int | None = None, why: str) -> Decision:
        """Serve version `to`, or the newest before the one that is served now, until another decision.

        Raises `StoreError` where there is none.
        """
        if to is not None:
            return self.pin(to, why=why)
        now = self.version()
        before = [one.number for one in self._versions.list() if now is not None and one.number < now]
        if not before:
            raise StoreError(f"there is no version before {now} to roll back to: keep more with Store(keep=)")
        return self.pin(before[-1], why=why)

    def follow(self, *, why: str) -> Decision:
        """Serve the newest version from now on."""
        return self._decide(None, why)

    def challenge(self, version: int, *, time: float | None = None) -> Decision:
        """Say that a version is tried against the one that is served: it stays in the store until the next decision."""
        return self._decide(self.pinned(), f"version {version} is tried against it", challenger=version, time=time)

    def note(self, why: str, *, time: float | None = None) -> Decision:
        """Write something into the history; what is served stays."""
        return self._decide(self.pinned(), why, time=time)

    def history(self) -> list[Decision]:
        """All decisions kept, the newest last: a thousand of them."""
        return [
            Decision(one.info["version"], one.info["why"], one.created, one.info.get("time"))
            for one in self._decisions.list()
        ]

    def needed(self) -> set[int]:
        """Versions that must not be removed: the one decided for, the one before that, one that is tried, and those
        that were held then and are held now."""
        latest = self._decisions.latest()
        named = [] if latest is None else [latest.info[name] for name in ("version", "before", "challenger")]
        held = [] if latest is None else latest.info.get("held", [])
        return {version for version in (*named, *held, *self.held()) if version is not None}

    def _decide(
        self, version: int | None, why: str, challenger: int | None = None, time: float | None = None
    ) -> Decision:
        if not isinstance(why, str) or not why.strip():
            raise ConfigError(f"why must say why, for the history, got {why!r}")
        latest = self._decisions.latest()
        unchanged = latest is not None and latest.info["version"] == version
        before = latest.info["before"] if latest is not None and unchanged else self.version()
        named = {"version": version, "before": before, "challenger": challenger}
        info = {"why": why, **named, "held": sorted(self.held()), "time": time}
        return Decision(version, why, self._decisions.write({}, info).created, time)
