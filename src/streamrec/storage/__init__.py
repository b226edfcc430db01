"""Checkpoints and published models: versioned, atomic, checksummed."""

from __future__ import annotations

from streamrec.storage._chain import resolve
from streamrec.storage._manifest import Version
from streamrec.storage.archive import Archive
from streamrec.storage.encoded import EncodedRows
from streamrec.storage.served import Decision, Served
from streamrec.storage.shelf import DamagedWarning, Shelf
from streamrec.storage.store import Store

__all__ = ["Archive", "DamagedWarning", "Decision", "EncodedRows", "Served", "Shelf", "Store", "Version", "resolve"]
