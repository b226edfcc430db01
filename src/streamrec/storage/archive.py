"""Archive: every accepted event, every label and every dead letter in Parquet files, exactly once over restarts.

The rows that came between two checkpoints are a part. Its files are written before its checkpoint, and named in the
manifest, `manifest/archive.json`, after it: a file that is not named there is not there. A process killed between the
two names them when it resumes; killed before, it removes them and writes them again. Files of an hour are put together
when no checkpoint needs them apart.
"""

from __future__ import annotations

import io
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
from fsspec.core import url_to_fs
from numpy.typing import NDArray

from streamrec.errors import ConfigError, StoreError, UnreachableError
from streamrec.events import DeadLetter, Event, Impression, Labeled, decode_event
from streamrec.protocols import State
from streamrec.storage._archive_arrow import arrow
from streamrec.storage._archive_columns import DATASETS, PLAIN, Rows, of_dataset
from streamrec.storage._archive_files import File, Manifest, Unwritten, covers, folder_of, of_others
from streamrec.storage._archive_rows import ArchivedRows
from streamrec.storage._folders import folder

__all__ = ["Archive"]

FORMAT = 1
_FOLDER, _MANIFEST = "manifest", "archive.json"
_REPEATING = {"type", "user", "item", "kind"}
_ORDERED = {"time", "number"}
_AT_ONCE = 4  # files that are written
_MOST_BYTES = 1 << 29  # of text held between checkpoints
_KEPT = 3  # times as much is held while it cannot be written


class Archive:
    """What an `OnlineTrainer` writes down beside learning: give it one as `archive`. Needs pyarrow.

    `uri`: a path or any fsspec URI. `compact`: files of an hour that become one. `most`: rows held in memory between
    checkpoints; more are written before it, or, where they cannot be, held up to three times `most`. `raw`: whether
    dead letters keep their bytes, and their reasons more than the category, which quote what came. There are three
    datasets of Parquet files, in folders by date and hour of event time, UTC (`events/date=2023-11-14/hour=22/`):

    - `events`: each impression and feedback that reached the model or the join, after the preprocessors. Columns
      `type`, `id`, `time`, `user`, `item`, `features` (JSON), `score`; `impression_id`, `kind`, `value`; and `number`,
      its place among all.
    - `labels`: each label, by the hour of its impression: `impression_id`, `time`, `kind`, `label`, `weight`, `score`
      as it was served, `corrects`, `number`.
    - `dead`: dead letters: `position` (JSON), `reason`, `raw`, `number`; in no folders, since they have no time.

    One writer and any number of readers: `read` gives a source, `files` the URIs for Dask or any other reader.
    """

    def __init__(
        self, uri: str | os.PathLike[str], *, compact: int = 16, most: int = 1_000_000, raw: bool = True
    ) -> None:
        arrow()
        self.uri = os.fspath(uri)
        if compact < 2:
            raise ConfigError(f"compact must be >= 2 files, got {compact!r}")
        if most < 1:
            raise ConfigError(f"most must be >= 1 row, got {most!r}")
        self.compact = compact
        self.raw = raw
        self.most = most
        self._fs, root = url_to_fs(self.uri)
        self._root = str(root).rstrip("/")
        self._part = 0  # cut so far
        self._spilled: list[File] = []
        self._names = np.empty(512, dtype=object)  # ids of open impressions, by slot
        self._cuts: dict[int, list[File]] = {}  # cut, and not known to be in the manifest
        self._unwritten: list[Unwritten] = []
        self._failed: UnreachableError | None = None  # why they are not written
        self._committed = 0  # the part that the manifest was last seen at
        self._left: set[str] = set()  # files that the manifest does not name, or no more
        self._begun = False
        self._hold_none(dict.fromkeys(DATASETS, 0))

    def _hold_none(self, counted: Mapping[str, int]) -> None:
        """Begin to take rows, after so many of each dataset."""
        self._counted = dict(counted)
        self._rows: dict[str, Any] = {name: of_dataset(name, count + 1) for name, count in counted.items()}

    # -- what a trainer calls ------------------------------------------------------------------------------------------

    def add(self, events: Sequence[Event], lines: Sequence[bytes] | None = None) -> None:
        """Take accepted events, in order. A labeled example is archived as its impression, and its label.

        `lines`: what each was read from, in the default JSON form, where a source has told it: that is cheaper. There
        is no labeled example among them then.
        """
        if not events:
            return
        plain: Any = events
        usual = lines is not None or PLAIN.issuperset(map(type, events))
        if not usual and (labeled := [event for event in events if isinstance(event, Labeled)]):
            plain = [event.impression if isinstance(event, Labeled) else event for event in events]
            shown = [event.impression for event in labeled]
            self._rows["labels"].add(
                [one.id for one in shown],
                np.array([one.time for one in shown], dtype=np.float64),
                [event.kind for event in labeled],
                np.array([event.label for event in labeled], dtype=np.float32),
                np.array([event.weight for event in labeled], dtype=np.float32),
                np.array([one.score for one in shown], dtype=np.float32),  # None is nan
                np.zeros(len(labeled), dtype=np.bool_),
            )
        self._rows["events"].add(plain, lines)
        self._spill()

    def hold(self, slots: NDArray[np.int64], shown: Sequence[Impression]) -> None:
        """These impressions wait for their labels under these numbers."""
        names = np.fromiter([one.id for one in shown], dtype=object, count=len(shown))
        try:
            self._names[slots] = names
        except IndexError:  # rarer than it is worth looking for
            larger = np.empty(2 * int(slots.max()), dtype=object)
            larger[: len(self._names)] = self._names
            self._names = larger
            self._names[slots] = names

    def label(self, closed: NDArray[Any], kinds: Sequence[str], served: NDArray[np.float32], freed: Any) -> None:
        """Take labels as `LabelJoin.steps` gives them; `served`: the scores by slot; `freed`: slots that wait no
        more."""
        what = closed["what"]
        given = np.flatnonzero((closed["kind"] >= 0) & (what != 1))
        if len(given):
            slots = closed["payload"][given]
            self._rows["labels"].add(  # by columns: rows of many of them are slow to choose from
                self._names[slots].tolist(),
                closed["time"][given],
                kinds[0] if len(kinds) == 1 else [kinds[code] for code in closed["kind"][given].tolist()],
                closed["label"][given],
                closed["weight"][given],
                served[slots],
                what[given] == 2,
            )
        self.release(freed)

    def bury(self, letter: DeadLetter) -> None:
        """Take a dead letter."""
        self._rows["dead"].add(letter, self.raw)
        self._spill()

    def release(self, slots: NDArray[np.int64]) -> None:
        """These wait no more."""
        self._names[slots] = None

    def _spill(self) -> None:
        """Write what was taken, where it is too much to be held. Where it cannot be, it is held for the next `write`.

        Raises `StoreError` where that is three times too much.
        """
        if self._too_much(self._rows.values()):
            failed: StoreError | None = None
            for unwritten in self._take(self._part + 1):
                self._spilled += unwritten.names
                try:
                    self._require()
                    self._write(unwritten)
                except StoreError as error:  # its file is one of the part: it is written with the others
                    self._unwritten.append(unwritten)
                    failed = error
            if isinstance(failed, UnreachableError):
                self._failed = failed
            elif failed is not None:
                raise failed
        if self._failed is not None:
            held = [*self._rows.values(), *(one.rows for one in [*self._unwritten])]  # a copy: they are being written
            if self._too_much(held, _KEPT):
                raise StoreError(
                    f"{sum(map(len, held)):,} rows wait to be written to {self.uri}, and no more are held: "
                    f"{self._failed}; bring it back and start again, or raise most={self.most:,}"
                ) from self._failed

    def _too_much(self, held: Iterable[Rows], times: int = 1) -> bool:
        held = [*held]
        return sum(map(len, held)) >= times * self.most or sum(rows.size for rows in held) >= times * _MOST_BYTES

    def _take(self, part: int) -> list[Unwritten]:
        """What is held, as files of a part."""
        taken = [one for one in self._rows.values() if len(one)]
        self._hold_none({name: self._counted[name] + len(rows) for name, rows in self._rows.items()})
        return [Unwritten.of(rows, part, len(self._spilled)) for rows in taken]

    def cut(self) -> int:
        """End a part, and return its number. Nothing may be under way of `write` and `commit`."""
        self._part += 1
        taken = self._take(self._part)
        self._cuts[self._part] = [*self._spilled, *(file for one in taken for file in one.names)]
        self._unwritten += taken
        self._spilled = []
        return self._part

    def write(self) -> None:
        """Write the files of all parts that were cut, before the checkpoint that holds them. Raises `StoreError`: they
        are written the next time."""
        try:
            if self._unwritten or not self._begun:
                self._require()
            while self._unwritten:
                self._write(self._unwritten[0])
                del self._unwritten[0]
        except UnreachableError as error:
            self._failed = error
            raise
        self._failed = None

    def commit(self, part: int, needed: int) -> None:
        """A checkpoint has made all parts up to this one last: name their files, and put files of parts up to `needed`,
        before which no checkpoint goes back, together. Raises `StoreError`."""
        manifest = self._known()
        known = {file.name for file in manifest.files}
        numbers = [number for number in sorted(self._cuts) if number <= part]
        manifest.files += [file for number in numbers for file in self._cuts[number] if file.name not in known]
        manifest.part = part
        self._save(manifest)
        self._committed = part
        for number in numbers:  # not before: what was not named is named the next time
            del self._cuts[number]
        self._put_together(manifest, min(needed, part))

    # -- files ---------------------------------------------------------------------------------------------------------

    def _write(self, unwritten: Unwritten) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as threads:  # a disk or a bucket makes each wait, and not for the others
            done = [threads.submit(self._put, file.name, table) for file, table in unwritten.tables()]
        for one in done:
            one.result()

    def _put(self, name: str, table: Any) -> None:
        from pyarrow import parquet

        buffer = io.BytesIO()
        repeating = [name for name in table.column_names if name in _REPEATING]
        parquet.write_table(
            table,
            buffer,
            compression="zstd",
            compression_level=1,
            use_dictionary=repeating,  # of strings that do not repeat one is made for nothing
            write_statistics=[name for name in table.column_names if name in _ORDERED],
        )
        self._put_bytes(name, buffer.getbuffer())

    def _put_bytes(self, name: str, content: memoryview | bytes) -> None:
        where, _, last = name.rpartition("/")
        place = folder(self.uri, where)
        try:
            place.make()
            place.write(last, [content], secrets.token_hex(4))  # what an interrupted write has left is in no one's way
        except OSError as error:
            raise UnreachableError(f"cannot write {name} to {self.uri}: {error}") from error

    def _manifest(self) -> Manifest:
        place = folder(self.uri, _FOLDER)
        try:
            if not place.exists(_MANIFEST):
                return Manifest(FORMAT, 0, [])
            found = msgspec.json.decode(place.read(_MANIFEST).tobytes(), type=Manifest)
        except OSError as error:
            raise UnreachableError(f"cannot read {_MANIFEST} of {self.uri}: {error}") from error
        except msgspec.DecodeError as error:
            raise StoreError(f"{_MANIFEST} of {self.uri} is damaged: {error}") from error
        if found.format != FORMAT:
            raise StoreError(f"{self.uri} has format {found.format!r}, this streamrec reads format {FORMAT}")
        return found

    def _known(self) -> Manifest:
        """The manifest, which must not be older than what was written."""
        manifest = self._manifest()
        if manifest.part < self._committed:  # a folder that is empty all at once is another one
            raise UnreachableError(
                f"{self.uri} lacks the {_MANIFEST} that was written there: is what it is on still mounted?"
            )
        return manifest

    def _save(self, manifest: Manifest) -> None:
        self._put_bytes(f"{_FOLDER}/{_MANIFEST}", msgspec.json.encode(manifest))

    def _put_together(self, manifest: Manifest, needed: int) -> None:
        """Make one file of the many of an hour whose parts no checkpoint needs apart."""
        pa = arrow()
        groups: dict[tuple[str, int], list[File]] = defaultdict(list)
        for file in manifest.files:
            if file.last <= needed:
                groups[file.dataset, file.hour].append(file)
        gone: set[str] = set()
        for (dataset, hour), files in groups.items():
            small = sorted((one for one in files if one.first == one.last), key=lambda one: one.name)
            if len(small) < self.compact:
                continue
            table = pa.concat_tables([self._table(one.name) for one in small])
            first, last = small[0].first, small[-1].last
            name = f"{folder_of(dataset, hour)}parts-{first:010d}-{last:010d}.parquet"
            self._left.add(name)
            self._put(name, table)
            gone |= {one.name for one in small}
            manifest.files.append(File(name, dataset, hour, first, last, table.num_rows))
        if gone:
            manifest.files = [one for one in manifest.files if one.name not in gone]
            self._save(manifest)
            self._left |= gone
        if self._left:  # now, or when it failed half-way
            self._remove(self._left.difference(file.name for file in manifest.files))
            self._left.clear()

    def _table(self, name: str) -> Any:
        from pyarrow import parquet

        try:
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                return parquet.read_table(file)
        except OSError as error:
            raise UnreachableError(f"cannot read {name} of {self.uri}: {error}") from error

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            try:
                self._fs.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                pass
            except OSError as error:
                raise UnreachableError(f"cannot remove {name} from {self.uri}: {error}") from error

    # -- reading -------------------------------------------------------------------------------------------------------

    def files(self, dataset: str) -> list[str]:
        """The URIs of the files of "events", "labels" or "dead", in the order of time: for
        `dask.dataframe.read_parquet(archive.files("events"))`, pandas or any other reader."""
        return [str(self._fs.unstrip_protocol(f"{self._root}/{one.name}")) for one in self._files(dataset)]

    def _files(self, dataset: str) -> list[File]:
        if dataset not in DATASETS:
            raise ConfigError(f"there is no dataset {dataset!r}: choose from {', '.join(DATASETS)}")
        files = [one for one in self._manifest().files if one.dataset == dataset]
        return sorted(files, key=lambda one: (one.hour, one.first, one.name))

    def read(self, dataset: str = "events", *, decode: Callable[[bytes], Event] = decode_event) -> ArchivedRows:
        """A source over what is committed now, hour by hour, each in the order in which it came.

        "events"; "labeled": the labels with their impressions, as `Labeled` items; "dead": dead letters, tried once
        more with `decode`, so that what a fix can read comes as events. Holds an hour of rows in memory.
        """
        if dataset == "labeled":
            labels = self._hours("labels")
            events = self._hours("events")
            return ArchivedRows(dataset, labels, self._table, decode, events)
        return ArchivedRows(dataset, self._hours(dataset), self._table, decode)

    def _hours(self, dataset: str) -> dict[int, list[str]]:
        hours: dict[int, list[str]] = {}
        for file in self._files(dataset):
            hours.setdefault(file.hour, []).append(file.name)
        return hours

    # -- forgetting ----------------------------------------------------------------------------------------------------

    def forget(self, user: str) -> int:
        """Remove all rows of this user: impressions, the feedback on them, labels, and dead letters that name the user;
        return how many. Files are written anew, and the old ones removed. Nothing may be held: checkpoint first."""
        manifest = self._manifest()
        ids: set[str] = set()
        for file in manifest.files:
            if file.dataset == "events":
                columns = self._table(file.name).select(["id", "user"]).to_pydict()
                ids.update(id for id, one in zip(columns["id"], columns["user"], strict=True) if one == user)
        removed = 0
        files, gone = [], []
        for file in manifest.files:
            table = self._table(file.name)
            kept = of_others(file.dataset, table, user, ids)
            if kept.all():
                files.append(file)
                continue
            removed += len(kept) - int(kept.sum())
            gone.append(file.name)
            if kept.any():
                stem = file.name.removesuffix(".parquet")
                name = f"{stem}x.parquet"  # the old one stays whole until the manifest names this one
                self._put(name, table.filter(arrow().array(kept)))
                files.append(msgspec.structs.replace(file, name=name, rows=int(kept.sum())))
        if gone:
            manifest.files = files
            self._save(manifest)
            self._remove(gone)
        return removed

    # -- the cut -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """The number of the last part that was cut, its files that may not be named yet, and the ids that wait."""
        files = [file for number in sorted(self._cuts) for file in self._cuts[number]]
        slots = np.flatnonzero(self._names != None)  # noqa: E711  of each of them
        return {
            "part": self._part,
            "counted": {name: self._counted[name] + len(rows) for name, rows in self._rows.items()},
            "files": msgspec.json.encode(files).decode(),
            "slots": slots,
            "names": self._names[slots].tolist(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on after the checkpoint that `state` is of: name the files of its parts, and remove those of later ones.

        Raises `StoreError` where rows of later parts can be told apart no more.
        """
        manifest = self._manifest()
        part = int(state["part"])
        mixed = [one for one in manifest.files if one.first <= part < one.last]
        if mixed:
            raise StoreError(f"{self.uri} holds rows from after the checkpoint in {mixed[0].name}: use another archive")
        known = {one.name for one in manifest.files}
        missing = msgspec.json.decode(state["files"], type=list[File])
        missing = [one for one in missing if one.name not in known and not any(covers(x, one) for x in manifest.files)]
        lost = [one.name for one in missing if not self._fs.exists(f"{self._root}/{one.name}")]
        if lost:
            raise StoreError(f"{self.uri} lacks {lost[0]}, which the checkpoint knows: bring it back, or begin anew")
        manifest.files = [*(one for one in manifest.files if one.last <= part), *missing]
        manifest.part = part
        self._save(manifest)
        self._committed = part
        named = {one.name for one in manifest.files}
        there = [str(path)[len(self._root) + 1 :] for path in self._fs.find(self._root)]
        self._remove([name for name in there if name.endswith((".parquet", ".tmp")) and name not in named])
        self._part = part
        self._hold_none({name: int(state["counted"][name]) for name in DATASETS})
        slots = np.asarray(state["slots"])
        self._names = np.empty(max(512, 2 * int(slots.max(initial=0))), dtype=object)
        self._names[slots] = state["names"]
        self._spilled, self._cuts, self._unwritten, self._failed, self._left = [], {}, [], None, set()
        self._begun = True

    def _require(self) -> None:
        """That rows may be written. Raises `StoreError`."""
        if self._begun:
            self._known()
        else:
            self.begin()

    def begin(self) -> None:
        """Begin without a checkpoint. Raises `StoreError` where there are rows already."""
        if self._manifest().part:
            raise StoreError(
                f"{self.uri} holds what another run has learned, and there is no checkpoint to go on from: use another "
                "archive, or bring the store back"
            )
        self._begun = True
