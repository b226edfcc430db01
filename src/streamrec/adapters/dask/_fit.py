"""Fit: a `BatchTrainer`'s training, by the workers of a cluster."""

from __future__ import annotations

from typing import Any

from streamrec.adapters.dask._cluster import require_client
from streamrec.adapters.dask._copies import fit_copies
from streamrec.adapters.dask._dense import SHARED, fit_dense
from streamrec.errors import ConfigError
from streamrec.evaluators import Report
from streamrec.models import FM
from streamrec.storage import EncodedRows
from streamrec.trainers import BatchTrainer

__all__ = ["fit"]


def fit(
    client: Any,
    trainer: BatchTrainer,
    data: EncodedRows | str,
    *,
    copies: int | None = None,
    apart: int = 1_048_576,
    keep: int = 1 << 30,
    timeout: float = 600.0,
) -> Report:
    """Do what `trainer.run(data)` does, on the workers of `client`, and leave the trainer as that would.

    An FM is learned by `copies` of it, by default one for each thread of the cluster, eight at most: each learns its
    part of the data event by event, the parts being neighbours in time, and the copies are merged when each has learned
    `apart` rows, at the end of an epoch, eight of them in its middle, too, and more often in the first epoch
    (`streamrec.models.merging` says how). The result depends on how many copies there are, not on which worker has
    which; with one it is that of `trainer.run`, bit for bit. `window`, `shuffle`, `validation`, `schedule` and the rest
    are the trainer's. `data`: encoded rows that all workers can read, or their URI, from the first row on. A `Dense` or
    a `BertCTR` is learned by `fit_dense`, `copies` being its ranks.

    Each copy takes some five times the memory of the model (itself, what it was at the last merge, what is sent, what
    comes, room to grow), however many there are, three windows of rows, and up to `keep` bytes of decoded rows, which
    it keeps for the next epoch.

    The trainer's store, if it has one, gets a checkpoint every `checkpoint_seconds` from the worker of the first copy,
    where that can write to it, and the result from the client. Where a worker is lost, the others go on from the newest
    checkpoint, or from the beginning, and the result is the same. `timeout`: seconds in which copies must meet and in
    which something must be heard of them.

    Raises `ConfigError` or `SchemaError` where model, data and checkpoint do not fit together, `DamagedError` where the
    data cannot be read, `ClusterError` where the cluster fails: workers are lost again and again, nothing is heard of
    them, the scheduler is lost.
    """
    client = require_client(client)
    for name, value in (("copies", 1 if copies is None else copies), ("apart", apart)):
        if value < 1:
            raise ConfigError(f"{name} must be >= 1, got {value!r}")
    if keep < 0:
        raise ConfigError(f"keep must be >= 0 bytes, got {keep!r}")
    if not timeout > 0:
        raise ConfigError(f"timeout must be > 0 seconds, got {timeout!r}")
    rows = EncodedRows(data) if isinstance(data, str) else data
    trainer.model.schema.require(rows.schema, what="the rows")
    if isinstance(trainer.model, SHARED):
        return fit_dense(client, trainer, rows, ranks=copies, timeout=timeout)
    if type(trainer.model) is FM:  # what inherits from it may have parameters that nobody merges
        return fit_copies(client, trainer, rows, copies=copies, apart=apart, keep=keep, timeout=timeout)
    raise ConfigError(
        f"fit does not know how to learn a {type(trainer.model).__name__} on several workers; use trainer.run"
    )
