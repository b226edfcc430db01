"""The Kafka source, on a real broker."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiokafka")

import streamrec as sr
from streamrec.errors import ConfigError, SourceError
from streamrec.events import encode_event
from streamrec.sources import Kafka
from streamrec.testing import check_source
from streamrec.testing._state import first_difference
from tests.kafka.broker import (
    GIVEN,
    Broker,
    committed,
    free_port,
    new_topic,
    run,
    send,
    wait_until,
)

ours = pytest.mark.skipif(GIVEN is not None, reason="needs a broker that can be stopped")


def feedback(number: int) -> sr.Feedback:
    return sr.Feedback(f"f{number}", f"i{number}", float(number))


def numbered(count: int, partitions: int = 1, start: int = 0) -> list[tuple[int, bytes | None]]:
    return [(n % partitions, encode_event(feedback(n))) for n in range(start, start + count)]


def drain(source: Any, limit: int = 256) -> list[Any]:
    found: list[Any] = []
    while items := source.read(limit):
        found += items
    return found


def test_it_is_a_source_that_resumes_at_every_message(noida: str) -> None:
    topic = new_topic(noida)
    values = numbered(40)
    values[7:7] = [(0, b'{"type": '), (0, b"\xff\xfe"), (0, b"{}")]
    send(noida, topic, values)
    check_source(lambda: Kafka(topic, noida, prefetch=16))


def test_partitions_keep_their_order_and_positions_are_exact(noida: str) -> None:
    topics = [new_topic(noida, 4), new_topic(noida, 1)]
    send(noida, topics[0], numbered(400, 4))
    send(noida, topics[1], numbered(50, 1, start=1000))
    found: list[Any] = []
    position = None
    while True:  # another source after every read, from a position that went through JSON
        with Kafka(topics, noida, prefetch=30) as source:
            if position is not None:
                source.seek(json.loads(json.dumps(position)))
            items = source.read(37)
            position = source.position()
        if not items:
            break
        found += items
    assert position == {topics[0]: {str(n): 100 for n in range(4)}, topics[1]: {"0": 50}}
    assert sorted(int(one.id[1:]) for one in found) == [*range(400), *range(1000, 1050)]
    for partition in range(4):
        mine = [int(one.id[1:]) for one in found if one.time < 1000 and int(one.time) % 4 == partition]
        assert mine == sorted(mine)


def test_what_cannot_be_decoded_is_a_dead_letter_with_its_place(noida: str) -> None:
    topic = new_topic(noida, 2)
    bad = [(1, b'{"type": '), (1, b"\xff"), (1, b'{"type":"feedback"}'), (1, b"x" * 900_000)]
    send(noida, topic, [*numbered(3), (1, encode_event(feedback(9))), *bad, (1, encode_event(feedback(10)))])
    with Kafka(topic, noida) as source:
        items = [one for one in drain(source, 2) if isinstance(one, sr.DeadLetter) or one.id in ("f9", "f10")]
    assert [type(one).__name__ for one in items] == ["Feedback", *["DeadLetter"] * 4, "Feedback"]
    letters = items[1:5]
    assert [one.position for one in letters] == [{"topic": topic, "partition": 1, "offset": n} for n in range(1, 5)]
    assert [one.raw for one in letters] == [value for _, value in bad]
    assert all(one.reason.startswith("malformed: ") and len(one.reason) <= 500 for one in letters)


def test_what_is_refused_later_is_kept_with_its_place(noida: str) -> None:
    topic = new_topic(noida, 2)
    values = numbered(6, 2)
    wrong = sr.Feedback("f", "", 1.0)  # it decodes, but belongs to no impression
    values[4:4] = [(1, b"{"), (1, encode_event(wrong)), (1, b"{"), (0, encode_event(wrong))]
    send(noida, topic, values)
    trainer = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("user")), dim=4), batch_size=5)
    with Kafka(topic, noida, prefetch=8) as source:
        trainer.run(source)
    found = sorted(
        (one.position["partition"], one.position["offset"], one.reason.split(":")[0]) for one in trainer.dead_letters
    )
    assert found == [(0, 2, "bad id"), (1, 2, "malformed"), (1, 3, "bad id"), (1, 4, "malformed")]
    assert all(one.position["topic"] == topic for one in trainer.dead_letters)


def test_a_message_without_a_value_is_a_dead_letter(tansu: str) -> None:
    topic = new_topic(tansu)
    send(tansu, topic, [(0, None), *numbered(1)])
    with Kafka(topic, tansu) as source:
        first, second = drain(source)
    assert first.reason == "malformed: the message has no value" and first.position["offset"] == 0
    assert second == feedback(0)


def test_a_decoder_of_the_user_s_may_fail_in_any_way(noida: str) -> None:
    def decode(value: bytes) -> Any:
        number = int(value)
        if number == 1:
            raise KeyError("no such thing")
        return None if number == 2 else feedback(number)

    topic = new_topic(noida)
    send(noida, topic, [(0, str(n).encode()) for n in range(4)])
    with Kafka(topic, noida, decode=decode) as source:
        items = drain(source)
    assert items[0] == feedback(0) and items[3] == feedback(3)
    assert [one.reason for one in items[1:3]] == [
        "malformed: 'no such thing' (KeyError)",
        "malformed: decode returned a NoneType, which is no event",
    ]


def test_without_follow_it_ends_where_the_topic_ended_when_it_was_opened(noida: str) -> None:
    topic = new_topic(noida)
    send(noida, topic, numbered(10))
    with Kafka(topic, noida) as source:
        assert source.read(4) == [feedback(n) for n in range(4)] and source.lag() == 6
        send(noida, topic, numbered(5, start=10))
        assert drain(source) == [feedback(n) for n in range(4, 10)] and source.read(1) == []
        source.close()
        assert drain(source) == [feedback(n) for n in range(10, 15)], "opened anew, it sees what was added"
        assert source.lag() == 0


def test_with_follow_it_waits_until_closed_or_idle(noida: str) -> None:
    topic = new_topic(noida)
    with Kafka(topic, noida, follow=True, idle=0.3) as source:
        assert source.read(10) == []
    source = Kafka(topic, noida, follow=True)
    found: list[Any] = []

    def read_on() -> None:
        while items := source.read(10):
            found.extend(items)

    reader = threading.Thread(target=read_on, daemon=True)
    reader.start()
    for n in range(3):
        send(noida, topic, numbered(1, start=n))
        wait_until(lambda n=n: len(found) == n + 1)
    source.close()
    reader.join(30)
    assert not reader.is_alive() and found == [feedback(n) for n in range(3)]
    assert source.position() == {topic: {"0": 3}}


def test_latest_starts_at_the_end(noida: str) -> None:
    topic = new_topic(noida, 2)
    send(noida, topic, numbered(10, 2))
    with Kafka(topic, noida, start="latest", follow=True, idle=20.0) as source:
        assert source.position() == {topic: {"0": 5, "1": 5}}
        send(noida, topic, numbered(1, start=10))
        assert source.read(10) == [feedback(10)]


def test_partitions_can_be_shared_out(noida: str) -> None:
    topic = new_topic(noida, 3)
    send(noida, topic, numbered(30, 3))
    with Kafka(topic, noida, partitions=[2]) as source:
        assert drain(source) == [feedback(n) for n in range(2, 30, 3)] and source.position() == {topic: {"2": 10}}
        with pytest.raises(SourceError, match=rf"the position names {topic}/0, which are not read here"):
            source.seek({topic: {"0": 3}})
    with pytest.raises(SourceError, match=rf"topic '{topic}' has partitions \[0, 1, 2\], not \[7\]"):
        Kafka(topic, noida, partitions=[7]).read(1)


def test_a_position_behind_the_end_is_an_error(noida: str) -> None:
    topic = new_topic(noida)
    send(noida, topic, numbered(5))
    with (
        Kafka(topic, noida) as source,
        pytest.raises(SourceError, match=r"ends at offset 5, before the position 99: .* or it was made anew"),
    ):
        source.seek({topic: {"0": 99}})
    for bad in ({topic: 3}, {topic: {"0": -1}}, {topic: {"x": 1}}, {topic: {"0": "1"}}):
        with pytest.raises(SourceError, match=r"it must be \{topic: \{partition: offset\}\}"):
            Kafka(topic, noida).seek(bad)


def test_what_retention_has_removed_is_told_and_the_rest_is_read(noida: str) -> None:
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.admin.records_to_delete import RecordsToDelete
    from aiokafka.structs import TopicPartition

    topic = new_topic(noida)
    send(noida, topic, numbered(10))

    async def remove() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=noida)
        await admin.start()
        try:
            await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(before_offset=4)})
        finally:
            await admin.close()

    try:
        run(remove())
    except Exception as error:
        pytest.skip(f"this broker removes no records: {error!r}")
    with Kafka(topic, noida) as source:
        source.seek({topic: {"0": 1}})
        assert source.position() == {topic: {"0": 1}}
        first, *rest = drain(source)
        assert first.reason == "lost: offsets 1 to 3, 3 messages, are no longer in the topic"
        assert rest == [feedback(n) for n in range(4, 10)]


def test_a_topic_that_is_not_there_and_settings_that_cannot_work(noida: str) -> None:
    with pytest.raises(SourceError, match="the broker has no topic 'nobody-s'; create it first"):
        Kafka("nobody-s", noida).read(1)
    for wrong, told in (
        ({"topics": []}, "topics must be one name"),
        ({"timeout": 0.0}, "timeout must be > 0 seconds"),
        ({"idle": -1.0}, "idle must be > 0 seconds"),
        ({"prefetch": 0}, "prefetch must be >= 1"),
        ({"partitions": [-1]}, "partitions must be numbers >= 0"),
        ({"bootstrap_servers": ""}, "bootstrap_servers must be"),
    ):
        with pytest.raises(ConfigError, match=told):
            Kafka(**{"topics": "t", "bootstrap_servers": noida, **wrong})
    with pytest.raises(ConfigError, match=r"aiokafka refuses these settings: .*no_such_setting"):
        Kafka("t", noida, client={"no_such_setting": 1}).read(1)
    with pytest.raises(ConfigError, match="limit must be >= 1"):
        Kafka("t", noida).read(0)


def test_no_broker_and_one_that_never_answers_are_errors_after_the_stated_time() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(SourceError, match=rf"no broker has answered at {address} for 1 s \(.*check bootstrap_servers"):
        Kafka("t", address, timeout=1.0).read(1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(SourceError, match=f"no broker has answered at {address} for 2 s"):
            Kafka("t", address, timeout=2.0).position()
        assert time.monotonic() - began < 30.0


@ours
def test_a_broker_may_go_away_and_come_back_with_its_data(own: Broker) -> None:
    topic = new_topic(own.address, 2)
    send(own.address, topic, numbered(100, 2))
    with Kafka(topic, own.address, follow=True, timeout=120.0) as source:
        found = [*source.read(60)]
        while len(found) < 100:
            found += source.read(60)
        own.stop()
        time.sleep(10.0)
        own.start()
        send(own.address, topic, numbered(100, 2, start=100))
        while len(found) < 200:
            found += source.read(60)
        assert sorted(int(one.id[1:]) for one in found) == list(range(200))
        assert source.position() == {topic: {"0": 100, "1": 100}}


@ours
def test_a_broker_that_stops_answering_is_an_error_after_the_stated_time(own: Broker) -> None:
    topic = new_topic(own.address)
    send(own.address, topic, numbered(10))
    with Kafka(topic, own.address, follow=True, timeout=3.0) as source:
        assert source.read(4)
        own.freeze()
        with pytest.raises(SourceError, match=r"no broker has answered at .* for 3 s; start again when it is back"):
            drain(source, 100)
        assert source.position() == {topic: {"0": 10}}
        own.thaw()
        send(own.address, topic, numbered(1, start=10))
        source.close()  # and when the broker is well again, so is the source
        assert source.read(1) == [feedback(10)]


def test_committed_offsets_follow_what_was_asked_for(tansu: str) -> None:
    topic = new_topic(tansu, 2)
    send(tansu, topic, numbered(20, 2))
    with Kafka(topic, tansu, group="watched", prefetch=4) as source:
        source.read(6)
        checkpoint = source.position()[topic]
        source.read(1)
        wait_until(lambda: committed(tansu, "watched", topic, 2) == {int(n): o for n, o in checkpoint.items()})
        drain(source)
        source.position()
    assert committed(tansu, "watched", topic, 2) == {0: 10, 1: 10}
    with Kafka(topic, tansu, group="watched") as source:
        assert len(drain(source)) == 20, "nothing is read from the group"


CHILD = """
import os, sys, time
import streamrec as sr
from streamrec.sources import Kafka

def trainer(store, **changed):
    schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("tags"))
    settings = dict(
        model=sr.FM(schema, dim=4), join=sr.LabelJoin(windows={"click": 1e6}, lateness=1e6),
        preprocessors=[sr.Dedup(ttl=1e9, capacity=1_000_000)], metrics=[sr.CTR()], store=store,
        checkpoint_every=500, checkpoint_seconds=1e9,
    )
    return sr.OnlineTrainer(**{**settings, **changed})

class Patient(Kafka):
    "Reads slower and slower, so that however slow the one who kills is, there is something left to kill."
    left = 0
    def read(self, limit):
        self.left -= limit
        if self.left < 0:
            time.sleep(0.05)
        return super().read(limit)

def work(topic, address, store, total, how):
    Patient.left = int(total) // 12
    with (Patient if how == "patient" else Kafka)(topic, address, follow=how == "follow") as source:
        # in the background, the first checkpoint would be cut when more messages come
        waits = {"background": False, "checkpoint_every": 3_000} if how == "follow" else {}
        print(trainer(store, **waits).run(source).counts["events"], flush=True)

if __name__ == "__main__":
    *where, how = sys.argv[1:]
    if how != "nursery":
        work(*where, how)
        sys.exit()
    # Gives birth to workers that have everything imported and compiled already: one for each line on stdin.
    trainer(None).push([sr.Labeled(sr.Impression("i", 1000.0, "u", "p"), 1.0)])
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work(*where, line.strip())
                code = 0
            finally:
                os._exit(code)
        print("pid", pid, flush=True)
        print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGTERM")
def test_sigterm_ends_a_run_that_waits(noida: str, tmp_path: Path) -> None:
    topic = new_topic(noida)
    send(noida, topic, numbered(3000))
    command = [sys.executable, "-c", CHILD, topic, noida, str(tmp_path / "store"), "0", "follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            wait_until(lambda: any((tmp_path / "store").glob("checkpoints/*.json")) or child.poll() is not None)
            child.send_signal(signal.SIGTERM)
            out, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 0, error
    assert out.strip() == "3000"
    found = sr.Store(tmp_path / "store").checkpoints.read()
    assert found is not None and found[1]["position"] == {topic: {"0": 3000}}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("kills", "total", "partitions"),
    [
        (3, 8_000, 4),
        (2, 6_000, 1),
        pytest.param(10, 100_000, 4, marks=pytest.mark.soak),
        pytest.param(10, 100_000, 1, marks=pytest.mark.soak),
    ],
)
def test_kills_lose_nothing_and_learn_nothing_twice(
    noida: str, tmp_path: Path, kills: int, total: int, partitions: int
) -> None:
    topic = new_topic(noida, partitions)
    values = []
    for n in range(total):
        shown = sr.Impression(f"i{n}", 1000.0 + n, f"u{n % 97}", f"p{n % 13}", {"tags": [str(n % 5)]})
        event = sr.Labeled(shown, float(n % 7 == 0))
        values.append((n % partitions, encode_event(event)))
    send(noida, topic, values)
    built: dict[str, Any] = {"__name__": "built"}
    exec(CHILD, built)  # noqa: S102
    with Kafka(topic, noida) as source:
        whole = built["trainer"](str(tmp_path / "whole")).run(source)
    assert whole.counts["learned"] == total

    store = tmp_path / "store"

    def newest() -> int:
        return max((int(path.stem) for path in (store / "checkpoints").glob("*.json")), default=0)

    command = [sys.executable, "-c", CHILD, topic, noida, str(store), str(total), "nursery"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as nursery:
        assert nursery.stdin is not None and nursery.stdout is not None

        def told(word: str) -> int:
            assert nursery.stdout is not None
            for line in nursery.stdout:
                if line.startswith(word):
                    return int(line.split()[1])
            raise AssertionError("the nursery has ended")

        for number in range(kills):
            rng = random.Random(number)
            before = newest()
            print("patient", file=nursery.stdin)
            pid = told("pid")
            # after the first, the second or the third checkpoint, and a while: amid a batch or amid a write
            wait_until(lambda: newest() >= before + 1 + number % 3)  # noqa: B023
            time.sleep(rng.uniform(0.0, 0.1))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it was at the end before, on a fast machine
                assert number and told("code") == 0
                break
            assert told("code") == -signal.SIGKILL
        print("hasty", file=nursery.stdin)
        assert told("code") == 0

    found, other = sr.Store(store).checkpoints.read(), sr.Store(tmp_path / "whole").checkpoints.read()
    assert found is not None and other is not None
    assert found[1]["position"] == {topic: {str(n): total // partitions for n in range(partitions)}}
    trainer = built["trainer"](str(store))
    trainer.resume()
    report = trainer.report()
    assert report.counts == whole.counts, "nothing lost, nothing twice: Dedup, which forgets nothing here, saw none"
    assert report.counts["duplicate"] == 0
    assert report.metrics["CTR"] == whole.metrics["CTR"]
    if partitions == 1:  # then the order is given, and with it every bit
        alone = built["trainer"](str(tmp_path / "whole"))
        alone.resume()
        assert first_difference(trainer.model.state_dict(), alone.model.state_dict()) is None
        assert first_difference(trainer.validation.state_dict(), alone.validation.state_dict()) is None
