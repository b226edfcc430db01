"""A log that is followed: whatever its rotation does between two looks, each line comes once, in order."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Feedback, Item, encode_event
from streamrec.sources import JsonLines
from streamrec.testing import check_source


def click(n: int) -> Feedback:
    return Feedback(id=f"f{n}", impression_id="i1", time=float(n))


def lines(*numbers: int) -> bytes:
    return b"".join(encode_event(click(n)) + b"\n" for n in numbers)


def log(folder: Path, **settings: Any) -> JsonLines:
    return JsonLines(folder / "a.jsonl", follow=True, idle=0.0, **settings)


def rest(source: JsonLines, limit: int = 100) -> list[Item]:
    items: list[Item] = []
    while more := source.read(limit):
        items += more
    return items


def again(source: JsonLines, folder: Path, **settings: Any) -> JsonLines:
    """A new source at the position of this one, which is closed, as after a restart."""
    saved = json.dumps(source.position())
    source.close()
    new = log(folder, **settings)
    new.seek(json.loads(saved))
    return new


class Logger:
    """Writes a log and rotates it, as services, logrotate and Python's handlers do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "a.jsonl"
        self.written = 0
        self._partial = b""
        self.path.touch()

    def _append(self, content: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(content)

    def write(self, count: int = 1) -> None:
        """Whole lines, the first of which may have been begun."""
        for _ in range(count):
            line = self._partial or lines(self.written)
            self._partial = b""
            self._append(line)
            self.written += 1

    def begin(self) -> None:
        """The first half of a line."""
        if not self._partial:
            line = lines(self.written)
            self._append(line[:20])
            self._partial = line[20:]

    def end(self) -> None:
        if self._partial:
            self.write()

    def shift(self) -> None:
        """a.jsonl.1 becomes a.jsonl.2 and so on; those from .2 on are compressed."""
        numbers = sorted((int(path.name.split(".")[2]) for path in self.folder.glob("a.jsonl.*")), reverse=True)
        for number in numbers:
            for suffix in ("", ".gz"):
                old = self.folder / f"a.jsonl.{number}{suffix}"
                if old.exists():
                    old.rename(self.folder / f"a.jsonl.{number + 1}{suffix}")

    def rename(self) -> None:
        self.end()
        self.shift()
        self.path.rename(self.folder / "a.jsonl.1")
        self.path.touch()

    def copy(self) -> None:
        self.end()
        self.shift()
        shutil.copyfile(self.path, self.folder / "a.jsonl.1")

    def truncate(self) -> None:
        os.truncate(self.path, 0)

    def compress(self) -> None:
        for path in self.folder.glob("a.jsonl.*"):
            if path.suffix != ".gz" and path.name != "a.jsonl.1":
                Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()


def test_contract_over_old_files_and_the_log(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.2.gz").write_bytes(gzip.compress(lines(0, 1, 2) + b"{\n"))
    (tmp_path / "a.jsonl.1").write_bytes(lines(3, 4) + b"\n\n" + lines(5)[:-1])
    (tmp_path / "a.jsonl").write_bytes(lines(6, 7) + b"\n[]\n" + lines(8) + b'{"type":')
    (tmp_path / "a.jsonl.bak").write_bytes(lines(99))
    (tmp_path / "b.jsonl").write_bytes(lines(98))
    check_source(lambda: log(tmp_path))
    items = rest(log(tmp_path))
    assert [item for item in items if not isinstance(item, DeadLetter)] == [click(n) for n in range(9)]
    bad = [item.position for item in items if isinstance(item, DeadLetter)]
    assert bad == [
        {"path": str(tmp_path / "a.jsonl.2.gz"), "offset": len(lines(0, 1, 2))},
        {"path": str(tmp_path / "a.jsonl"), "offset": len(lines(6, 7)) + 1},
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(1, 4)),
            st.tuples(st.just("read"), st.integers(1, 5)),
            st.tuples(
                st.sampled_from(["begin", "rename", "copy, truncate", "copy, look, truncate", "compress", "restart"]),
                st.just(0),
            ),
        ),
        max_size=30,
    ),
    st.sampled_from([7, 100, 1 << 20]),
)
# an old file that was compressed with nothing in it, and a log that is truncated
@example([("rename", 0), ("rename", 0), ("compress", 0), ("write", 1), ("copy, look, truncate", 0)], 7)
def test_each_line_comes_once_through_any_rotation(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("log")

    class Small(JsonLines):
        _chunk = chunk

    def new() -> JsonLines:
        return Small(folder / "a.jsonl", follow=True, idle=0.0)

    logger, source = Logger(folder), new()
    found: list[Item] = []
    for step, count in steps:
        if step == "write":
            logger.write(count)
        elif step == "read":
            found += source.read(count)
        elif step == "restart":
            saved = json.dumps(source.position())
            source.close()
            source = new()
            source.seek(json.loads(saved))
        elif step.startswith("copy"):
            logger.copy()
            if "look" in step:
                found += source.read(2)
            logger.truncate()
            if source.position()["offset"] == 0:  # what is not read before it is gone is told of, which others test
                found += rest(source)
        else:
            getattr(logger, step)()
    logger.end()
    found += rest(source)
    source.close()
    assert [item for item in found if isinstance(item, DeadLetter)] == []
    assert found == [click(n) for n in range(logger.written)]


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("how", ["rename", "copy"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_reader_that_was_down_while_the_log_was_rotated(tmp_path: Path, times: int, how: str, packed: bool) -> None:
    logger, source = Logger(tmp_path), log(tmp_path)
    logger.write(10)
    assert source.read(7) == [click(n) for n in range(7)]
    saved = json.dumps(source.position())
    source.close()
    for _ in range(times):
        getattr(logger, how)()
        if how == "copy":
            logger.truncate()
        logger.write(10)
        if packed:
            logger.compress()
    source = log(tmp_path)
    source.seek(json.loads(saved))
    assert rest(source) == [click(n) for n in range(7, logger.written)]


def test_a_last_line_waits_for_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = lines(1, 2)
    path.write_bytes(whole[:-5])
    source = log(tmp_path)
    assert rest(source) == [click(1)]
    source = again(source, tmp_path)
    assert rest(source) == []
    path.write_bytes(whole)
    assert rest(source) == [click(2)]


def test_the_log_may_come_later_and_the_folder_must_be_there(tmp_path: Path) -> None:
    source = log(tmp_path)
    assert rest(source) == [] and source.size == 0
    source = again(source, tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines(1))
    assert rest(source) == [click(1)] and source.size == len(lines(1)) and source.fraction() is None
    with pytest.raises(SourceError, match="no folder"):
        JsonLines(tmp_path / "none" / "a.jsonl", follow=True)


def test_an_inode_that_is_used_again_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(1, 2, 3))
    source = log(tmp_path)
    source.read(2)
    position = dict(source.position())
    source.close()
    path.rename(tmp_path / "a.jsonl.1")
    path.write_bytes(lines(4, 5, 6))
    source = log(tmp_path)
    source.seek({**position, "inode": path.stat().st_ino})  # as if the system had given the new file the old number
    assert rest(source) == [click(3), click(4), click(5), click(6)]


def test_truncated_and_written_beyond_where_the_reader_was(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(1, 2))
    source = log(tmp_path)
    assert rest(source) == [click(1), click(2)]
    path.write_bytes(lines(3, 4, 5))  # the same inode, and longer than before
    gap, *items = rest(source)
    assert isinstance(gap, DeadLetter) and gap.reason.startswith("gap: ") and items == [click(3), click(4), click(5)]


def lost(folder: Path) -> tuple[JsonLines, int]:
    """A source whose file was rotated away and removed while it was down, and the first number that is still there."""
    logger, source = Logger(folder), log(folder)
    logger.write(5)
    source.read(3)
    saved = source.position()
    source.close()
    for _ in range(3):
        logger.rename()
        logger.write(5)
    (folder / "a.jsonl.3").unlink()
    new = log(folder)
    new.seek(saved)
    return new, 5


def test_what_was_removed_unread_is_a_dead_letter_and_told_once(tmp_path: Path) -> None:
    source, first = lost(tmp_path)
    (gap,) = source.read(1)
    assert isinstance(gap, DeadLetter)
    assert gap.reason.startswith("gap: ") and gap.position["offset"] == len(lines(0, 1, 2))
    source = again(source, tmp_path)
    assert rest(source, 2) == [click(n) for n in range(first, 20)]


def test_a_gap_is_told_again_where_it_was_not_handed_out(tmp_path: Path) -> None:
    source, first = lost(tmp_path)
    assert source.wait(0.0)  # it knows by now
    source = again(source, tmp_path)
    assert source.wait(0.0) and source.wait(0.0)
    gap, *items = rest(source)
    assert isinstance(gap, DeadLetter) and items == [click(n) for n in range(first, 20)]


def test_files_that_were_read_are_not_read_again_behind_a_gap(tmp_path: Path) -> None:
    logger, source = Logger(tmp_path), log(tmp_path)
    for _ in range(3):
        logger.write(5)
        logger.rename()
    logger.write(5)
    assert len(source.read(17)) == 17
    saved = source.position()
    source.close()
    logger.rename()
    logger.write(1)
    (tmp_path / "a.jsonl.1").unlink()  # the older ones are still there
    source = log(tmp_path)
    source.seek(saved)
    gap, *items = rest(source)
    assert isinstance(gap, DeadLetter) and items == [click(20)]


def test_a_position_before_the_first_line_is_lost_too_when_its_file_is(tmp_path: Path) -> None:
    logger, source = Logger(tmp_path), log(tmp_path)
    logger.write(3)
    saved = source.position()
    logger.rename()
    logger.write(1)
    (tmp_path / "a.jsonl.1").unlink()
    source = log(tmp_path)
    source.seek(saved)
    gap, item = rest(source)
    assert isinstance(gap, DeadLetter) and item == click(3)


def test_what_is_written_to_an_old_file_later_is_kept_as_a_dead_letter(tmp_path: Path) -> None:
    logger, source = Logger(tmp_path), log(tmp_path)
    logger.write(2)
    assert len(source.read(9)) == 2
    logger.rename()
    with (tmp_path / "a.jsonl.1").open("ab", buffering=0) as slow:
        slow.write(lines(100))  # before the new log has anything: in time
        assert source.read(9) == [click(100)]
        logger.write(1)
        assert source.read(9) == [click(2)]
        slow.write(lines(101))
    (late,) = source.read(9)
    assert isinstance(late, DeadLetter) and late.reason.startswith("late: ") and late.raw == lines(101)
    assert rest(source) == []
    logger.write(1)
    assert rest(source) == [click(3)]


def test_a_copy_that_is_still_being_made_is_not_read_twice(tmp_path: Path) -> None:
    logger = Logger(tmp_path)
    logger.write(6)
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.1").write_bytes(whole[: len(whole) // 2])  # amid a line
    source = log(tmp_path)
    assert rest(source, 2) == [click(n) for n in range(6)]
    (tmp_path / "a.jsonl.1").write_bytes(whole)
    logger.truncate()
    logger.write(2)
    assert rest(source, 1) == [click(6), click(7)]


def test_an_unfinished_compressed_copy_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.1").write_bytes(lines(1, 2))
    (tmp_path / "a.jsonl.1.gz").write_bytes(gzip.compress(lines(1, 2))[:20])
    (tmp_path / "a.jsonl").write_bytes(lines(3))
    assert rest(log(tmp_path)) == [click(1), click(2), click(3)]


def test_names_of_old_files(tmp_path: Path) -> None:
    for n, name in enumerate(["-20260101", "-20260102.gz", ".10", ".9.gz", ".2", ".1", ""]):
        content = lines(n)
        (tmp_path / f"a.jsonl{name}").write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert rest(log(tmp_path)) == [click(n) for n in range(7)]
    (tmp_path / "clicks.2026-01-02.jsonl").write_bytes(lines(8))
    (tmp_path / "clicks.2026-01-01.jsonl").write_bytes(lines(7))
    (tmp_path / "clicks.jsonl").write_bytes(lines(9))
    source = JsonLines(tmp_path / "clicks.jsonl", follow=True, idle=0.0, rotated=str(tmp_path / "clicks.*.jsonl"))
    assert rest(source) == [click(7), click(8), click(9)]


def test_what_it_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(1))
    for name, words in (("*.jsonl", "one log"), ("a.jsonl.gz", "one log")):
        with pytest.raises(ConfigError, match=words):
            JsonLines(tmp_path / name, follow=True)
    with pytest.raises(SourceError, match="is a folder"):
        JsonLines(tmp_path, follow=True)
    for settings_, words in (({"idle": -1.0}, "idle must"), ({"poll": 0.0}, "poll must")):
        with pytest.raises(ConfigError, match=words):
            JsonLines(path, follow=True, **settings_)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="add follow=True"):
        JsonLines(path, idle=1.0)
    source = log(tmp_path)
    good = dict(source.position())
    for bad, words in (
        ({**good, "path": "b.jsonl"}, "this follows"),
        ({"path": str(path), "offset": 0}, "of a log that is followed"),
        ({**good, "first": [1]}, "of a log that is followed"),
        ({**good, "before": [7]}, "of a log that is followed"),
        ({"index": 1}, "no position"),
    ):
        with pytest.raises(SourceError, match=words):
            source.seek(bad)
    assert source.position() == good and rest(source) == [click(1)]


def test_an_interrupted_read_has_not_happened(tmp_path: Path) -> None:
    stop = [b"3"]

    def decode(line: bytes) -> sr.Feedback:
        if line in stop:
            stop.clear()
            raise KeyboardInterrupt
        return click(int(line))

    (tmp_path / "a.jsonl.1").write_bytes(b"1\n2\n")
    (tmp_path / "a.jsonl").write_bytes(b"3\n4\n")
    source = log(tmp_path, decode=decode)
    assert source.read(1) == [click(1)]
    with pytest.raises(KeyboardInterrupt):
        source.read(100)
    assert rest(source) == [click(2), click(3), click(4)]


def test_closing_ends_a_read_that_waits(tmp_path: Path) -> None:
    source = JsonLines(tmp_path / "a.jsonl", follow=True)
    found: list[list[Item]] = []
    reader = threading.Thread(target=lambda: found.append(source.read(10)))
    reader.start()
    assert not source.wait(0.01)
    source.close()
    reader.join(timeout=30)
    assert not reader.is_alive() and found == [[]]
    (tmp_path / "a.jsonl").write_bytes(lines(1))
    assert source.read(10) == []  # closed is closed, also where the one who reads has not noticed yet
    source.seek(source.position())
    assert source.read(10) == [click(1)]
    source.close()


def test_waiting_costs_no_processor(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(1))
    source = JsonLines(tmp_path / "a.jsonl", follow=True, idle=1.0)
    assert source.read(10) == [click(1)]
    used = time.process_time()
    assert source.read(10) == []
    assert time.process_time() - used < 0.3  # of a second of waiting; a busy loop takes all of it


FOLLOWER = """
import sys
import streamrec as sr

trainer = sr.OnlineTrainer(
    model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4), store=sys.argv[2], checkpoint_every=50,
    checkpoint_seconds=0.2, batch_size=16, preprocessors=[sr.Dedup(ttl=1e9, capacity=100_000)],
)
report = trainer.run(sr.JsonLines(sys.argv[1], follow=True, poll=0.01))
print(report.counts["events"], report.counts.get("duplicate", 0), report.interrupted, flush=True)
"""


def labeled(n: int) -> bytes:
    shown = sr.Impression(f"i{n}", float(n), f"u{n % 5}", f"p{n % 7}")
    return encode_event(sr.Labeled(shown, float(n % 3 == 0))) + b"\n"


def test_a_trainer_that_is_killed_while_the_log_rotates_learns_each_event_once(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", tmp_path / "store"
    written = 0

    def write(count: int) -> None:
        nonlocal written
        with path.open("ab") as file:
            for _ in range(count):
                file.write(labeled(written))
                written += 1

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, str(path), str(store)], stdout=subprocess.PIPE, text=True
        )

    def checkpoints() -> set[str]:
        return {p.name for p in (store / "checkpoints").glob("*")} if store.exists() else set()

    def rotate() -> None:
        for number in (3, 2, 1):
            old = tmp_path / f"a.jsonl.{number}"
            if old.exists():
                old.rename(tmp_path / f"a.jsonl.{number + 1}")
        path.rename(tmp_path / "a.jsonl.1")

    write(200)
    before, child = checkpoints(), start()
    while checkpoints() <= before:  # it has saved something, also though the log stands still
        assert child.poll() is None
        time.sleep(0.02)
    write(70)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    rotate()
    write(30)
    rotate()
    write(20)
    before, child = checkpoints(), start()
    while checkpoints() <= before:
        assert child.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # it waits at the end of the log by now; SIGTERM ends it there, too
    child.send_signal(signal.SIGTERM)
    told, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    trainer = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4),
        preprocessors=[sr.Dedup(ttl=1e9, capacity=100_000)],
        store=store,
    )
    report = trainer.run(JsonLines(path, follow=True, idle=0.0))
    assert told.split()[2] == "True"
    assert report.counts["events"] == written == 320 and report.counts.get("duplicate", 0) == 0
    assert report.counts["learned"] == written and trainer.dead_letters.total == 0
