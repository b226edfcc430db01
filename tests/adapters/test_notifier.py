"""A scorer that hears of new versions over Kafka."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("aiokafka")

import streamrec as sr
from streamrec.errors import ConfigError
from streamrec.serving import StoreNotifier
from tests.kafka.broker import free_port, new_topic, send, wait_until


def make(store: Path) -> sr.OnlineTrainer:
    trainer = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4), store=store)
    trainer.push([sr.Labeled(sr.Impression("i1", 1.0, "u1", "p1"), 1.0)])
    trainer.publish()
    return trainer


def test_a_scorer_refreshes_when_it_is_told(noida: str, tmp_path: Path) -> None:
    topic, trainer = new_topic(noida), make(tmp_path)
    scorer = sr.Scorer(tmp_path)
    notifier = StoreNotifier(scorer, topic, noida, every=3600.0)
    with notifier:
        notifier.start(wait=60.0)
        for number in (2, 3):
            trainer.publish()
            send(noida, topic, [(0, b'{"store": "anywhere", "version": 0}')])
            wait_until(lambda: scorer.version.number == number)  # noqa: B023
        send(noida, topic, [(0, b"\x00 not for us")])
        wait_until(lambda: notifier.counts["notices"] == 3)
    assert scorer.version.number == 3 and notifier.counts.get("failed", 0) == 0
    notifier.close()


def test_without_a_broker_it_looks_by_itself(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    scorer = sr.Scorer(tmp_path)
    with StoreNotifier(scorer, "notices", f"127.0.0.1:{free_port()}", every=0.2) as notifier:
        trainer.publish()
        wait_until(lambda: scorer.version.number == 2)
    assert notifier.counts["unheard"] >= 1
    with pytest.raises(ConfigError, match="every must be > 0 seconds"):
        StoreNotifier(scorer, "notices", "127.0.0.1:9", every=0.0)
