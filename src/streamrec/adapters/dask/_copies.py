"""Copies: an FM learned by several workers at the same time, each event by event, and merged at intervals."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from distributed import Client

from streamrec.adapters.dask._cluster import ClusterError, given, threads_of
from streamrec.adapters.dask._ranks import Group, Parted, Ranks, run_ranks
from streamrec.adapters.dask._share import Cuts, Share
from streamrec.batch import LabeledRows
from streamrec.evaluators import Report
from streamrec.models import FM
from streamrec.models.merging import Copy
from streamrec.protocols import Metric, RowSource, State
from streamrec.storage import EncodedRows, Store, Version
from streamrec.trainers import BatchTrainer
from streamrec.trainers._bar import Bar
from streamrec.trainers.batch import PROGRESS

__all__ = ["fit_copies"]

TRIES = 4
"""How often in a row workers may be lost before a new checkpoint is written."""
PATIENCE = 10.0
"""Seconds in which the cluster may become as large again as it was, after a loss."""


class _Told(NamedTuple):
    """What the ranks are told of the training."""

    settings: Mapping[str, Any]
    store: tuple[str, int] | None
    cuts: Cuts
    keep: int
    checkpoint: int | None
    """The number of the checkpoint to go on from."""


def fit_copies(
    client: Client,
    trainer: BatchTrainer,
    rows: EncodedRows,
    *,
    copies: int | None,
    apart: int,
    keep: int,
    timeout: float,
) -> Report:
    """See `fit`."""
    threads = threads_of(client)
    count = copies or max(1, min(sum(threads.values()), 8))
    cuts = Cuts(len(rows), count, trainer.window, apart)
    names = ("epochs", "window", "shuffle", "seed", "validation", "patience", "metrics", "schedule")
    settings = {name: getattr(trainer, name) for name in (*names, "checkpoint_seconds")}
    store = None if trainer.store is None else (trainer.store.uri, trainer.store.keep)
    tries, before = 0, -1
    with Bar(total=1.0, disable=None, bar_format=PROGRESS) as bar:

        def heard(fraction: float) -> None:
            bar.update(max(0.0, fraction - bar.n))

        while True:
            newest = None if trainer.store is None else trainer.store.checkpoints.latest()
            number = None if newest is None else newest.number
            tries, before = (tries + 1 if number == before else 1), number  # type: ignore[assignment]
            what = _Told(settings, store, cuts, keep, number)
            try:
                arguments = (what, given(client, trainer.model), rows)
                ranks = Ranks.placed(client, count)
                found = run_ranks(client, _learn_share, arguments, ranks, timeout=timeout, heard=heard)
                break
            except Parted as error:
                if tries == TRIES:
                    raise ClusterError(
                        f"workers were lost {TRIES} times, and no checkpoint was written in between ({error}); see "
                        "their logs: memory, most often"
                        + ("" if store else ". With a store, what was learned would be kept")
                    ) from error
                _wait_for_workers(client, len(threads))
    state = found[0]
    trainer._become(state, rows)
    trainer._keep(rows, done=True)
    return trainer._report(rows, interrupted=False)


def _wait_for_workers(client: Client, wanted: int) -> None:
    """Until there are as many workers as there were, for a while: a lost one often comes back."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if len(threads_of(client)) >= wanted:
            return
        time.sleep(0.1)


# -- on the workers ----------------------------------------------------------------------------------------------------


def _learn_share(group: Group, what: _Told, model: FM, rows: EncodedRows) -> State | None:
    """Learn with one copy; the first returns the state of the training when it has ended."""
    share = Share(copy.copy(rows), what.cuts, group.number, keep=what.keep)
    # a copy: objects on a worker are shared by its tasks
    learner = _Learner(copy.deepcopy(model), what, group)
    learner.run(share)
    learner.together()
    return learner._state(share) if group.number == 0 else None


class _Learner(BatchTrainer):
    """A `BatchTrainer` of one copy, which merges it with the others'."""

    def __init__(self, model: FM, what: _Told, group: Group) -> None:
        store = None if what.store is None else Store(what.store[0], keep=what.store[1])
        super().__init__(model=model, store=store, **what.settings)
        self._group = group
        self._what = what
        self._learned_here = 0
        self._learned_before = 0
        self._told_at = 0.0

    def run(self, rows: RowSource, **how: Any) -> Report:
        assert isinstance(rows, Share)
        self._share = rows
        return super().run(rows, **how)

    def _saved(self) -> tuple[Version, State] | None:
        if self.store is None or self._what.checkpoint is None:
            return None
        return self.store.checkpoints.read(self._what.checkpoint)  # the same for all

    def resume(self, rows: RowSource) -> bool:
        resumed = super().resume(rows)
        self._learned_before = self._learned
        # what it was when the copies were the same
        self._copy = Copy(self.model) if self._group.size > 1 else None  # type: ignore[arg-type]
        return resumed

    def _settings(self) -> dict[str, Any]:
        cuts = self._what.cuts
        shared = {} if cuts.copies == 1 else {"copies": cuts.copies, "apart": cuts.apart}
        return super()._settings() | shared

    def _read(self, rows: RowSource) -> LabeledRows | None:
        self._share.first = self._epoch == 0
        return super()._read(rows)

    def _learn(self, rows: LabeledRows) -> None:
        before = self._learned
        super()._learn(rows)
        self._learned_here += self._learned - before
        self._group.check()
        if self._copy is not None and self._share.merges:
            self._merge()
        if self._group.number == 0 and self._clock() - self._told_at >= 0.5:
            self._group.say(self._progress(self._share))
            self._told_at = self._clock()

    def _merge(self) -> None:
        assert self._copy is not None
        parts = self._group.gather({"learned": self._learned_here, "changes": self._copy.changes()})
        merging = self._copy.merge([part["changes"] for part in parts], self._group.number)
        with suppress(StopIteration):
            swap = next(merging)
            while True:
                swap = merging.send(self._group.swap(*swap))
        self._learned = self._learned_before + sum(part["learned"] for part in parts)

    def together(self) -> None:
        """Wait for the others: nobody ends, and takes its side of the connection along, while they still need it."""
        self._group.gather({})

    def _whole(self, metrics: Sequence[Metric]) -> Sequence[Metric]:
        if self._group.size == 1:
            return metrics
        states = [metric.state_dict() for metric in metrics]
        joint = [metric.fresh() for metric in metrics]
        for part in self._group.gather({"metrics": states}):
            for metric, state in zip(joint, part["metrics"], strict=True):
                one = metric.fresh()
                one.load_state_dict(state)
                metric.merge(one)
        return joint

    def _is_due(self, saved: float) -> bool:
        return self._group.number == 0 and self._share.merges and super()._is_due(saved)

    def _keep(self, rows: RowSource, done: bool) -> None:
        """The client does, which has the store in any case."""
