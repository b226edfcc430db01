"""Events that a service hands in: nothing lost that was accepted, nothing accepted that is not kept."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.events import DeadLetter, Feedback, Item, encode_lines
from streamrec.sources import Push
from streamrec.testing import check_source


def click(n: int) -> Feedback:
    return Feedback(id=f"f{n}", impression_id="i1", time=float(n))


def clicks(first: int, end: int) -> list[Feedback]:
    return [click(n) for n in range(first, end)]


def rest(source: Push, limit: int = 100) -> list[Item]:
    """All that is left, of a source that is closed or does not wait."""
    items: list[Item] = []
    while more := source.read(limit):
        items += more
    return items


KINDS: list[Callable[[Path], dict[str, Any]]] = [lambda folder: {}, lambda folder: {"log": folder / "log"}]
both = pytest.mark.parametrize("kind", KINDS, ids=["in memory", "with a log"])


@both
def test_what_is_handed_in_comes_out_in_order(tmp_path: Path, kind: Any) -> None:
    with Push(capacity=10, **kind(tmp_path)) as source:
        source.put(click(0))
        source.put(clicks(1, 4))
        assert len(source) == 4 and source.wait(0.0)
        assert source.read(3) == clicks(0, 3)
        assert source.position()["index"] == 3
        source.put([])
        source.put(clicks(4, 6))
        assert source.read(9) == clicks(3, 6) and not source.wait(0.0)
        assert source.counts == {"accepted": 6, "dropped": 0, "refused": 0}
    assert rest(source) == []
    with pytest.raises(sr.SourceError, match="closed"):
        source.put(click(7))


@pytest.mark.parametrize("segment", [1, 200, 1 << 20])
def test_a_log_is_a_source_that_resumes_at_every_event(tmp_path: Path, segment: int) -> None:
    source = Push(log=tmp_path / "log", segment=segment)
    for n in range(20):
        source.put(clicks(3 * n, 3 * n + n % 4))
    accepted = source.counts["accepted"]
    source.close()
    check_source(lambda: Push(log=tmp_path / "log", idle=0.0))
    assert len(rest(Push(log=tmp_path / "log", idle=0.0))) == accepted
    files = len(list((tmp_path / "log").glob("*.jsonl")))
    assert files == {1: 15, 200: 10, 1 << 20: 1}[segment]


@both
def test_full_and_refusing(tmp_path: Path, kind: Any) -> None:
    source = Push(capacity=5, full="refuse", idle=0.0, **kind(tmp_path))
    source.put(clicks(0, 4))
    with pytest.raises(sr.FullError, match="no room for 2 more of capacity = 5"):
        source.put(clicks(4, 6))
    source.put(click(4))
    assert source.read(2) == clicks(0, 2)
    source.put(clicks(5, 7))
    assert rest(source) == clicks(2, 7)
    assert source.counts == {"accepted": 7, "dropped": 0, "refused": 2}


@both
def test_full_and_waiting(tmp_path: Path, kind: Any) -> None:
    source = Push(capacity=4, **kind(tmp_path))
    source.put(clicks(0, 4))
    with pytest.raises(sr.FullError, match="try again"):
        source.put(click(9), timeout=0.01)
    waiting = threading.Thread(target=lambda: [source.put(clicks(4 + 2 * n, 6 + 2 * n)) for n in range(10)])
    waiting.start()
    found: list[Item] = []
    while len(found) < 24:
        assert len(source) <= 4
        found += source.read(3)
    waiting.join()
    assert found == clicks(0, 24)
    assert source.counts == {"accepted": 24, "dropped": 0, "refused": 1}


@both
def test_full_and_dropping_the_oldest(tmp_path: Path, kind: Any) -> None:
    source = Push(capacity=5, full="drop_oldest", idle=0.0, **kind(tmp_path))
    source.put(clicks(0, 5))
    assert source.read(1) == [click(0)]
    source.put(clicks(5, 8))  # 1 and 2 have no room
    source.put(click(8))  # nor has 3
    assert len(source) == 5
    letter, *items = source.read(3)
    assert isinstance(letter, DeadLetter) and letter.reason.startswith("dropped: 3 events, from number 1 on")
    assert items == clicks(4, 6) and source.position()["index"] == 6
    assert rest(source) == clicks(6, 9)
    assert source.counts == {"accepted": 9, "dropped": 3, "refused": 0}


@both
def test_closing_ends_a_read_and_a_put_that_wait(tmp_path: Path, kind: Any) -> None:
    source = Push(capacity=1, **kind(tmp_path))
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(source.read(5)))
    reader.start()
    source.close()
    reader.join(timeout=30)
    assert found == [[]]
    source = Push(capacity=1, log=tmp_path / "other")
    source.put(click(0))

    def put() -> None:
        with pytest.raises(sr.SourceError, match="closed"):
            source.put(click(1))
        found.append("refused")

    producer = threading.Thread(target=put)
    producer.start()
    time.sleep(0.01)
    source.close()
    producer.join(timeout=30)
    assert found[-1] == "refused" and rest(source) == [click(0)]


@both
def test_asyncio(tmp_path: Path, kind: Any) -> None:
    source = Push(capacity=4, **kind(tmp_path))

    async def produce(first: int) -> None:
        for n in range(5):
            await source.aput(clicks(first + 2 * n, first + 2 * n + 2))

    async def main() -> tuple[list[Item], int]:
        reader = asyncio.to_thread(lambda: [one for _ in range(17) for one in source.read(1)])
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        heart = asyncio.create_task(beat())
        _, _, found = await asyncio.gather(produce(0), produce(100), reader)
        heart.cancel()
        with pytest.raises(sr.FullError):
            await source.aput(clicks(0, 4), timeout=0.0)
        return found, beats

    found, beats = asyncio.run(main())
    found += source.read(100)
    assert len(found) == 20 and beats > 5  # the loop went on while producers waited
    for first in (0, 100):
        assert [one for one in found if first <= one.time < first + 100] == clicks(first, first + 10)  # type: ignore[union-attr]


def test_what_it_refuses(tmp_path: Path) -> None:
    for settings_, words in (
        ({"capacity": 0}, "capacity must"),
        ({"full": "block"}, "full must be one of 'wait', 'refuse', 'drop_oldest', got 'block'"),
        ({"segment": 0}, "segment must"),
        ({"sync": True}, "for a log"),
        ({"idle": -1}, "idle must"),
    ):
        with pytest.raises(sr.ConfigError, match=words):
            Push(**settings_)  # type: ignore[arg-type]
    source = Push(capacity=2, log=tmp_path / "log", idle=0.0)
    odd: Any
    for odd, words in (
        ([click(0), None], "got a NoneType"),
        (clicks(0, 3), "more than capacity = 2"),
        ([click(0), sr.Impression("i", 1.0, "u", "p", {"x": object()})], "cannot be written as JSON"),
    ):
        with pytest.raises(sr.ConfigError, match=words):
            source.put(odd)
    assert len(source) == 0 and rest(source) == []
    for position in ({}, {"index": 1}, {"index": -1, "segment": 0, "offset": 0}):
        with pytest.raises(sr.SourceError, match="no position"):
            source.seek(position)
    (tmp_path / "notes.jsonl").write_text("not a log")
    with pytest.raises(sr.SourceError, match="folder of its own"):
        Push(log=tmp_path)


def test_without_a_log_a_position_is_a_count() -> None:
    source = Push(idle=0.0)
    source.put(clicks(0, 3))  # before the trainer has found its checkpoint
    source.seek({"index": 100})
    assert source.read(2) == clicks(0, 2) and source.position() == {"index": 102}
    with pytest.raises(sr.SourceError, match=r"Push\(log=...\) keeps it"):
        source.seek({"index": 100})
    source.release({"index": 101})
    assert source.read(2) == [click(2)]


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "read", "save", "restart", "release", "torn"]), st.integers(1, 5)),
        max_size=40,
    ),
    segment=st.sampled_from([1, 150, 10_000]),
)
def test_restarts_at_any_point_lose_and_double_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], segment: int
) -> None:
    folder = tmp_path_factory.mktemp("log")

    def new() -> Push:
        return Push(log=folder, segment=segment, idle=0.0)

    source = new()
    saved, learned, seen, accepted = json.dumps(source.position()), 0, 0, 0
    for step, count in [*steps, ("restart", 1)]:
        if step == "put":
            source.put(clicks(accepted, accepted + count))
            accepted += count
        elif step == "read":
            items = source.read(count)
            assert items == clicks(seen, min(seen + count, accepted))
            seen += len(items)
        elif step == "save":
            saved, learned = json.dumps(source.position()), seen
        elif step == "release":
            source.release(json.loads(saved))
        else:
            source.close()
            files = sorted(folder.glob("*.jsonl"))
            if step == "torn" and files:  # killed amid a line
                with files[-1].open("ab") as file:
                    file.write(b'{"type":"feedback","id":"f')
            source = new()
            source.seek(json.loads(saved))
            seen = learned
    assert rest(source) == clicks(seen, accepted)
    source.close()


def test_what_was_released_is_removed_and_told(tmp_path: Path) -> None:
    source = Push(log=tmp_path, segment=100, idle=0.0)
    begun = source.position()
    for n in range(10):
        source.put(click(n))
    source.read(5)
    middle = source.position()
    source.read(3)
    source.release(middle)
    assert len(list(tmp_path.glob("*.jsonl"))) < 6
    source.seek(middle)
    assert source.read(1) == [click(5)]
    source.close()
    for _ in range(2):  # told again where nobody has taken it
        again = Push(log=tmp_path, idle=0.0)
        again.seek(begun)
        assert again.position() == begun
    gap, *items = rest(again)
    assert isinstance(gap, DeadLetter) and gap.reason.startswith("gap: events 0 to 3 are no longer in")
    assert items == clicks(4, 10)


def test_a_log_of_which_all_is_read_can_be_emptied(tmp_path: Path) -> None:
    source = Push(log=tmp_path, idle=0.0)
    source.put(clicks(0, 5))
    source.read(5)
    before = source.position()
    source.release(before)
    assert [path.stat().st_size for path in tmp_path.glob("*.jsonl")] == [0]
    emptied = source.position()
    source.close()
    source = Push(log=tmp_path, idle=0.0)
    source.seek(before)  # a checkpoint that was written before
    source.put(click(5))
    assert source.read(9) == [click(5)]
    source.close()
    source = Push(log=tmp_path, idle=0.0)
    source.seek(emptied)
    assert source.read(9) == [click(5)] and source.position()["index"] == 6
    source.close()


def test_what_comes_after_a_release_is_in_another_file(tmp_path: Path) -> None:
    """So that a stream that never rests does not keep for long what a user wants forgotten."""
    source = Push(log=tmp_path, idle=0.0)
    source.put(clicks(0, 5))
    source.read(3)
    source.release(source.position())
    source.put(clicks(5, 8))
    assert source.read(9) == clicks(3, 8)
    source.release({**source.position(), "offset": 0})  # the checkpoint was before the last of them
    assert b"".join(path.read_bytes() for path in tmp_path.glob("*.jsonl")) == encode_lines(clicks(5, 8))
    source.close()


def test_a_log_that_lost_its_end_goes_on_with_new_numbers(tmp_path: Path) -> None:
    source = Push(log=tmp_path, idle=0.0)
    source.put(clicks(0, 5))
    rest(source)
    end = json.dumps(source.position())
    source.close()
    (file,) = tmp_path.glob("*.jsonl")
    os.truncate(file, 100)  # the machine failed; what the checkpoint has learned was not yet on the disk
    source = Push(log=tmp_path, idle=0.0)
    source.seek(json.loads(end))
    assert rest(source) == []
    source.put(clicks(5, 7))
    assert source.read(1) == [click(5)]
    saved = source.position()
    source.close()
    source = Push(log=tmp_path, idle=0.0)
    source.seek(saved)
    assert rest(source) == [click(6)]


def test_a_disk_that_is_full_accepts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    source = Push(log=tmp_path, idle=0.0)
    source.put(clicks(0, 2))
    real = io.FileIO.write
    room = [150]

    class Small(io.FileIO):
        def write(self, content: Any) -> int:
            if room[0] <= 0:
                raise OSError(28, "No space left on device")
            written = real(self, content[: room[0]])
            room[0] -= written
            return written

    monkeypatch.setattr("streamrec.sources._segments.io.FileIO", Small)
    source.close()
    source = Push(log=tmp_path, idle=0.0)
    with pytest.raises(sr.SourceError, match="No space left on device; nothing of this batch"):
        source.put(clicks(2, 9))
    assert source.counts["accepted"] == 0
    room[0] = 10_000
    source.put(clicks(2, 4))
    assert rest(source, 3) == clicks(0, 4)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    first = Push(log=tmp_path)
    first.put(click(0))
    second = Push(log=tmp_path)
    with pytest.raises(sr.SourceError, match="another process writes"):
        second.put(click(1))
    first.close()
    second = Push(log=tmp_path, sync=True)
    second.put(click(1))
    second.close()
    assert rest(second) == clicks(0, 2)


@both
def test_four_threads_and_the_memory_of_the_queue(tmp_path: Path, kind: Any) -> None:
    source = Push(capacity=500, **kind(tmp_path))

    def produce(which: int) -> None:
        for n in range(0, 3_000, 50):
            source.put([Feedback(f"{which}-{m}", "i1", float(m), "x" * 200) for m in range(n, n + 50)])

    threads = [threading.Thread(target=produce, args=(which,)) for which in range(4)]
    tracemalloc.start()
    for thread in threads:
        thread.start()
    seen: dict[str, list[float]] = {}
    for _ in range(12_000 // 40):
        left = 40
        while left:
            for one in source.read(left):
                assert isinstance(one, Feedback)
                seen.setdefault(one.id[0], []).append(one.time)
                left -= 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for thread in threads:
        thread.join()
    assert seen == {str(which): [float(n) for n in range(3_000)] for which in range(4)}  # each in its order
    assert peak < 4_000_000  # all of them would be 6 MB


SERVICE = """
import sys, threading, time
import streamrec as sr

source = sr.Push(log=sys.argv[1], segment=2_000)
trainer = sr.OnlineTrainer(
    model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4), store=sys.argv[2], checkpoint_every=50, batch_size=16,
    preprocessors=[sr.Dedup(ttl=1e9, capacity=100_000)],
)

def produce():
    n = int(sys.argv[3])
    while True:
        shown = sr.Impression(f"i{n}", float(n), f"u{n % 5}", f"p{n % 7}")
        source.put(sr.Labeled(shown, float(n % 3 == 0)))
        print(n, flush=True)  # it is accepted: who has sent it will not send it again
        n += 1
        time.sleep(0.001)

threading.Thread(target=produce, daemon=True).start()
trainer.run(source)
"""


def test_what_was_accepted_outlives_a_kill_and_is_learned_once(tmp_path: Path) -> None:
    log, store, accepted = tmp_path / "log", tmp_path / "store", 0
    for enough in (4, 0):  # checkpoints; the second is killed before it has made one
        command = [sys.executable, "-c", SERVICE, str(log), str(store), str(accepted)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            first, made = accepted, 0
            while made < enough or accepted < first + 100:
                accepted = int(child.stdout.readline()) + 1
                made = max([0, *(int(path.stem) for path in (store / "checkpoints").glob("*.json"))])
            child.send_signal(signal.SIGKILL)
            accepted = max([accepted - 1, *map(int, child.stdout.read().split())]) + 1
    trainer = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4),
        store=store,
        preprocessors=[sr.Dedup(ttl=1e9, capacity=100_000)],
    )
    report = trainer.run(sr.Push(log=log, idle=0.0))
    counts = report.counts
    # the very last one may be in the log though nobody was told so; it is handed in again then, and dropped
    assert counts["events"] - counts.get("duplicate", 0) - accepted in (0, 1)
    assert counts.get("duplicate", 0) <= 1 and trainer.dead_letters.total == 0
    assert min(int(path.stem) for path in log.glob("*.jsonl")) > 0  # what no checkpoint needs is gone
