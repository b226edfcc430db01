"""The errors streamrec raises, each naming the value and the cure.

    StreamrecError
    ├── ConfigError (ValueError)       an argument that cannot work
    │   └── SchemaError                fields that clash, or that differ from what was saved
    ├── FullError                      a queue has no room: try again later; over HTTP, a 503 or a 429
    ├── SourceError (OSError)          events cannot be read at all: no such file, a position not in the source
    └── StoreError (OSError)           a version cannot be written, or none can be read
        ├── DamagedError               what was read is not what was written
        └── UnreachableError           its files cannot be read or written now: it may pass

Bad *events* raise none of these: they are counted and kept as `DeadLetter`s, and the stream goes on.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DamagedError",
    "FullError",
    "SchemaError",
    "SourceError",
    "StoreError",
    "StreamrecError",
    "UnreachableError",
]


class StreamrecError(Exception):
    """The root: catch it to catch all that streamrec raises."""


class ConfigError(StreamrecError, ValueError):
    """An argument that cannot work."""


class SchemaError(ConfigError):
    """Fields that clash with one another, or that differ from those of what was saved."""


class FullError(StreamrecError):
    """A queue has no room for these events: try again later. Over HTTP, a 503 or a 429."""


class SourceError(StreamrecError, OSError):
    """Events cannot be read at all."""


class StoreError(StreamrecError, OSError):
    """A checkpoint or a version cannot be written, or none can be read."""


class DamagedError(StoreError):
    """What was read is not what was written: a checksum does not match."""


class UnreachableError(StoreError):
    """Files cannot be read or written now: no answer, no room, no permission. It may pass; what is there stays good."""
