"""Score: the best of a catalogue for every user, in Parquet."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from streamrec.adapters.dask._cluster import Task, given, require_client, results, spread, threads_of
from streamrec.adapters.dask._models import Reference, catalogue_of, reference
from streamrec.errors import ConfigError, StoreError
from streamrec.models import FM
from streamrec.serving import Candidate
from streamrec.storage import Store
from streamrec.storage._folders import folder

__all__ = ["User", "score"]


class User(NamedTuple):
    """Someone to score for: the name, and the features of the user and the moment."""

    name: str
    features: Mapping[str, Any] = {}


class _Items(NamedTuple):
    """A catalogue on its way: of a bare list Dask serialises each element by itself, which takes seconds."""

    items: Sequence[str | Candidate]


def score(
    client: Any,
    model: FM | Store | str | os.PathLike[str],
    users: Sequence[str | User],
    out: str,
    *,
    catalogue: Sequence[str | Candidate],
    k: int | None = 100,
    at_once: int = 1000,
    timeout: float = 3600.0,
) -> list[str]:
    """Write the `k` items (all: None) of the catalogue that each user would most probably click; return the files.

    `model`: an FM, or a store whose newest version is used, read by each worker once, together with the catalogue.
    `users`: names, or `User`s with features. `out`: any fsspec URI that all workers can write to; the files in its
    folder `scores`, one for `at_once` users in their order, have the columns `user`, `rank` (from 1), `item` and
    `score`, a click probability: those of `Scorer.retrieve`. Files of another run in it are removed when all are
    written. `timeout`: seconds in which some task must end.

    Raises `ConfigError` for arguments that cannot work, `StoreError` where `out` cannot be written or nothing is
    published, `ClusterError` where the cluster fails.
    """
    client = require_client(client)
    for name, value in (("at_once", at_once), ("k", 1 if k is None else k)):
        if value < 1:
            raise ConfigError(f"{name} must be >= 1, got {value!r}")
    where, users = reference(client, model), list(users)
    items = given(client, _Items(list(catalogue)))
    spread(client, where.sent, items)
    tasks = [
        Task("score", _best, (where._replace(sent=None), where.sent, items, users[at : at + at_once], k, out, number))
        for number, at in enumerate(range(0, len(users), at_once))
    ]
    files = [""] * len(tasks)
    threads = sum(threads_of(client).values())
    # users go along with their task: no more of them are sent than can be worked on soon
    for place, name in results(client, tasks, timeout=timeout, ahead=4 * max(1, threads)):
        files[place] = name
    target = folder(out, "scores")
    try:
        target.make()
        target.write("scores.json", [msgspec.json.encode({"files": files})], secrets.token_hex(4))
        for name in target.names():
            if name.endswith(".parquet") and name not in files:
                target.remove(name)
    except OSError as error:
        raise StoreError(f"cannot write to {target.uri}: {error}") from error
    return [f"{target.uri}/{name}" for name in files]


def _best(
    where: Reference, sent: Any, catalogue: _Items, users: Sequence[str | User], k: int | None, out: str, number: int
) -> str:
    import pyarrow
    from pyarrow import parquet

    view, items = catalogue_of(where, sent, catalogue.items)
    whole = [User(one) if isinstance(one, str) else one for one in users]
    found = [view.retrieve_places(user=name, k=k, features=features) for name, features in whole]
    lengths = [len(places) for places, _ in found]
    names = pyarrow.array([name for name, _ in whole], pyarrow.string())
    # columns all the way: an object for each of a million rows takes longer than to find them
    table = pyarrow.table(
        {
            "user": names.take(pyarrow.array(np.repeat(np.arange(len(users)), lengths))),
            "rank": np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in lengths]),
            "item": items.take(pyarrow.array(np.concatenate([places for places, _ in found]))),
            "score": np.concatenate([scores for _, scores in found]),
        }
    )
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    token = secrets.token_hex(4)
    name = f"part-{number:06d}-{token}.parquet"
    target = folder(out, "scores")
    try:
        target.make()
        target.write(name, [content.getbuffer()], token)
    except OSError as error:
        raise StoreError(f"cannot write to {target.uri}: {error}") from error
    return name
