"""Store: the checkpoints and the published versions of a model, and which version is served."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection

from streamrec.errors import ConfigError
from streamrec.storage._folders import folder
from streamrec.storage.served import Served
from streamrec.storage.shelf import Shelf

__all__ = ["Store"]

_DECISIONS = 1000  # of which version to serve, kept as its history


class Store:
    """Checkpoints and published versions, in a folder or a bucket.

    `uri`: a path or any fsspec URI. `keep`: how many versions stay on each shelf; older ones are removed.
    `clock`: gives the POSIX seconds that versions are stamped with. Nothing is read or written before it is asked for.

    One writer and any number of readers at a time. `checkpoints` holds all that a resumed run needs, `versions` what a
    service needs, and `served` says which of them it is to serve. Raises `ConfigError` for arguments that cannot work.

    >>> store = Store("memory://doc/store")
    >>> store.versions.write({"bias": 0.5}, {"AUC": 0.76}).number
    1
    >>> version, state = store.versions.read()
    >>> version.info, state
    ({'AUC': 0.76}, {'bias': 0.5})
    """

    checkpoints: Shelf
    versions: Shelf
    served: Served

    def __init__(self, uri: str | os.PathLike[str], *, keep: int = 3, clock: Callable[[], float] = time.time) -> None:
        self.uri = os.fspath(uri)
        self.keep = keep
        self.clock = clock
        if not self.uri:
            raise ConfigError("uri must name a folder, got ''")
        if not isinstance(keep, int) or keep < 1:
            raise ConfigError(f"keep must be a whole number >= 1, got {keep!r}")
        self.checkpoints = Shelf(folder(self.uri, "checkpoints"), keep=keep, clock=clock, needed=self._held_checkpoints)
        decisions = Shelf(folder(self.uri, "served"), keep=_DECISIONS, clock=clock)
        self.versions = Shelf(folder(self.uri, "versions"), keep=keep, clock=clock, needed=lambda: self.served.needed())
        self.served = Served(decisions, self.versions)
        self._with_checkpoints = False

    def hold(self, versions: Callable[[], Collection[int]], *, checkpoints: bool = False) -> None:
        """Keep the versions of these numbers, asked for at each write, and with `checkpoints` those that were cut with
        them, however old they are. For as long as this object lives: whoever writes says so again when it begins."""
        self.served.held = versions
        self._with_checkpoints = checkpoints

    def checkpoint_of(self, version: int) -> int | None:
        """The number of the checkpoint that was cut with this version; None where there is none. Raises
        `StoreError`."""
        found = [one.number for one in self.checkpoints.list() if one.info.get("version") == version]
        return found[-1] if found else None

    def _held_checkpoints(self) -> set[int]:
        held = {*self.served.held()} if self._with_checkpoints else set()
        return {one.number for one in self.checkpoints.list() if one.info.get("version") in held} if held else set()

    def __repr__(self) -> str:
        return f"Store({self.uri!r}, keep={self.keep})"
