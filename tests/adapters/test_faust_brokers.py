"""The Faust adapter where the broker, a topic or a message is not as it should be."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faust")

import streamrec as sr
from streamrec.adapters.faust import join, score, train
from streamrec.adapters.faust._membership import Membership
from streamrec.errors import SourceError
from streamrec.events import encode_event
from tests.adapters.faust_workers import PATIENCE, Worker, labeled, make_app, read_all, saved
from tests.kafka.broker import GIVEN, Broker, committed, free_port, new_topic, receive, run, send, wait_until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGTERM and SIGSTOP")
ours = pytest.mark.skipif(GIVEN is not None, reason="needs a broker that can be stopped")


def make_trainer(folder: Path) -> sr.OnlineTrainer:
    model = sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4)
    return sr.OnlineTrainer(model=model, store=folder / "store", checkpoint_seconds=0.2)


async def crash(app: Any) -> BaseException:
    """What a worker ends with, once it has begun."""
    await app.start()
    try:
        while not app.crashed:
            await asyncio.sleep(0.05)
        reason: BaseException = app.crash_reason
        return reason
    finally:
        await app.stop()


async def begin(app: Any) -> None:
    """Start, and end all that has been started."""
    try:
        await app.start()
    finally:
        await app.stop()
        app.consumer._thread.thread_loop.close()  # Faust leaves it open where its thread has not begun


async def until(app: Any, true: Callable[[], bool]) -> None:
    """Run an app until this is true."""
    await app.start()
    try:
        while not true():
            assert not app.crashed, app.crash_reason
            await asyncio.sleep(0.02)
    finally:
        await app.stop()


@ours
def test_a_broker_may_go_away_for_ten_seconds_and_come_back_with_its_data(
    worker: Worker, own: Broker, tmp_path: Path
) -> None:
    topic = new_topic(own.address, 2)
    send(own.address, topic, labeled(1000, 2))
    store = tmp_path / "store"
    one = worker(BROKER=own.address, TOPIC=topic, TIMEOUT=300, SESSION=10)
    wait_until(lambda: read_all(store, topic, 1000), PATIENCE)
    own.stop()
    time.sleep(10.0)
    own.start()
    send(own.address, topic, labeled(1000, 2, start=1000))
    wait_until(lambda: read_all(store, topic, 2000), PATIENCE)
    assert one.poll() is None, "it is the same worker"
    one.send_signal(signal.SIGTERM)
    assert one.wait(PATIENCE) == 0
    counts = saved(store)["counts"]
    assert counts["learned"] == counts["events"] == 2000
    group = f"app-{tmp_path.name}-{topic}-trainer"
    assert committed(own.address, group, topic, 2) == {0: 1000, 1: 1000}, "the group knows it, too"
    left = (tmp_path / "worker0.log").read_text().count("LeaveGroup request succeeded")
    assert left == 2, "the trainer's group, and the app's"


@pytest.mark.soak  # Faust's own consumer takes a minute or more to end then
@ours
def test_a_broker_that_stops_answering_ends_the_worker_and_the_next_one_goes_on(
    worker: Worker, own: Broker, tmp_path: Path
) -> None:
    topic = new_topic(own.address)
    send(own.address, topic, labeled(500, 1))
    store = tmp_path / "store"
    one = worker(BROKER=own.address, TOPIC=topic, TIMEOUT=6, SESSION=10)
    group = f"app-{tmp_path.name}-{topic}-trainer"
    wait_until(lambda: read_all(store, topic, 500) and committed(own.address, group, topic, 1) == {0: 500}, PATIENCE)
    own.freeze()
    told = f"no broker has answered at {own.address} for 6 s; start again when it is back".encode()
    wait_until(lambda: told in (tmp_path / "worker0.log").read_bytes(), PATIENCE)
    own.thaw()
    assert one.wait(PATIENCE) == 1, "crashed: whoever watches it starts it again"
    send(own.address, topic, labeled(500, 1, start=500))
    worker(BROKER=own.address, TOPIC=topic, TIMEOUT=300, SESSION=10)
    wait_until(lambda: read_all(store, topic, 1000), PATIENCE)
    assert saved(store)["counts"]["learned"] == 1000


def test_a_worker_whose_broker_never_answers_ends_after_the_stated_time(worker: Worker, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections, and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        one = worker(BROKER=address, TOPIC="clicks", TIMEOUT=2)
        assert one.wait(PATIENCE) == 1
    log = (tmp_path / "worker0.log").read_text()
    assert f"SourceError: no broker has answered at {address} for 2 s" in log
    assert "Ready" not in log


def test_nothing_starts_before_a_broker_has_answered(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    app = make_app(address, tmp_path)
    score(app, "requests", "responses", None, timeout=0.5)  # type: ignore[arg-type]
    with pytest.raises(
        SourceError, match=rf"no broker has answered at {address} for 0.5 s \(.*check bootstrap_servers"
    ):
        run(begin(app))


def test_a_topic_that_is_not_there_ends_the_worker(tansu: str, tmp_path: Path) -> None:
    for number, register in enumerate(
        (
            lambda app: train(app, "nobody-s", make_trainer(tmp_path)),
            lambda app: join(app, "nobody-s", "examples", lambda: [sr.LabelJoin(windows={"click": 1.0})], store="s"),
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        app = make_app(tansu, folder)
        register(app)
        with pytest.raises(SourceError, match="the broker has no topic 'nobody-s'; create it first"):
            run(begin(app))


def test_what_is_not_acknowledged_in_time_is_an_error_that_says_what(tansu: str, tmp_path: Path) -> None:
    topic = new_topic(tansu)
    send(tansu, topic, [(0, b"no event")])
    app = make_app(tansu, tmp_path, producer_request_timeout=5.0)
    train(app, topic, make_trainer(tmp_path), dead_letters="never made", timeout=3.0)
    error = run(crash(app))
    assert isinstance(error, SourceError)
    assert str(error).startswith(
        "the broker has not acknowledged the dead letters for topic 'never made' for 3 s; check"
    )
    assert saved(tmp_path / "store") == {}, "nothing is passed over before its dead letter is safe"


def test_messages_over_the_limit_are_cut_for_the_dead_letters_topic(tansu: str, tmp_path: Path) -> None:
    topic, dead = new_topic(tansu), new_topic(tansu)
    large = [b"\x00" * 3_000_000, encode_event(sr.Feedback("f" * 3_000_000, "i", 1.0))]
    values = labeled(10, 1)
    values[5:5] = [(0, one) for one in large]
    send(tansu, topic, values, max_request_size=5_000_000)
    app = make_app(tansu, tmp_path)  # its producer takes a megabyte
    trainer = make_trainer(tmp_path)
    train(app, topic, trainer, dead_letters=dead)
    run(until(app, lambda: app.monitor.metric_counts["streamrec_events"] == 12))
    assert trainer.report().counts["learned"] == 10
    assert app.monitor.metric_counts["streamrec_dead_letters"] == 2
    letters = receive(tansu, dead, 2)
    assert [one.value for one in letters] == [one[:4096] for one in large]
    headers = [dict(one.headers) for one in letters]
    assert [one["cut"] for one in headers] == [str(len(one)).encode() for one in large]
    assert [(one["offset"], one["reason"].split(b":")[0]) for one in headers] == [
        (b"5", b"malformed"),
        (b"6", b"id too long"),
    ]


def test_an_example_over_the_limit_is_a_dead_letter(tansu: str, tmp_path: Path) -> None:
    clicks, examples, dead = (new_topic(tansu) for _ in range(3))
    shown = [sr.Impression(f"i{n}", 1000.0 + n, "u", "p") for n in range(6)]
    shown[2] = sr.Impression("i2", 1002.0, "u", "p", {"text": "x" * 1_500_000})
    odd = sr.Feedback("f", "i1", 1.7e12)  # a time in milliseconds
    values = [(0, encode_event(one)) for one in [*shown[:3], odd, *shown[3:]]]
    send(tansu, clicks, values, max_request_size=5_000_000)
    app = make_app(tansu, tmp_path)
    stages = lambda: [sr.LabelJoin(windows={"click": 1.0})]  # noqa: E731
    join(app, clicks, examples, stages, store=str(tmp_path / "joins"), dead_letters=dead)
    run(until(app, lambda: app.monitor.metric_counts["streamrec_dead_letters"] == 2))
    assert [b'"i%d"' % n in one.value for n, one in zip((0, 1, 3), receive(tansu, examples, 3), strict=False)] == [
        True
    ] * 3
    letters = {one["reason"].split(b":")[0]: one for one in (dict(one.headers) for one in receive(tansu, dead, 2))}
    assert letters[b"bad time"]["offset"] == b"3" and letters[b"bad time"]["topic"] == clicks.encode()
    assert letters[b"too large"]["impression_id"] == b"i2" and int(letters[b"too large"]["cut"]) > 1_500_000


@ours
def test_a_group_that_cannot_be_joined_is_told(noida: str) -> None:
    topic = new_topic(noida)

    async def main() -> Exception:
        failed: asyncio.Queue[Exception] = asyncio.Queue()

        async def never(*_: Any) -> None:
            raise AssertionError("it has won nothing")

        settings = {"bootstrap_servers": noida, "session_timeout_ms": 1000, "heartbeat_interval_ms": 300}
        member = Membership(topic, "g", settings, won=never, lost=never, failed=failed.put, claim=lambda: 0)
        await member.start()
        try:
            return await failed.get()
        finally:
            await member.stop()

    assert "InvalidSessionTimeout" in repr(run(main()))
