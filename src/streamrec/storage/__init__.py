"""Checkpoints and published models: versioned, atomic, checksummed."""

from __future__ import annotations

from streamrec.storage._chain import resolve
from streamrec.storage.encoded import EncodedRows
from streamrec.storage.store import DamagedWarning, Shelf, Store, Version

__all__ = ["DamagedWarning", "EncodedRows", "Shelf", "Store", "Version", "resolve"]
