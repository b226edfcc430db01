"""Faust workers for the tests: `worker.py` in a process of its own, or an app in the test's."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import streamrec as sr
from streamrec.events import encode_event

WORKER = Path(__file__).with_name("worker.py")
Worker = Callable[..., "subprocess.Popen[bytes]"]
PATIENCE = 900.0  # seconds: a worker begins with half a minute of imports where the machine has other things to do


def labeled(count: int, partitions: int = 4, start: int = 0) -> list[tuple[int, bytes | None]]:
    shown = [sr.Impression(f"i{n}", 1000.0 + n, f"u{n % 97}", f"p{n % 13}") for n in range(start, start + count)]
    return [(n % partitions, encode_event(sr.Labeled(one, float(n % 7 == 0)))) for n, one in enumerate(shown)]


@pytest.fixture
def worker(tansu: str, tmp_path: Path) -> Iterator[Worker]:
    """Starts a worker with these settings; all are gone at the test's end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**settings: Any) -> subprocess.Popen[bytes]:
        number = len(started)
        given = {"APP_ID": f"app-{tmp_path.name}", "BROKER": tansu, "STORE": str(tmp_path / "store")}
        given |= {"DATADIR": str(tmp_path / f"data{number}"), **{name: str(one) for name, one in settings.items()}}
        web = [] if "WEB_PORT" in settings else ["--without-web"]  # the app's setting does not stop the command's
        with (tmp_path / f"worker{number}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "faust", "-A", "worker:app", "worker", "-l", "info", *web],
                    cwd=WORKER.parent,
                    env={**os.environ, "PYTHONWARNINGS": "default", **given},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            with suppress(ProcessLookupError):
                one.kill()
            one.wait()


def make_app(broker: str, folder: Path, **settings: Any) -> Any:
    """An app to be run in the test's own process."""
    import faust  # here, since it reads the command line when it is imported

    return faust.App(
        f"app-{folder.name}", broker=f"kafka://{broker}", store="memory://", datadir=str(folder / "data"),
        web_enabled=False, broker_session_timeout=4.0, broker_heartbeat_interval=0.5, stream_wait_empty=False,
        **settings,
    )  # fmt: skip


def saved(store: Path) -> dict[str, Any]:
    found = sr.Store(store).checkpoints.read()
    return {} if found is None else found[1]


def newest(store: Path) -> int:
    """The number of the newest checkpoint on disk, by its name alone."""
    return max((int(path.stem) for path in (store / "checkpoints").glob("*.json")), default=0)


def read_all(store: Path, topic: str, count: int) -> bool:
    return sum(saved(store).get("position", {}).get(topic, {}).values()) == count


def fetch(page: str) -> str:
    try:
        with urllib.request.urlopen(page, timeout=10) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""
