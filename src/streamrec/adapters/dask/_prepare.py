"""Prepare: an archive of events, checked, joined and encoded part by part, as one process would do it in one pass."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from distributed import Client

from streamrec.adapters.dask._cluster import Task, require_client, results, threads_of
from streamrec.adapters.dask._pieces import ListPiece, pieces_of
from streamrec.batch import LabeledRows
from streamrec.errors import ConfigError
from streamrec.events import DeadLetter, Decoded, Event, decode_event
from streamrec.preprocessors import Dedup, Expect, Filter, LabelJoin, Pseudonymize, Redact, Validate
from streamrec.protocols import Stage, State
from streamrec.schema import Schema
from streamrec.sources import Memory
from streamrec.storage import EncodedRows
from streamrec.storage.encoded import Part, commit_rows, write_part
from streamrec.trainers import JoinedEvents

__all__ = ["prepare"]

_KNOWN = Dedup, Expect, Filter, Pseudonymize, Redact
"""How far back they remember is known: all but `Dedup` not at all."""

AT_ONCE = 500_000
"""Rows of a file: what a part holds in memory at most, beside what is open."""


class _Surveyed(NamedTuple):
    """One piece: its newest usable time (-inf: none), and what `Validate` remembers after it, given what it did before.

    `doubtful`: whether that depends on what it did before.
    """

    newest: float
    after: State
    doubtful: bool
    sure: bool = True
    """False: told by the times alone, so that an event that cannot be used may have been taken for one that can."""


class _Done(NamedTuple):
    parts: list[Part]
    counts: Counter[str]
    events: int
    pending: int
    as_surveyed: bool
    """Whether `Validate` has come to remember what the survey said it would."""


class _Rows(NamedTuple):
    """What `prepare` was told, for its tasks."""

    schema: Schema
    preprocessors: Sequence[Stage]
    join: LabelJoin | None
    target: str
    decode: Callable[[bytes], Event]
    overlap: float


def prepare(
    client: Client,
    archive: Any,
    out: str,
    *,
    schema: Schema,
    preprocessors: Sequence[Stage] = (),
    join: LabelJoin | None = None,
    target: str = "click",
    overlap: float | None = None,
    parts: int | None = None,
    piece: int = 16 << 20,
    decode: Callable[[bytes], Event] = decode_event,
    timeout: float = 3600.0,
) -> EncodedRows:
    """Turn an archive of events into encoded rows with labels, on the workers of `client`.

    The rows, their order and the counts are those of `JoinedEvents` over the whole archive. Each part of it begins to
    read so far before its own first event that what the preprocessors and the join remember there is what they would
    have remembered: `overlap` seconds of event time, or None, which is enough for `Dedup`, `LabelJoin` and filters:
    the longest window and the lateness of the join, and twice the ttl of each `Dedup`. A preprocessor of your own that
    remembers needs it given. Two things are left: an id that comes again and again for longer than the overlap, each
    time within the ttl, may be kept where one process drops it; and a `capacity` that is too small evicts other things.

    `archive`: URIs of JSON lines or Parquet files of events, in the order of time, with `*` for many; or a Dask bag of
    events, mappings or lines; or a Dask DataFrame, whose columns are as those of such a Parquet file. `out`: any fsspec
    URI that all workers can write to; its `counts` say what became of the events. `preprocessors`, `join`: as they
    would be given to a trainer, unused; they are not changed. `parts`: how many to make, by default two for each
    thread; fewer read less twice. `piece`: bytes of JSON lines read as one. `timeout`: seconds in which some task must
    end.

    A line or a row that cannot be read is counted. Where a worker is lost its part is made again. Raises `SourceError`
    where there is no archive, `StoreError` where `out` cannot be written, `ClusterError` where the cluster fails: what
    was at `out` before stays.
    """
    client = require_client(client)
    if overlap is None:
        strangers = [type(stage).__name__ for stage in preprocessors if not isinstance(stage, _KNOWN)]
        if strangers:
            raise ConfigError(
                f"nobody knows how far back {', '.join(strangers)} remembers: give overlap, in seconds of event time"
            )
        overlap = _overlap(preprocessors, join)
    if not 0 <= overlap < math.inf:
        raise ConfigError(f"overlap must be >= 0 seconds and finite, got {overlap!r}")
    told = _Rows(schema, list(preprocessors), join, target, decode, overlap)
    JoinedEvents(Memory([]), schema=schema, join=join, target=target)  # raises here, where the mistake is
    pieces = pieces_of(archive, piece)
    if hasattr(archive, "to_delayed"):
        pieces = client.compute(pieces)  # type: ignore[no-untyped-call]
    for quick in (True, False):
        surveyed = _survey(client, pieces, decode, timeout, quick)
        done = _parts(client, told, pieces, surveyed, out, parts, timeout)
        if all(one.as_surveyed for one in done) or all(one.sure for one in surveyed):
            break
    counts: Counter[str] = Counter()
    for one in done:
        counts.update(one.counts)
    counts["events"] = sum(one.events for one in done)
    counts["pending"] = done[-1].pending
    commit_rows(out, schema, [part for one in done for part in one.parts], counts)
    return EncodedRows(out)


def _parts(
    client: Client,
    told: _Rows,
    pieces: Sequence[Any],
    surveyed: Sequence[_Surveyed],
    out: str,
    parts: int | None,
    timeout: float,
) -> list[_Done]:
    """Make all parts."""
    threads = sum(threads_of(client).values())
    count = min(len(pieces), parts or max(1, 2 * threads))
    cuts = [len(pieces) * n // count for n in range(count + 1)]
    tasks = []
    for number, (begin, end) in enumerate(pairwise(cuts)):
        newest = max((one.newest for one in surveyed[:begin]), default=-math.inf)
        first = next((n for n in range(begin) if surveyed[n].newest >= newest - told.overlap), begin)
        before: State | None = surveyed[first - 1].after if first else None
        after = [one.after for one in surveyed[begin:end]]
        arguments = (told, before, after, out, number, begin - first, end == len(pieces), *pieces[first:end])
        tasks.append(Task("prepare", _part, arguments))
    done: list[Any] = [None] * count
    for place, found in results(client, tasks, timeout=timeout):
        done[place] = found
    return done


def _overlap(preprocessors: Sequence[Stage], join: LabelJoin | None) -> float:
    seconds = 0.0
    if join is not None:
        seconds = join.lateness + max(join.windows.values()) + (join.keep if join.late == "correct" else 0.0)
    return seconds + sum(2 * stage.ttl for stage in preprocessors if isinstance(stage, Dedup))


def _survey(client: Client, pieces: Sequence[Any], decode: Any, timeout: float, quick: bool) -> list[_Surveyed]:
    """What is in each piece. All at once, and then again those whose times only the pieces before can judge.

    `quick`: a piece in which nothing strange is seen may have been taken for good by its times alone.
    """
    found: list[Any] = [None] * len(pieces)
    tasks = [Task("survey", _look, (one, decode, None, quick)) for one in pieces]
    for place, one in results(client, tasks, timeout=timeout):
        found[place] = one
    state: State = {"newest": None, "candidate": None}
    for place, one in enumerate(found):
        newest = state["newest"]
        jumps = newest is not None and one.newest - newest > Validate().max_ahead
        if place and (one.doubtful or jumps or state["candidate"] is not None):
            [(_, one)] = results(
                client, [Task("survey", _look, (pieces[place], decode, state, False))], timeout=timeout
            )
        times = [t for t in (newest, one.after["newest"]) if t is not None]
        state = {"newest": max(times, default=None), "candidate": one.after["candidate"]}
        found[place] = one._replace(after=state)
    return found


def _glance(piece: Any, decode: Any) -> _Surveyed | None:
    """What is in a piece by its times; None where they leave a doubt."""
    newest, most = None, Validate().max_ahead
    try:
        for least, latest in piece.spans(decode) or ():
            if not (least >= 0.0 and latest - (least if newest is None else newest) <= most):
                return None
            newest = latest if newest is None else max(newest, latest)
    except (ValueError, RecursionError):  # some line cannot be read
        return None
    return None if newest is None else _Surveyed(newest, {"newest": newest, "candidate": None}, False, False)


def _look(piece: Any, decode: Any, before: State | None, quick: bool) -> _Surveyed:
    piece = _opened(piece)
    if quick and (seen := _glance(piece, decode)) is not None:
        return seen
    validate = Validate()
    if before is not None:
        validate.load_state_dict(before)
    doubtful = False
    for events in piece.events(decode):
        checked = validate.push(events)
        if type(checked) is not Decoded:  # else nothing was refused
            doubtful |= any(isinstance(one, DeadLetter) and one.reason.startswith("far ahead") for one in checked)
    after = validate.state_dict()
    # after others it may be the time of an event before this piece: then parts begin to read earlier than they must
    return _Surveyed(-math.inf if after["newest"] is None else after["newest"], after, doubtful)


def _opened(piece: Any) -> Any:
    if hasattr(piece, "columns"):  # a partition of a Dask DataFrame; Arrow knows what pandas writes for nothing
        import pyarrow

        return ListPiece(pyarrow.Table.from_pandas(piece, preserve_index=False).to_pylist())
    return ListPiece(list(piece)) if isinstance(piece, (list, tuple)) or hasattr(piece, "__next__") else piece


def _part(
    told: _Rows,
    before: State | None,
    after: Sequence[State],
    out: str,
    number: int,
    early: int,
    last: bool,
    *pieces: Any,
) -> _Done:
    """Go through these pieces and write the rows that come out of them, those of the first `early` left out.

    `before`, `after`: what `Validate` remembers before the first of them, and after each of the others, by the survey.
    """
    parts = copy.deepcopy((told.preprocessors, told.join))  # a worker may run two of these at a time
    rows = JoinedEvents(Memory([]), schema=told.schema, preprocessors=parts[0], join=parts[1], target=told.target)
    if before is not None:
        rows.begin_after(before)
    counts_before: Mapping[str, int] = {}
    files: list[Part] = []
    held: list[LabeledRows] = []
    events = many = 0
    as_surveyed = True

    def write() -> None:
        if held:
            files.append(write_part(out, f"part-{number:05d}-{len(files):05d}", held))
            held.clear()

    for place, piece in enumerate(pieces):
        if place == early:
            counts_before = rows.counts
        for some in _opened(piece).events(told.decode):
            labeled = rows.labeled(some)
            if place < early:
                continue
            events += len(some)
            if labeled:
                held.append(rows.encoded(labeled))
                many += len(labeled)
            if many >= AT_ONCE:
                write()
                many = 0
        as_surveyed &= place < early or rows.checked == after[place - early]
    write()
    counts = Counter(rows.counts)
    counts.subtract(counts_before)
    pending = rows.counts["pending"] if last else 0
    for name in ("events", "pending"):
        del counts[name]
    return _Done(files, counts, events, pending, as_surveyed)
