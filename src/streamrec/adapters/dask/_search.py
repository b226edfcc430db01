"""Search: points of a space tried on the workers, most of them on a share of the archive alone."""

from __future__ import annotations

import hashlib
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from fsspec.core import url_to_fs

from streamrec.adapters.dask._cluster import DeadlyTask, Task, require_client, results, threads_of
from streamrec.adapters.dask._space import Points, RandomPoints
from streamrec.adapters.dask._trial import FMs, Make, Outcome, Told, run_trial
from streamrec.adapters.dask._trials import Trial, Trials, plain_params
from streamrec.errors import ConfigError, DamagedError, StoreError
from streamrec.models.space import Choice, Params, Real, Space, Whole, best_of
from streamrec.protocols import Metric
from streamrec.storage import EncodedRows, Store
from streamrec.storage._folders import folder
from streamrec.trainers._bar import Bar

__all__ = ["Halving", "search"]

FORMAT = 1
_FILE = "search.json"


class Halving(msgspec.Struct, frozen=True):
    """Synchronous successive halving: `trials` points on the smallest budget, the best of each round on the next.

    A round's budget is `factor` times that of the round before, until it is all, in round `rounds`; of n points the
    best n / `factor`, rounded up, go on. Jamieson & Talwalkar 2016, algorithm 1. A round ends when its last trial has,
    so that what goes on does not depend on who was fast, or on how many workers there are.

    >>> [(Halving(9).points(n), Halving(9).budget(n)) for n in range(3)]
    [(9, 0.1111111111111111), (3, 0.3333333333333333), (1, 1.0)]
    """

    trials: int = 27
    rounds: int = 3
    factor: int = 3

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("rounds", 1), ("factor", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}")

    def budget(self, number: int) -> float:
        """The share of the archive that trials of round `number`, from 0, learn."""
        return float(1.0 / self.factor ** (self.rounds - 1 - number))

    def points(self, number: int) -> int:
        """How many points round `number` has, where none fails before."""
        left = self.trials
        for _ in range(number):
            left = math.ceil(left / self.factor)
        return left


class _Saved(msgspec.Struct):
    """The file from which a search goes on. `rounds`: by the number of the trial, as JSON has it, the outcomes."""

    format: int
    settings: dict[str, str]
    rounds: list[dict[str, Outcome]]
    version: int | None = None


def search(
    client: Any,
    space: Space,
    data: EncodedRows | str,
    *,
    store: Store | str | os.PathLike[str],
    make: Make | None = None,
    halving: Halving = Halving(),  # noqa: B008  # frozen
    points: Points = RandomPoints(),  # noqa: B008
    validation: float = 0.1,
    metrics: Sequence[Metric] = (),
    timeout: float = 3600.0,
) -> Trials:
    """Try points of a space on the workers, and publish the best model that was found.

    A trial is a `BatchTrainer` over the newest share of the archive that lies before its last share `validation` of
    event time, and is judged by that last share, of which no trial learns: by log loss, as `BatchTrainer` itself does.
    Being the best of many by those rows, the winner's metrics are a little too good: judge it by later ones
    (`evaluate`) before you quote them.

    `space`: a `Real`, `Whole` or `Choice` by name. Without `make` the names are those of an FM: `"dim"`, `"init"`,
    `"optimizer"` and settings such as `"optimizer.lr"`, `"linear_optimizer.l1"`, and `"epochs"`, `"shuffle"`,
    `"window"` and `"patience"` of its trainer. `make`: gets a point and gives a model, or a `BatchTrainer` with one, of
    which validation, metrics and store are the search's; it is called on a worker. `halving`, `points`: how many points
    there are, and who chooses them. `metrics`: told beside log loss. `timeout`: seconds in which some trial must end.

    `store`: any fsspec URI that all workers can write to. Every outcome is written there, so that the same call goes on
    after a crash, and of a search that has ended only tells the table. At the end it holds the version that scorers
    read, and the checkpoint that a stream goes on from, as after a `BatchTrainer`'s own run.

    The same points, outcomes (but their seconds) and model come out for any number of workers. A trial that raises,
    whose scores are not finite, or over which workers die again and again is counted, and stopped; where a worker is
    lost, its trial begins again. Raises `ConfigError` for arguments that cannot work, where no trial can be judged, and
    where the store holds something else; `StoreError` where data or store cannot be read or written; `ClusterError`
    where the cluster fails.
    """
    client = require_client(client)
    rows = EncodedRows(data) if isinstance(data, str) else data
    _check(space, rows, validation)
    if make is None:
        make = FMs(rows.schema)
        make.require(space)
    store = store if isinstance(store, Store) else Store(store)
    asked = points.begin(space)
    params: list[Params] = []
    run = _Run(client, store, Told(make, validation, list(metrics)), rows, halving, timeout)
    saved = run.open(_settings(space, rows, halving, points, validation))
    bar = Bar(total=sum(map(halving.points, range(halving.rounds))), disable=None, unit="trial")
    with bar:
        group = points.group or halving.trials
        for begin in range(0, halving.trials, group):
            numbers = range(begin, min(begin + group, halving.trials))
            params += [asked.ask(number) for number in numbers]
            found = run.round(0, numbers, params, bar)
            for number in numbers:
                asked.tell(number, found[number].loss)
        going = [*range(halving.trials)]
        for number in range(1, halving.rounds):
            going = _best(saved.rounds[number - 1], going, math.ceil(len(going) / halving.factor))
            run.round(number, going, params, bar)
    best = _best(saved.rounds[-1], going, 1)
    if not best:
        _nothing(saved)
    if saved.version is None:
        run.publish(best[0], params[best[0]])
    return Trials(tuple(_rows(saved, params, halving)), best[0], saved.version or 0, store.uri)


class _Run:
    """A search that goes on: its cluster, its store, and what has come out so far."""

    def __init__(
        self, client: Any, store: Store, told: Told, rows: EncodedRows, halving: Halving, timeout: float
    ) -> None:
        self._client, self._store, self._told, self._timeout = client, store, told, timeout
        self._data, self._halving = rows, halving
        self._folder = folder(store.uri, "search")

    def open(self, settings: dict[str, str]) -> _Saved:
        """What the store has of this search; of a new one, nothing."""
        try:
            content = self._folder.read(_FILE).tobytes()
        except FileNotFoundError:
            if self._store.checkpoints.latest() is not None or self._store.versions.latest() is not None:
                raise ConfigError(
                    f"{self._store.uri} holds what a trainer has left: give a search its own store"
                ) from None
            self.saved = _Saved(FORMAT, settings, [])
            return self.saved
        except OSError as error:
            raise StoreError(f"cannot read {self._folder.uri}: {error}") from error
        try:
            self.saved = msgspec.json.decode(content, type=_Saved)
        except msgspec.MsgspecError as error:
            raise DamagedError(f"{self._folder.uri}/{_FILE} is damaged: {error}") from error
        if self.saved.format != FORMAT:
            raise StoreError(f"{self._folder.uri} has format {self.saved.format}, this streamrec reads {FORMAT}")
        differ = [
            f"{name} was {self.saved.settings.get(name)} and is {value}"
            for name, value in settings.items()
            if self.saved.settings.get(name) != value
        ]
        if differ:
            raise ConfigError(
                f"{self._store.uri} holds another search: {'; '.join(differ)}; go on with what it had, or use another "
                "store"
            )
        return self.saved

    def _save(self) -> None:
        try:
            self._folder.make()
            self._folder.write(_FILE, [msgspec.json.encode(self.saved)], secrets.token_hex(4))
        except OSError as error:
            raise StoreError(f"cannot write to {self._folder.uri}: {error}") from error

    def round(self, number: int, chosen: Sequence[int], params: Sequence[Params], bar: Any) -> dict[int, Outcome]:
        """The outcomes of these trials in a round: those there are already, and those that are tried now."""
        while len(self.saved.rounds) <= number:
            self.saved.rounds.append({})
        outcomes = self.saved.rounds[number]
        missing = [one for one in chosen if str(one) not in outcomes]
        bar.update(len(chosen) - len(missing))
        threads = max(1, sum(threads_of(self._client).values()))
        died: list[int] = []
        # no more at a time than are worked on: where a worker dies, all that waits there is suspected too
        for one, outcome in self._tried(number, missing, params, threads):
            if outcome is None:
                died.append(one)
            else:
                bar.update(1)
        for one, outcome in self._tried(number, sorted(died), params, 1):  # each by itself, to tell which it was
            if outcome is None:
                outcomes[str(one)] = Outcome("failed", reason="workers died again and again over it")
                self._save()
            bar.update(1)
        return {one: outcomes[str(one)] for one in chosen}

    def _tried(
        self, number: int, chosen: Sequence[int], params: Sequence[Params], ahead: int
    ) -> Iterator[tuple[int, Outcome | None]]:
        """Try these, `ahead` at a time, and keep what comes out; None: workers died over it."""
        last = number == self._halving.rounds - 1
        budget = self._halving.budget(number)
        tasks = []
        for one in chosen:
            kept = f"{self._folder.uri}/trial-{one:05d}" if last else None
            tasks.append(Task("search", run_trial, (self._told, self._data, params[one], budget, kept)))
        for place, outcome in results(self._client, tasks, timeout=self._timeout, ahead=ahead, deadly=True):
            one = chosen[place]
            if isinstance(outcome, DeadlyTask):
                yield one, None
                continue
            self.saved.rounds[number][str(one)] = outcome
            self._save()
            yield one, outcome

    def publish(self, best: int, params: Params) -> None:
        """Make the model of this trial what the store holds; those of the others go."""
        kept = Store(self.saved.rounds[-1][str(best)].kept)
        found = kept.checkpoints.read(), kept.versions.read()
        if found[0] is None or found[1] is None:
            raise StoreError(f"the model of trial {best} has gone from {kept.uri}; search again in another store")
        checkpoint, state = found[0]
        version, model = found[1]
        searched = {"search": {"trial": best, "params": plain_params(params)}}
        self._store.checkpoints.write(state, {**checkpoint.info, **searched})
        self.saved.version = self._store.versions.write(model, {**version.info, **searched}).number
        self._save()
        fs, path = url_to_fs(self._folder.uri)
        for name in self._folder.names():
            if name.startswith("trial-"):
                with suppress(OSError):  # what stays is in nobody's way
                    fs.rm(f"{path}/{name}", recursive=True)


def _check(space: Space, rows: EncodedRows, validation: float) -> None:
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(f'space must name what to search in, such as {{"dim": Whole(4, 32)}}, got {space!r}')
    for name, one in space.items():
        if not isinstance(one, (Real, Whole, Choice)):
            raise ConfigError(f"{name!r} must be a Real, Whole or Choice, got {one!r}")
    if not 0 < validation < 1:
        raise ConfigError(f"validation must be a share of event time from 0 to 1 (both excluded), got {validation!r}")
    span = rows.span()
    if span is None or not span[0] < span[1]:
        raise ConfigError("there is no time to split: the rows have no event times, or all the same")


def _settings(space: Space, rows: EncodedRows, halving: Halving, points: Points, validation: float) -> dict[str, str]:
    """What the outcomes depend on, but for `make`, which nobody can compare."""
    data = f"{' '.join(part.name for part in rows.parts)} {len(rows)} {rows.span()}"
    return {
        "data": hashlib.sha256(data.encode()).hexdigest()[:16],
        "space": re.sub(r" at 0x[0-9a-f]+", "", repr(dict(space))),
        "halving": repr(halving),
        "points": repr(points),
        "validation": repr(validation),
    }


def _best(outcomes: Mapping[str, Outcome], chosen: Sequence[int], count: int) -> list[int]:
    """The `count` of them with the lowest loss, in the order of their numbers."""
    return best_of({one: outcomes[str(one)].loss for one in chosen}, count)


def _nothing(saved: _Saved) -> None:
    found = [outcome for outcomes in saved.rounds for outcome in outcomes.values() if outcome.loss is None]
    raise ConfigError(f"no trial is left to choose: {len(found)} came to nothing, the first for: {found[0].reason}")


def _rows(saved: _Saved, params: Sequence[Params], halving: Halving) -> Iterator[Trial]:
    for one, point in enumerate(params):
        reached = max(number for number, outcomes in enumerate(saved.rounds) if str(one) in outcomes)
        outcome = saved.rounds[reached][str(one)]
        judged = outcome.status == "judged"
        status = "whole" if judged and reached == halving.rounds - 1 else "stopped" if judged else outcome.status
        metrics = {name: math.nan if value is None else value for name, value in outcome.metrics.items()}
        yield Trial(one, dict(point), halving.budget(reached), status, metrics, outcome.reason, outcome.seconds)
