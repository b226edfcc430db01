"""Dense models on the workers: a process each that computes its share of every step, and all move as one."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from streamrec.adapters.dask._cluster import ClusterError, given, require_client, threads_of
from streamrec.adapters.dask._ranks import Group, Parted, Ranks, parting, run_ranks
from streamrec.errors import ConfigError
from streamrec.evaluators import Report
from streamrec.models import BertCTR
from streamrec.protocols import State
from streamrec.storage import EncodedRows, Shelf, Store, Version
from streamrec.trainers import BatchTrainer, Dense

__all__ = ["SHARED", "fit_dense"]

SHARED = Dense, BertCTR
"""Models that several processes learn together."""


class _Ended(NamedTuple):
    """What a rank has come to: the sha256 of all it has learned."""

    digest: str
    report: Report


def fit_dense(
    client: Any,
    trainer: BatchTrainer,
    data: EncodedRows | str,
    *,
    ranks: int | None = None,
    restarts: int = 3,
    timeout: float = 300.0,
) -> Report:
    """Train a `Dense` or a `BertCTR` on the workers together: equal to `trainer.run(data)` alone, but for rounding.

    Every rank reads all rows and computes its share of each step; the gradients are summed (gloo; NCCL where each
    worker has a GPU of its own), so that the models stay equal bit for bit, which is checked at the end. Two ranks and
    one process with `accumulate=2` compute the same parts, and so does the one that is left where the other is lost.

    `trainer`: its store must be one that all workers can reach; the first rank writes its checkpoints and the version,
    and the training goes on from the newest one. `ranks`: how many workers take part, each with one thread; None: all.
    When one is lost the others are stopped, and those that live go on from the last checkpoint, `restarts` times at
    most. `timeout`: seconds for each rendezvous and each sum, so more than a checkpoint takes to write.

    At the end `trainer` is as if it had run here. Raises what a rank raised; `ConfigError` for arguments that cannot
    work; `ClusterError` where the cluster fails, or too often: then the store has the last checkpoint.
    """
    client = require_client(client)
    rows = EncodedRows(data) if isinstance(data, str) else data
    if not isinstance(trainer.model, SHARED):
        raise ConfigError(f"the model must be a Dense or a BertCTR, got a {type(trainer.model).__name__}")
    _check(trainer, rows, ranks, restarts, timeout)
    store = trainer.store
    sent = given(client, trainer)
    lost, parts = "", 0
    for _ in range(restarts + 1):
        living = sorted(threads_of(client))[:ranks]
        if not living:
            raise ClusterError("there are no workers; add some and call again: the store has the last checkpoint")
        at_once = getattr(trainer.model, "accumulate", 1)  # a BertCTR has micro-batches of its own
        parts = parts or len(living) * at_once  # the same for the rest, however many are left
        try:
            ranked = Ranks({address: [number] for number, address in enumerate(living)})
            # each sum has its timeout; nobody says how long a step or a pass over the validation part takes
            ended = run_ranks(client, _rank, (sent, rows, parts), ranked, timeout=timeout, silence=math.inf)
        except Parted as error:
            lost = str(error)
            continue
        digests = {one.digest for one in ended}
        if len(digests) > 1:
            raise ClusterError(
                f"{len(ended)} ranks have ended with {len(digests)} different models: the module is not the same "
                "everywhere; is something in it random that torch's seed does not decide?"
            )
        trainer.store = store
        return trainer.run(rows, progress=False)  # it has ended: this reads what was learned
    raise ClusterError(f"ranks were lost {restarts + 1} times, last: {lost}; the store has the last checkpoint")


def _check(trainer: BatchTrainer, rows: EncodedRows, ranks: int | None, restarts: int, timeout: float) -> None:
    if trainer.store is None:
        raise ConfigError("give the trainer a store that all workers can reach: it is where a lost rank goes on from")
    if ranks is not None and ranks < 1:
        raise ConfigError(f"ranks must be >= 1, or None for all workers, got {ranks!r}")
    if restarts < 0:
        raise ConfigError(f"restarts must be >= 0, got {restarts!r}")
    if not 0 < timeout < math.inf:
        raise ConfigError(f"timeout must be > 0 seconds, got {timeout!r}")
    trainer.model.schema.require(rows.schema, what="the rows")


# -- on the workers ----------------------------------------------------------------------------------------------------


def _rank(group: Group, trainer: BatchTrainer, rows: EncodedRows, parts: int) -> _Ended:
    """Run the trainer together with the other ranks."""
    trainer = copy.deepcopy(trainer)  # what was sent is kept, for the next try
    model = trainer.model
    assert isinstance(model, SHARED) and trainer.store is not None
    found = group.gather({"host": group.host, "gpus": torch.cuda.device_count()})
    devices = _devices([(one["host"], one["gpus"]) for one in found])
    device = devices[group.number] if devices else "cpu"
    model.to(device)
    peers = _Peers(group, device)
    try:
        model.share(peers, parts)
        trainer.store = _SharedStore(trainer.store, peers)
        if group.number:
            trainer.checkpoint_seconds = math.inf
        report = trainer.run(rows, progress=False)
        peers.add(torch.zeros(1))  # none goes before all have come so far
        return _Ended(_digest(model.state_dict()), report)
    finally:
        model.share(None)
        peers.close()


def _devices(ranks: Sequence[tuple[str, int]]) -> list[str]:
    """A GPU for each rank, of which host and GPUs there are known, if every one can have its own; else none for any."""
    found, used = [], dict[str, int]()
    for host, gpus in ranks:
        place = used.get(host, 0)
        if place >= gpus:
            return []
        used[host] = place + 1
        found.append(f"cuda:{place}")
    return found


class _Peers:
    """The other ranks, as a model that is shared knows them: over gloo, or NCCL where each has a GPU of its own."""

    def __init__(self, group: Group, device: str) -> None:
        self.rank, self.size = group.number, group.size
        self._device = torch.device(device)
        self._group, self._sums = group, group.sums
        if self._device.type == "cuda" and group.size > 1:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=group.timeout)
            with parting():
                self._sums = dist.ProcessGroupNCCL(
                    dist.PrefixStore("nccl", group.store),  # type: ignore[attr-defined]
                    group.number,
                    group.size,
                    options,
                )

    def add(self, tensor: Tensor) -> None:
        """See `streamrec.trainers.Peers`."""
        self._group.check()
        if self._sums is None:
            return
        here = tensor.to(self._device)
        with parting():
            self._sums.allreduce([here]).wait()
        if here is not tensor:
            tensor.copy_(here)

    def close(self) -> None:
        """Let go, so that the others hear of it at once."""
        self._sums = None
        self._group.close()


class _SharedStore(Store):
    """A store of which all ranks read the same, and the first alone writes."""

    def __init__(self, store: Store, peers: _Peers) -> None:
        self.uri, self.keep = store.uri, store.keep
        self.checkpoints = _SharedShelf(store.checkpoints, peers)
        self.versions = _SharedShelf(store.versions, peers)


class _SharedShelf(Shelf):
    def __init__(self, shelf: Shelf, peers: _Peers) -> None:
        self._shelf, self._peers = shelf, peers

    def read(self, number: int | None = None) -> tuple[Version, dict[str, Any]] | None:
        """The newest good version, as the first rank finds it."""
        found = self._shelf.read(number) if self._peers.rank == 0 else None
        newest = torch.tensor([found[0].number if found is not None else 0], dtype=torch.float64)
        self._peers.add(newest)
        if self._peers.rank and newest:
            found = self._shelf.read(int(newest))
        self._peers.add(newest)  # nothing is written before all have read
        return found

    def write(self, state: State, info: Mapping[str, Any] = {}, base: int | None = None) -> Version:
        if self._peers.rank == 0:
            return self._shelf.write(state, info, base)
        return Version(0, 0.0, 0, "", info)


def _digest(state: Any) -> str:
    """The sha256 of a state: equal for equal ones, bit for bit."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value):
                digest.update(name.encode())
                feed(value[name])
        elif isinstance(value, (list, tuple)):
            for one in value:
                feed(one)
        elif isinstance(value, (Tensor, np.ndarray)):
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy() if isinstance(value, Tensor) else value
            digest.update(np.ascontiguousarray(raw).tobytes())
        else:
            digest.update(repr(value).encode())

    feed(state)
    return digest.hexdigest()
