"""The Faust adapter, in real workers on a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faust")

import faust

import streamrec as sr
from streamrec.adapters.faust import join, score, train
from streamrec.errors import ConfigError
from streamrec.events import decode_event, encode_event
from streamrec.testing._state import first_difference
from tests.adapters.faust_workers import (
    PATIENCE,
    Worker,
    fetch,
    labeled,
    make_app,
    newest,
    read_all,
    saved,
)
from tests.kafka.broker import committed, free_port, new_topic, receive, run, send, wait_until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGTERM and SIGKILL")


@pytest.mark.parametrize(
    ("kills", "total", "partitions"),
    [
        (2, 8_000, 4),
        pytest.param(10, 100_000, 4, marks=pytest.mark.soak),
        pytest.param(10, 100_000, 1, marks=pytest.mark.soak),
    ],
)
def test_each_event_is_learned_once_though_workers_die_and_join(
    worker: Worker,
    tansu: str,
    tmp_path: Path,
    kills: int,
    total: int,
    partitions: int,
) -> None:
    topic, dead = new_topic(tansu, partitions), new_topic(tansu)
    good = labeled(total, partitions)
    values = list(good)
    poisoned = partitions // 2
    # what cannot be read, what is large, and what can be read but is no event: its time is in milliseconds
    refused = encode_event(sr.Labeled(sr.Impression("late", 1.7e12, "u1", "p1"), 1.0))
    bad = [b'{"type": ', b"x" * 900_000, refused]
    values[50:50] = [(poisoned, value) for value in bad]
    send(tansu, topic, values)
    store = tmp_path / "store"
    settings = {"TOPIC": topic, "DEAD": dead, "EVERY": 1000, "SLOW": 0.1}
    workers = {n: worker(**settings) for n in range(2)}  # one learns, one stands by
    for number in range(kills):
        before = newest(store)
        wait_until(lambda: newest(store) > before + number % 2, PATIENCE)  # noqa: B023
        time.sleep(random.Random(number).uniform(0.0, 0.3))  # amid a batch, or amid a write
        owners = [n for n in workers if b"owns" in (tmp_path / f"worker{n}.log").read_bytes()]
        assert owners, "one learns, the other one stands by"
        killed = workers.pop(owners[-1])
        killed.kill()
        killed.wait()
        workers[number + 2] = worker(**settings)  # and another joins
    wait_until(lambda: read_all(store, topic, total + len(bad)), PATIENCE)
    state = saved(store)
    assert state["counts"]["learned"] == state["counts"]["impressions"] == total
    assert state["counts"]["events"] == total + len(bad), "no message was read twice, the bad ones neither"
    assert state["dead_letters"]["counts"] == {"malformed": 2, "bad time": 1}
    group = f"app-{tmp_path.name}-{topic}-trainer"
    wait_until(lambda: sum(o or 0 for o in committed(tansu, group, topic, partitions).values()))
    letters = receive(tansu, dead, len(bad))[: len(bad)]  # one may come twice, after a kill
    headers = [dict(one.headers) for one in letters]
    offsets = {str(50 // partitions + n).encode() for n in range(len(bad))}
    assert {one["offset"] for one in headers} == offsets
    assert all(one["topic"] == topic.encode() and one["partition"] == b"%d" % poisoned for one in headers)
    reasons = {b"malformed", b"bad time"}
    assert {one["reason"].split(b":")[0] for one in headers} == reasons
    assert {one.value for one in letters} == set(bad)
    whole = reference(tmp_path / "whole", [decode_event(value) for _, value in good if value])
    if partitions == 1:  # then the order is given, and with it every bit
        assert first_difference(state["model"], whole["model"]) is None
        assert first_difference(state["metrics"], whole["metrics"]) is None
    assert state["counts"]["learned"] == whole["counts"]["learned"]
    rates = [report_of(one).metrics["CTR"] for one in (store, tmp_path / "whole")]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12), "in any order"


def reference(store: Path, events: list[Any]) -> dict[str, Any]:
    """What one trainer becomes that is never interrupted."""
    trainer = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4),
        preprocessors=[sr.Dedup(ttl=1e9, capacity=1_000_000)],
        metrics=[sr.CTR()],
        store=store,
    )
    trainer.run(sr.Memory(events))
    return saved(store)


@pytest.mark.parametrize(("kills", "total"), [(1, 3_000), pytest.param(10, 50_000, marks=pytest.mark.soak)])
def test_joins_are_shared_among_workers_and_their_examples_learned_once(
    worker: Worker,
    tansu: str,
    tmp_path: Path,
    kills: int,
    total: int,
) -> None:
    clicks, examples = new_topic(tansu, 4), new_topic(tansu, 2)
    values: list[tuple[int, bytes | None]] = []
    for n in range(total):
        shown = sr.Impression(f"i{n}", 1000.0 + n, f"u{n % 97}", f"p{n % 13}")
        values.append((n % 4, encode_event(shown)))
        if n % 7 == 0:
            values.append((n % 4, encode_event(sr.Feedback(f"f{n}", shown.id, shown.time + 1.0))))
    values += [(n, encode_event(sr.Impression(f"end{n}", 1100.0 + total, "u", "p"))) for n in range(4)]
    settings = {"JOIN": clicks, "EXAMPLES": examples, "TOPIC": examples, "EVERY": 500}
    parts = kills + 1
    workers = [worker(**settings), worker(**settings)]
    for number in range(parts):
        send(tansu, clicks, values[number * len(values) // parts : (number + 1) * len(values) // parts])
        if number < kills:
            before = newest(tmp_path / "store")
            wait_until(lambda: newest(tmp_path / "store") > before, PATIENCE)  # noqa: B023
            workers[number % 2].kill()
            workers[number % 2].wait()
            workers[number % 2] = worker(**settings)
    wait_until(lambda: saved(tmp_path / "store").get("counts", {}).get("learned") == total, PATIENCE)
    state = saved(tmp_path / "store")
    assert state["metrics"] and state["counts"]["learned"] == total
    assert report_of(tmp_path / "store").metrics["CTR"] == pytest.approx(len(range(0, total, 7)) / total)


def report_of(store: Path) -> Any:
    left = saved(store)["preprocessors"][0]["type"]  # the workers' is Slow, a Dedup
    trainer = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4),
        preprocessors=[type(left, (sr.Dedup,), {})(ttl=1e9, capacity=1_000_000)],
        metrics=[sr.CTR()],
        store=store,
    )
    trainer.resume()
    return trainer.report()


def test_examples_come_in_the_order_of_their_partition(tansu: str, tmp_path: Path) -> None:
    clicks, examples, total = new_topic(tansu), new_topic(tansu), 3000
    shown = [sr.Impression(f"i{n}", 1000.0 + n, "u", "p") for n in range(total + 2)]
    send(tansu, clicks, [(0, encode_event(one)) for one in shown])

    async def main() -> None:
        # a message a batch: each has to wait for room, as after a broker's pause
        app = make_app(tansu, tmp_path, producer_max_batch_size=1)
        stages = lambda: [sr.LabelJoin(windows={"click": 1.0})]  # noqa: E731
        join(app, clicks, examples, stages, store=str(tmp_path / "joins"), batch=10)
        await app.start()
        while app.monitor.metric_counts["streamrec_examples"] < total:
            await asyncio.sleep(0.01)
        await app.stop()

    run(main())
    came = [json.loads(one.value)["impression"]["id"] for one in receive(tansu, examples, total)]
    assert came == [one.id for one in shown[:total]]


def test_a_worker_learns_on_while_its_store_is_away(worker: Worker, tansu: str, tmp_path: Path) -> None:
    topic, disk, away = new_topic(tansu), tmp_path / "disk", tmp_path / "away"
    send(tansu, topic, labeled(1_000, 1))
    one = worker(TOPIC=topic, STORE=disk / "store", EVERY=200)
    wait_until(lambda: newest(disk / "store") >= 1, PATIENCE)
    disk.rename(away)
    disk.write_bytes(b"")  # nothing in it can be read or written
    send(tansu, topic, labeled(1_000, 1, start=1_000))
    log = tmp_path / "worker0.log"
    wait_until(lambda: "a checkpoint could not be written; what comes is learned" in log.read_text(), PATIENCE)
    disk.unlink()
    away.rename(disk)
    wait_until(lambda: read_all(disk / "store", topic, 2_000), PATIENCE)
    assert one.poll() is None and "checkpoints are written again" in log.read_text()
    counts = saved(disk / "store")["counts"]
    assert counts["events"] == counts["learned"] == 2_000


def test_sigterm_checkpoints_commits_and_leaves_within_five_seconds(
    worker: Worker,
    tansu: str,
    tmp_path: Path,
) -> None:
    topic, notices = new_topic(tansu, 4), new_topic(tansu)
    send(tansu, topic, labeled(3000))
    one = worker(TOPIC=topic, NOTICES=notices, EVERY=2000, METRICS=1, WEB_PORT=(port := free_port()))
    store = tmp_path / "store"
    wait_until(lambda: newest(store) >= 1, PATIENCE)
    page = f"http://127.0.0.1:{port}/"
    wait_until(lambda: "streamrec_checkpoints" in fetch(page))
    wait_until(lambda: 'metric="streamrec_events"} 3000.0' in fetch(page + "metrics"))  # Prometheus is told as well
    send(tansu, topic, labeled(1000, start=3000))
    one.send_signal(signal.SIGTERM)
    assert one.wait(PATIENCE) == 0
    group = f"app-{tmp_path.name}-{topic}-trainer"
    state = saved(store)
    assert committed(tansu, group, topic, 4) == {int(n): o for n, o in state["position"][topic].items()}
    assert state["counts"]["learned"] == state["counts"]["events"] == sum(state["position"][topic].values())
    assert json.loads(receive(tansu, notices, 1)[0].value)["version"] == 1
    # by the worker's own log: what the interpreter does at its end takes long where the machine has other things to do
    log = (tmp_path / "worker0.log").read_text().splitlines()
    times = {
        word: [datetime.strptime(line[1:24], "%Y-%m-%d %H:%M:%S,%f") for line in log if word in line]
        for word in ("Signal received", "Closing event loop")
    }
    (heard,), (ended,) = times.values()
    assert (ended - heard).total_seconds() < 5.0, "the trainer has ended then, and left its group"


def test_requests_are_answered_and_bad_ones_told(worker: Worker, tansu: str, tmp_path: Path) -> None:
    trainer = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4), store=tmp_path / "store")
    shown = [sr.Impression(f"i{n}", float(n), "u1", f"p{n % 3}") for n in range(300)]
    trainer.push([sr.Labeled(one, float(one.item == "p2")) for one in shown])
    trainer.publish()
    requests, responses, dead = (new_topic(tansu) for _ in range(3))
    worker(REQUESTS=requests, RESPONSES=responses, DEAD=dead)
    sent = [
        b'{"id": "r1", "user": "u1", "candidates": ["p0", "p2", {"item": "p1"}], "k": 2}',
        b"not JSON",
        b'{"id": "r2", "user": "u1"}',
        b'{"id": "r3", "user": "u1", "candidates": ["p1"]}',
    ]
    send(tansu, requests, [(0, one) for one in sent])
    answers = {one.key: json.loads(one.value) for one in receive(tansu, responses, 3, 120)}
    assert answers[b"r1"]["items"][0] == "p2" and len(answers[b"r1"]["scores"]) == 2 and answers[b"r1"]["version"] == 1
    assert answers[b"r2"]["error"].startswith("bad request: Object missing required field `candidates`")
    assert answers[b"r3"]["items"] == ["p1"]
    assert {one.value for one in receive(tansu, dead, 2)} == {sent[1], sent[2]}


def test_callbacks_are_told_of_a_training_in_a_worker(worker: Worker, tansu: str, tmp_path: Path) -> None:
    topic, heard = new_topic(tansu), tmp_path / "heard"
    send(tansu, topic, labeled(1_500, 1))
    first = worker(TOPIC=topic, EVERY=500, HEARD=heard)
    wait_until(lambda: read_all(tmp_path / "store", topic, 1_500), PATIENCE)
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    told = [line.split() for line in heard.read_text().splitlines()]
    names = [name for name, _ in told]
    assert told[0] == ["on_train_begin", "0"] and told[-1] == ["on_train_end", "1500"]
    assert names.count("on_train_begin") == names.count("on_train_end") == 1 and names.count("on_save") >= 1
    steps = [int(events) for name, events in told if name == "on_step_end"]
    assert steps == sorted(set(steps)) and steps[-1] == 1_500
    assert [int(events) for name, events in told if name == "on_log"][-1] == 1_500


def test_profiles_come_back_from_their_changelog(worker: Worker, tansu: str) -> None:
    topic, port = new_topic(tansu), free_port()
    shown = [sr.Impression(f"i{n}", 1000.0 + 100 * n, "u1", "p1") for n in range(4)]
    send(tansu, topic, [(0, encode_event(sr.Labeled(one, float(n > 1)))) for n, one in enumerate(shown)])
    page = f"http://127.0.0.1:{port}/profile/u1/"
    first = worker(PROFILES=topic, WEB_PORT=port)
    wait_until(lambda: '"impressions":4' in fetch(page).replace(" ", ""), PATIENCE)
    told = json.loads(fetch(page))
    assert told == {"impressions": 4, "clicks": 2.0, "shown": 1.875, "clicked": 1.5, "time": 1300.0}
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    worker(PROFILES=topic, WEB_PORT=port)
    wait_until(lambda: fetch(page) and json.loads(fetch(page)) == told, PATIENCE)


def test_the_loop_is_not_blocked_while_it_learns_saves_and_publishes(tansu: str, tmp_path: Path) -> None:
    topic, notices, total = new_topic(tansu, 4), new_topic(tansu), 20_000
    shown = [sr.Impression(f"i{n}", 1000.0 + n, f"u{n}", f"p{n % 1301}") for n in range(total)]
    send(tansu, topic, [(n % 4, encode_event(sr.Labeled(one, float(n % 7 == 0)))) for n, one in enumerate(shown)])

    def make(store: str) -> sr.OnlineTrainer:
        model = sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=16)
        return sr.OnlineTrainer(model=model, metrics=[sr.AUC()], store=tmp_path / store, checkpoint_every=2000)

    warm = make("warm")  # what is to be compiled is compiled
    warm.push([sr.Labeled(sr.Impression("i", 1000.0, "u", "p"), 1.0)])
    warm.checkpoint({})

    async def main() -> tuple[list[tuple[float, float, float]], int]:
        app = make_app(tansu, tmp_path)
        trainer = make("store")
        train(app, topic, trainer, notices=notices)
        await app.start()
        ticks = []
        while app.monitor.metric_counts["streamrec_events"] < total:
            before = time.perf_counter(), time.process_time(), time.thread_time()
            await asyncio.sleep(0.01)
            after = time.perf_counter(), time.process_time(), time.thread_time()
            late, spent, in_loop = (then - now for now, then in zip(before, after, strict=True))
            ticks.append((late - 0.01, spent, in_loop))
        await app.stop()
        return ticks, trainer.report().counts["learned"]

    ticks, learned = run(main())
    assert learned == total and newest(tmp_path / "store") >= 9
    assert len(receive(tansu, notices, 1)) >= 1
    assert max(in_loop for _, _, in_loop in ticks) < 0.05, "the loop's own thread never computes for long"
    # Nor does another thread keep the interpreter to itself. A machine with other things to do is late as well: then
    # this process has not used the time either.
    blocked = [(late, spent) for late, spent, _ in ticks if late > 0.05 and spent > 0.05]
    assert len(blocked) <= len(ticks) // 100, blocked


def test_what_cannot_work_is_told_when_it_is_registered(tmp_path: Path) -> None:
    app = faust.App("wrong", broker="kafka://127.0.0.1:9", store="memory://", datadir=str(tmp_path))
    model = sr.FM(sr.Schema(sr.Id("user")), dim=4)
    with pytest.raises(ConfigError, match="give it a store"):
        train(app, "t", sr.OnlineTrainer(model=model))
    trainer = sr.OnlineTrainer(model=model, store=tmp_path / "store")
    with pytest.raises(ConfigError, match="batch must be >= 1"):
        train(app, "t", trainer, batch=0)
    with pytest.raises(ConfigError, match=r"topic must be a name, or app.topic\(\) of one name"):
        train(app, app.topic("a", "b"), trainer)
    with pytest.raises(ConfigError, match="topic must be a name"):
        score(app, "", "responses", None)  # type: ignore[arg-type]
