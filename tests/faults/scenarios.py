"""The faults: each happens to a real run over a real log, and is told as a row of a table.

`python -m tests.faults.scenarios [impressions]` prints it. Every row must balance, from what independent parts say:

    events that came  = duplicates + dead letters + events in the archive
    impressions there = learned + late + refused as doubles + evicted + waiting for their labels
    feedback there    = positive labels in the archive + feedback dropped by the join, by reason

and where the input was the same, the weights are those of a run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

import streamrec as sr
from streamrec.errors import FullError, StoreError
from streamrec.events import encode_lines
from streamrec.storage import DamagedWarning
from streamrec.testing._state import first_difference

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price"))
START, WINDOW, LATENESS = 1_700_000_000.0, 60.0, 30.0
REFUSED = ("late_impression", "duplicate_impression", "evicted_impression")
UNUSED = ("late_feedback", "unknown_kind", "outside_window", "repeated", "unmatched", "evicted_feedback")


class Row(NamedTuple):
    """What became of a run. `same`: whether its weights are the undisturbed run's; None where its input was another."""

    fault: str
    events: int
    learned: int
    waiting: int
    dropped: dict[str, int]
    positives: int
    same: bool | None
    note: str


def stream(impressions: int, seed: int = 0) -> list[Any]:
    """Impressions half a second apart and the clicks on some; the last comes when all windows before it are closed."""
    rng = random.Random(seed)
    events: list[Any] = []
    for n in range(impressions):
        now = START + 0.5 * n
        features = {"price": round(rng.expovariate(0.05), 2)}
        events.append(sr.Impression(f"i{n}", now, f"u{rng.randrange(200)}", f"p{rng.randrange(50)}", features))
        if rng.random() < 0.2:
            events.append(sr.Feedback(f"c{n}", f"i{n}", now + rng.uniform(0.5, 50.0)))
    events.sort(key=lambda event: event.time)
    return [*events, sr.Impression("last", events[-1].time + 1_000.0, "u0", "p0", {})]


def written(path: Path, events: Sequence[Any], bad: int = 20) -> int:
    """A log of them with some lines that are none; how many lines."""
    lines = encode_lines(events).splitlines(keepends=True)
    for n in range(bad):
        lines.insert((n + 1) * len(lines) // (bad + 1), b'{"type": "impression", "id":\n')
    path.write_bytes(b"".join(lines))
    return len(lines)


def trainer_of(folder: str, events: int, **more: Any) -> sr.OnlineTrainer:
    """With everything on: some ten checkpoints over so many events."""
    settings: dict[str, Any] = {
        "model": sr.FM(SCHEMA, dim=2),
        "preprocessors": [sr.Dedup(ttl=600.0, capacity=100_000)],
        "join": sr.LabelJoin(windows={"click": WINDOW}, lateness=LATENESS),
        "metrics": [sr.LogLoss()],
        "store": sr.Store(f"{folder}/store", keep=2),
        "archive": sr.Archive(f"{folder}/archive", compact=3),
        "checkpoint_every": max(events // 10, 1),
        "checkpoint_seconds": 1e9,
        "batch_size": 64,
    }
    return sr.OnlineTrainer(**{**settings, **more})


def row_of(fault: str, trainer: sr.OnlineTrainer, offered: int, note: str, whole: Any = None) -> Row:
    """What became of a run. Raises `AssertionError` where it does not balance."""
    counts = dict(trainer.report().counts)
    assert trainer.archive is not None
    source = trainer.archive.read("events")
    shown = told = 0
    while some := source.read(4_096):
        shown += sum(isinstance(one, sr.Impression) for one in some)
        told += sum(isinstance(one, sr.Feedback) for one in some)
    labels = trainer.archive.read("labeled")
    labeled = positives = 0
    while some := labels.read(4_096):
        labeled += len(some)
        positives += sum(one.label > 0 for one in some)  # type: ignore[union-attr]
    dead = trainer.archive.read("dead")
    letters = 0
    while some := dead.read(4_096):
        letters += len(some)
    dropped = {name: counts[name] for name in ("duplicate", *REFUSED, *UNUSED) if counts.get(name)}
    if letters:
        dropped["dead_letter"] = letters
    assert counts["events"] == offered, (fault, counts["events"], offered)
    assert counts["events"] == counts["duplicate"] + letters + shown + told, (fault, counts, letters, shown, told)
    assert shown == counts["learned"] + counts["pending"] + sum(counts[name] for name in REFUSED), (
        fault,
        counts,
        shown,
    )
    assert told == positives + sum(counts[name] for name in UNUSED), (fault, counts, told, positives)
    assert labeled == counts["learned"], (fault, counts, labeled)
    same = None if whole is None else first_difference(whole, trainer.model.state_dict()) is None
    return Row(fault, offered, counts["learned"], counts["pending"], dropped, positives, same, note)


# -- the faults --------------------------------------------------------------------------------------------------------


def undisturbed(folder: Path, events: Sequence[Any]) -> tuple[Row, Any]:
    """The run that the others are compared to, and its weights."""
    lines = written(folder / "log.jsonl", events)
    trainer = trainer_of(str(folder / "whole"), lines)
    trainer.run(sr.JsonLines(folder / "log.jsonl"))
    return row_of("none", trainer, lines, ""), trainer.model.state_dict()


PARENT = """
import os, sys
from tests.faults.scenarios import killable
killable(*sys.argv[1:3], "warm", int(sys.argv[3]))
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        killable(*sys.argv[1:3], "killed", int(sys.argv[3]))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def killable(log: str, folder: str, name: str, lines: int) -> None:
    """A run that goes on from what the one before has left; the first, "warm", over a few lines, compiles."""
    trainer_of(f"{folder}/{name}", lines).run(sr.JsonLines(log), limit=100 if name == "warm" else None)


def killed(folder: Path, events: Sequence[Any], whole: Any, kills: int = 4) -> Row:
    """SIGKILL, at moments that nobody has chosen, of a process of its own."""
    log = folder / "log.jsonl"
    lines = log.read_bytes().count(b"\n")
    begun = time.perf_counter()
    trainer_of(str(folder / "timed"), lines).run(sr.JsonLines(log))
    usual = time.perf_counter() - begun
    rng = random.Random(3)
    command = [sys.executable, "-c", PARENT, str(log), str(folder), str(lines)]
    done = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        while True:
            parent.stdin.write("go\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            if done < kills:
                time.sleep(rng.uniform(0.1, 1.0) * usual * 2 / (kills + 1))
                os.kill(child, signal.SIGKILL)
            status = int(parent.stdout.readline())
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            done += 1
        parent.stdin.close()
    trainer = trainer_of(str(folder / "killed"), lines)
    trainer.resume()
    return row_of("SIGKILL", trainer, lines, f"killed {done} times", whole)


@contextmanager
def no_room(size: int) -> Iterator[None]:
    """No file of this process may be longer: writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_full(folder: Path, events: Sequence[Any], whole: Any) -> Row:
    """Writes fail in the middle, again and again; after each there is a little more room."""
    log, failed, size = folder / "log.jsonl", 0, 2_000
    lines = log.read_bytes().count(b"\n")
    while True:
        trainer = trainer_of(str(folder / "full"), lines)
        try:
            with no_room(size):
                trainer.run(sr.JsonLines(log))
            break
        except StoreError:
            failed, size = failed + 1, size * 2
    assert failed
    return row_of("disk full", trainer, lines, f"{failed} runs ended by StoreError", whole)


def torn(folder: Path, events: Sequence[Any], whole: Any) -> Row:
    """The newest checkpoint is cut short on the disk, and the log ends in half a line while it is read."""
    log, place = folder / "log.jsonl", folder / "torn"
    content = log.read_bytes()
    lines, half = content.count(b"\n"), content.rfind(b"\n", 0, len(content) // 2) + 20
    place.mkdir()
    torn_log = place / "log.jsonl"
    torn_log.write_bytes(content[:half])
    # each checkpoint is waited for, so that there is one before the newest
    trainer_of(str(place), lines, background=False).run(sr.JsonLines(torn_log, follow=True, idle=0.1))
    newest = max((place / "store" / "checkpoints").glob("*.safetensors"))
    os.truncate(newest, newest.stat().st_size // 2)
    with torn_log.open("ab") as file:
        file.write(content[half:])
    trainer = trainer_of(str(place), lines)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.run(sr.JsonLines(torn_log, follow=True, idle=0.1))
    assert any(issubclass(one.category, DamagedWarning) for one in told)
    return row_of("torn write", trainer, lines, "went back to the checkpoint before", whole)


def clock_back(folder: Path, events: Sequence[Any], whole: Any) -> Row:
    """For a while a second sender whose clock is an hour behind sends too: its events are late, and none else is."""
    late = [
        sr.Impression(f"late{n}", events[len(events) // 2].time - 3_600.0 + n, "u1", "p1", {"price": 1.0})
        for n in range(len(events) // 20)
    ]
    middle = len(events) // 2
    mixed = list(events[:middle])
    for n, one in enumerate(late):
        mixed += [events[middle + n], one]
    mixed += events[middle + len(late) :]
    lines = written(folder / "back.jsonl", mixed)
    trainer = trainer_of(str(folder / "back"), lines)
    trainer.run(sr.JsonLines(folder / "back.jsonl"))
    row = row_of("clock going back", trainer, lines, "what was on time is learned as ever", whole)
    assert row.dropped["late_impression"] == len(late)
    return row


def shuffled(folder: Path, events: Sequence[Any], whole: Any) -> Row:
    """Each event twice, and all of them out of order by up to the lateness."""
    rng = random.Random(4)
    twice = [(one.time + rng.uniform(0.0, LATENESS), n, one) for one in events[:-1] for n in range(2)]
    mixed = [one for _, _, one in sorted(twice, key=lambda entry: entry[:2])]
    lines = written(folder / "shuffled.jsonl", [*mixed, events[-1]])
    trainer = trainer_of(str(folder / "shuffled"), lines)
    trainer.run(sr.JsonLines(folder / "shuffled.jsonl"))
    row = row_of("duplicated and shuffled", trainer, lines, "", whole)
    assert row.dropped["duplicate"] == len(events) - 1
    return row


def stalling(folder: Path, events: Sequence[Any], whole: Any, stall: float = 0.4) -> Row:
    """A log whose writer stops in the middle of a line, three times."""
    content, log = (folder / "log.jsonl").read_bytes(), folder / "stalls.jsonl"
    lines = content.count(b"\n")
    cuts = [0, len(content) // 5, len(content) // 2, len(content) * 4 // 5, len(content)]
    log.touch()
    source = sr.JsonLines(log, follow=True, idle=None)

    def write() -> None:
        for begin, end in pairwise(cuts):
            with log.open("ab") as file:
                file.write(content[begin:end])
            time.sleep(stall)
        source.close()

    writer = threading.Thread(target=write)
    trainer = trainer_of(str(folder / "stalls"), lines, checkpoint_seconds=stall / 2)
    writer.start()
    trainer.run(source)
    writer.join()
    return row_of("a source that stalls", trainer, lines, f"3 times {stall:g} s, within a line", whole)


class Slow(MemoryFileSystem):
    """A bucket that takes its time."""

    protocol = "slow"
    store: dict[str, Any] = {}  # noqa: RUF012  # of fsspec
    pseudo_dirs = [""]  # noqa: RUF012
    seconds = 0.02
    asked = 0

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        time.sleep(self.seconds)
        type(self).asked += 1
        super().pipe_file(path, value, mode=mode, **kwargs)


def slow_store(folder: Path, events: Sequence[Any], whole: Any, seconds: float = 0.02) -> Row:
    """Each write takes so long: the stream goes on meanwhile, and only its end waits."""
    fsspec.register_implementation("slow", Slow, clobber=True)
    Slow.seconds, Slow.asked = seconds, 0
    log = folder / "log.jsonl"
    lines = log.read_bytes().count(b"\n")
    trainer = trainer_of(
        str(folder), lines, store=sr.Store(f"slow://{folder.name}", keep=2), archive=str(folder / "slow")
    )
    trainer.run(sr.JsonLines(log))
    return row_of("a slow store", trainer, lines, f"{Slow.asked} writes of {seconds:g} s", whole)


class Unplugged(sr.JsonLines):
    """A log that takes five minutes of its own clock, in the second of which the disk of the store is away.

    In its place is a file: nothing in it can be read or written, whoever asks.
    """

    def __init__(self, path: Path, lines: int, disk: Path) -> None:
        super().__init__(path)
        self.now, self._step, self._disk, self._away = 0.0, 300.0 / lines, disk, disk.with_suffix(".away")

    def read(self, limit: int) -> list[Any]:
        before, self.now = self.now, self.now + self._step * limit
        if before < 60.0 <= self.now:
            self._disk.rename(self._away)
            self._disk.write_bytes(b"")
        if before < 120.0 <= self.now:
            self._disk.unlink()
            self._away.rename(self._disk)
        return super().read(limit)


def store_away(folder: Path, events: Sequence[Any], whole: Any) -> Row:
    """The store and the archive cannot be reached for a minute: what comes is learned, and saved when they can."""
    log, disk = folder / "log.jsonl", folder / "disk"
    lines = log.read_bytes().count(b"\n")
    source = Unplugged(log, lines, disk)
    trainer = trainer_of(str(disk), lines, clock=lambda: source.now, background=False)
    trainer.run(source)
    failed = trainer.report().counts["failed_checkpoints"]
    return row_of("a store away for 60 s", trainer, lines, f"{failed} checkpoints failed, no run ended", whole)


def overload(folder: Path, events: Sequence[Any], seconds: float = 1.0, rate: float = 2_000.0) -> Row:
    """A service hands in events at some rate, then ten times as many for `seconds`; what finds no room is refused.

    Its senders hear of that, so what was offered is what was accepted and what was refused.
    """
    source = sr.Push(capacity=2_000, full="refuse")
    refused, fullest = [], [0]

    def send(batch: Sequence[Any]) -> None:
        try:
            source.put(batch)
        except FullError:
            refused.extend(batch)
        fullest[0] = max(fullest[0], len(source))

    def produce() -> None:
        begun, n = time.perf_counter(), 0
        size = 100
        for fast, until in ((1.0, seconds / 2), (10.0, 1.5 * seconds), (1.0, 2 * seconds)):
            while time.perf_counter() - begun < until:
                now = START + time.perf_counter() - begun
                send([sr.Impression(f"x{n + k}", now, f"u{k}", f"p{k % 7}", {"price": 1.0}) for k in range(size)])
                n += size
                time.sleep(size / rate / fast)
        offered.append(n)
        source.close()

    offered: list[int] = []
    producer = threading.Thread(target=produce)
    trainer = trainer_of(str(folder / "load"), 20_000)
    producer.start()
    trainer.run(source)
    producer.join()
    counts = source.counts
    assert offered[0] == counts["accepted"] + counts["refused"] and counts["refused"] == len(refused)
    assert fullest[0] <= 2_000
    note = f"{offered[0]:,} offered, {counts['refused']:,} refused at the door, at most {fullest[0]:,} waiting"
    return row_of(f"10x load for {seconds:g} s", trainer, counts["accepted"], note)


FAULTS: dict[str, Callable[[Path, Sequence[Any], Any], Row]] = {
    "killed": killed,
    "disk_full": disk_full,
    "torn": torn,
    "clock_back": clock_back,
    "shuffled": shuffled,
    "stalling": stalling,
    "slow_store": slow_store,
    "store_away": store_away,
}


def table(rows: Sequence[Row]) -> str:
    """The rows, to be printed."""
    lines = [
        "| fault | events in | learned | waiting | dropped, by reason | weights | |",
        "|---|---:|---:|---:|---|---|---|",
    ]
    for row in rows:
        dropped = ", ".join(f"{name} {count:,}" for name, count in row.dropped.items())
        same = {True: "the same", False: "DIFFERENT", None: ""}[row.same]
        lines.append(
            f"| {row.fault} | {row.events:,} | {row.learned:,} | {row.waiting:,} | {dropped} | {same} | {row.note} |"
        )
    return "\n".join(lines)


def main(impressions: int = 20_000, kills: int = 10, load: float = 60.0) -> list[Row]:
    """Let everything happen, print the table."""
    events = stream(impressions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, whole = undisturbed(folder, events)
        rows = [first]
        for fault in FAULTS.values():
            more: dict[str, Any] = {"kills": kills} if fault is killed else {}
            rows.append(fault(folder, events, whole, **more))
        rows.append(overload(folder, events, load))
    print(f"\n{table(rows)}\n")
    return rows


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
