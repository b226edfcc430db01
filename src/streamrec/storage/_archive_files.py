"""The files of an archive: which rows go into which, what a manifest says, whose rows are whose."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.storage._archive_columns import Rows

__all__ = ["File", "Manifest", "Unwritten", "covers", "folder_of", "of_others"]


class File(msgspec.Struct, frozen=True, array_like=True):
    """A file of rows of the parts `first` to `last`, in the order in which they came."""

    name: str
    dataset: str
    hour: int
    first: int
    last: int
    rows: int


class Unwritten(NamedTuple):
    """Rows, and the files that they are for, in the order of their hours.

    `order`: int64 `(rows,)`, theirs by hour; None where they came so. `ends`: how many rows are in the files up to
    each.
    """

    rows: Rows
    names: list[File]
    order: NDArray[np.int64] | None
    ends: list[int]

    @classmethod
    def of(cls, rows: Rows, part: int, chunk: int) -> Unwritten:
        """Rows of a part, `chunk` files of which are written."""
        hours, order = rows.hours(), None
        if (hours[1:] < hours[:-1]).any():
            order = np.argsort(hours, kind="stable")
            hours = hours[order]
        each, counts = np.unique(hours, return_counts=True)
        dataset, last = rows.dataset, f"part-{part:010d}-{chunk:04d}.parquet"
        files = [
            File(f"{folder_of(dataset, hour)}{last}", dataset, hour, part, part, count)
            for hour, count in zip(each.tolist(), counts.tolist(), strict=True)
        ]
        return cls(rows, files, order, np.cumsum(counts).tolist())

    def tables(self) -> Iterator[tuple[File, Any]]:
        """The columns of each file."""
        table = self.rows.table()
        if self.order is not None:
            table = table.take(self.order)
        for file, end in zip(self.names, self.ends, strict=True):
            yield file, table.slice(end - file.rows, file.rows)


class Manifest(msgspec.Struct):
    """The files that are there, of the parts up to `part`."""

    format: int
    part: int
    files: list[File]


def covers(whole: File, part: File) -> bool:
    """Whether what `part` holds is in `whole`, too."""
    return (whole.dataset, whole.hour) == (part.dataset, part.hour) and whole.first <= part.first <= whole.last


def folder_of(dataset: str, hour: int) -> str:
    """Where the files of an hour are, with a slash behind it."""
    if dataset == "dead":
        return "dead/"
    date = str(np.datetime64(hour // 24, "D"))
    return f"{dataset}/date={date}/hour={hour % 24:02d}/"


def of_others(dataset: str, table: Any, user: str, ids: Collection[str]) -> NDArray[np.bool_]:
    """Which rows are not this user's."""
    if dataset == "dead":
        raw = user.encode("utf-8", "surrogatepass")
        columns = table.to_pydict()
        rows = zip(columns["raw"], columns["reason"], columns["position"], strict=True)
        return np.array([raw not in one and user not in why and user not in where for one, why, where in rows], bool)
    own = table.column("impression_id").to_pylist()
    kept = np.array([id not in ids for id in own], dtype=bool)
    if dataset == "events":
        kept &= np.array([id not in ids for id in table.column("id").to_pylist()], dtype=bool)
    return kept
