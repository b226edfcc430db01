"""A run that is killed again and again ends as one that never was: with real processes, real kills and a real disk."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import streamrec as sr
from streamrec.events import encode_event
from streamrec.testing._state import first_difference

EVERY = 2_000

CHILD = f"""
import sys, time
import streamrec as sr

def trainer(store, batch_size):
    schema = sr.Schema(
        sr.Id("user"), sr.Id("item"), sr.Id("gender"), sr.Ids("genres"), sr.Number("year", scale=100.0),
        sr.Number("age", standardize=True), sr.Text("title"),
    )
    return sr.OnlineTrainer(
        model=sr.FM(schema, dim=4, seed=1),
        preprocessors=[sr.Dedup(ttl=600.0, capacity=100_000)],
        join=sr.LabelJoin(windows={{"click": 300.0, "purchase": 900.0}}, lateness=60.0),
        metrics=[sr.AUC(), sr.NormalizedEntropy(), sr.CTR(), sr.ConversionRate(of="purchase")],
        window=3600.0, store=store, checkpoint_every={EVERY}, checkpoint_seconds=1e9, batch_size=batch_size,
    )

class Patient(sr.JsonLines):
    "Reads slower and slower, so that however slow the one who kills is, there is something left to kill."
    left = 4 * {EVERY}
    def read(self, limit):
        self.left -= limit
        if self.left < 0:
            time.sleep(0.2)
        return super().read(limit)

if __name__ == "__main__":
    log, store, patient = sys.argv[1:]
    source = Patient(log) if patient == "patient" else sr.JsonLines(log)
    trainer(store, 128).run(source)
"""


def write_log(path: Path, count: int) -> int:
    """A log of MovieLens's fields: out of order, with duplicates, late ones and bad lines; returns its lines."""
    rng = random.Random(0)
    users = [{"gender": rng.choice("MF"), "age": rng.randrange(10, 80)} for _ in range(300)]
    items = [
        {
            "genres": rng.sample(["Drama", "Comedy", "Action", "War"], rng.randrange(4)),
            "year": rng.randrange(1930, 1999),
        }
        for _ in range(500)
    ]
    arriving: list[tuple[float, bytes]] = []
    for number in range(count):
        shown_at = 1_700_000_000.0 + 2.0 * number + rng.random()
        user, item = rng.randrange(300), int(500 * rng.random() ** 2)
        features = {**users[user], **items[item], "title": f"film {item}"}
        if number % 17 == 0:
            del features["age"]
        events: list[tuple[float, Any]] = [
            (shown_at, sr.Impression(f"i{number}", shown_at, f"u{user}", f"m{item}", features))
        ]
        for kind, window in (("click", 400.0), ("purchase", 1000.0)):
            if rng.random() < 0.2 + 0.6 * (item % 2):
                after = shown_at + rng.random() * window
                events.append((after, sr.Feedback(f"{kind}{number}", f"i{number}", after, kind)))
        for at, event in events:
            delay = rng.uniform(0.0, 60.0) if rng.random() < 0.99 else rng.uniform(100.0, 1000.0)
            arriving.append((at + delay, encode_event(event)))
            if rng.random() < 0.02:
                arriving.append((at + delay + rng.uniform(0.0, 500.0), encode_event(msgspec.structs.replace(event))))
        if number % 500 == 0:
            arriving.append((shown_at, b'{"type": "impression", "id": '))
    path.write_bytes(b"".join(line + b"\n" for _, line in sorted(arriving, key=lambda one: one[0])))
    return len(arriving)


def newest(store: Path) -> int:
    """The number of the newest checkpoint on disk, by its name alone."""
    return max((int(path.stem) for path in (store / "checkpoints").glob("*.json")), default=0)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_run_killed_at_random_moments_ends_as_one_that_never_was(tmp_path: Path, canonical: Any) -> None:
    log, store = tmp_path / "events.jsonl", tmp_path / "store"
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    lines = write_log(log, 29_000)
    assert 55_000 < lines < 70_000
    built: dict[str, Any] = {"__name__": "built"}
    exec(CHILD, built)  # noqa: S102
    built["trainer"](str(tmp_path / "whole"), 256).run(sr.JsonLines(log))  # another batch size: it has no meaning

    codes, begun = [], []
    for number in range(6):
        rng = random.Random(number)
        before = newest(store)
        begun.append(before)
        command = [sys.executable, str(script), str(log), str(store), "patient"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            # after the first, the second or the third checkpoint, and a while: amid a batch or amid a write
            while newest(store) < before + 1 + number % 3 and child.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.05))
            child.kill()
            error = child.communicate()[1]
        codes.append(child.returncode)
        assert child.returncode in (0, -signal.SIGKILL), error
    assert codes.count(-signal.SIGKILL) >= 3
    assert begun == sorted(begun) and begun[-1] > begun[0]  # each went on from where another was killed

    command = [sys.executable, str(script), str(log), str(store), "hasty"]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stderr == b"", done.stderr

    killed, whole = (sr.Store(path).checkpoints.read() for path in (store, tmp_path / "whole"))
    assert killed is not None and whole is not None
    assert whole[1]["counts"]["events"] == lines
    assert whole[1]["metrics"]["names"][0] == "AUC" and len(whole[1]["model"]["ids"]) > 800
    assert sum(whole[1]["join"]["counts"].values()) > 1000 and len(whole[1]["join"]["keys"]) > 0
    assert first_difference(canonical(whole[1]), canonical(killed[1])) is None
    published = [sr.Store(path).versions.read() for path in (store, tmp_path / "whole")]
    assert first_difference(published[0][1], published[1][1]) is None
    assert published[0][0].info == published[1][0].info
    # what crashed writers left has been taken away
    for shelf in (sr.Store(store).checkpoints, sr.Store(store).versions):
        kept = sorted(path.name[:10] for path in Path(shelf.uri).iterdir())
        there = [f"{version.number:010d}" for version in shelf.list()]
        assert kept == sorted(2 * there)  # a manifest and one payload each
        assert len(there) <= 3 + 64 and all(shelf.read(int(number)) is not None for number in there)
