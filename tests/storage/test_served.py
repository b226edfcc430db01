"""Which version is served: the newest, until somebody decides otherwise; and never one that is gone."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

import streamrec as sr
from streamrec.storage import Decision, Store

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))
_memory = itertools.count()


@pytest.fixture(params=["path", "memory://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "store") if request.param == "path" else f"memory://test-served-{next(_memory)}"
    return Store(uri, keep=2, clock=lambda: 5.0)


def publish(store: Store, times: int) -> None:
    for _ in range(times):
        store.versions.write({"bias": np.zeros(1)}, {"metrics": {"AUC": 0.7}})


def numbers(store: Store) -> list[int]:
    return [version.number for version in store.versions.list()]


def test_the_newest_until_decided_otherwise(store: Store) -> None:
    assert store.served.version() is None and store.served.history() == []
    publish(store, 2)
    assert store.served.version() == 2
    store.served.rollback(why="worse")
    publish(store, 1)
    assert store.served.version() == 1
    store.served.follow(why="better")
    assert store.served.version() == 3
    assert store.served.history() == [Decision(1, "worse", 5.0), Decision(None, "better", 5.0)]
    assert Store(store.uri).served.version() == 3  # it is the store that knows


def test_what_is_served_and_what_was_before_are_never_removed(store: Store) -> None:
    publish(store, 2)
    store.served.pin(1, why="trusted")
    publish(store, 5)
    assert numbers(store) == [1, 2, 6, 7]  # 2 was served before
    store.served.pin(6, why="newer")
    publish(store, 3)
    assert numbers(store) == [1, 6, 9, 10]
    store.served.rollback(to=1, why="back")
    store.served.follow(why="done")
    publish(store, 2)
    assert numbers(store) == [1, 11, 12]
    publish(store, 1)
    assert store.served.version() == 13


def test_a_pinned_version_that_is_changes_keeps_what_it_is_made_of(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=store, background=False)
    shown = [sr.Impression(f"i{n}", float(n), f"u{n % 300}", f"p{n % 7}") for n in range(3000)]
    trainer.push([sr.Labeled(one, float(n % 3 == 0)) for n, one in enumerate(shown)])
    trainer.publish()
    for n in range(6):
        trainer.push([sr.Labeled(shown[n], 1.0)])
        version = trainer.publish()
        if n == 2:
            store.served.pin(version.number, why="this one")
            expected = trainer.model.predict(trainer._encoder(shown[:50])[0])
    assert version.base is not None
    scorer = sr.Scorer(store)
    assert scorer.version.number == store.served.pinned() == 4
    assert (scorer.score(shown[:50]) == expected).all()


def test_scorers_go_where_they_are_told(tmp_path: Path) -> None:
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=Store(tmp_path, keep=3), background=False)
    shown = [sr.Impression(f"i{n}", float(n), f"u{n % 5}", f"p{n % 7}") for n in range(60)]
    scores = []
    for n in range(3):
        trainer.push([sr.Labeled(one, float(n % 2)) for one in shown])
        trainer.publish()
        scores.append(trainer.model.predict(trainer._encoder(shown)[0]))
    scorer = sr.Scorer(tmp_path)
    scorer.set_catalogue([f"p{n}" for n in range(7)])
    told = Store(tmp_path).served
    told.rollback(why="worse than yesterday")
    assert scorer.refresh() and scorer.version.number == 2 and (scorer.score(shown) == scores[1]).all()
    assert len(scorer.retrieve(user="u1", k=3)) == 3
    assert not scorer.refresh()
    trainer.push([sr.Labeled(shown[0], 1.0)])
    trainer.publish()
    assert not scorer.refresh()  # what is published meanwhile is not served
    told.follow(why="mended")
    assert scorer.refresh() and scorer.version.number == 4
    told.pin(2, why="after all")
    assert sr.Scorer(tmp_path).version.number == 2


def test_a_damaged_version_that_was_decided_for_is_an_error_and_the_old_one_serves_on(tmp_path: Path) -> None:
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=tmp_path)
    for _ in range(2):
        trainer.publish()
    scorer = sr.Scorer(tmp_path)
    (damaged,) = (tmp_path / "versions").glob("0000000001-*.safetensors")
    os.truncate(damaged, 10)
    Store(tmp_path).served.pin(1, why="a try")
    with pytest.raises(sr.DamagedError, match="bytes of"):
        scorer.refresh()
    assert scorer.version.number == 2


def test_what_cannot_be_decided(store: Store) -> None:
    with pytest.raises(sr.StoreError, match="no version 7 to serve; there are none"):
        store.served.pin(7, why="lucky")
    with pytest.raises(sr.StoreError, match="no version before None"):
        store.served.rollback(why="worse")
    publish(store, 1)
    with pytest.raises(sr.StoreError, match="no version before 1"):
        store.served.rollback(why="worse")
    with pytest.raises(sr.ConfigError, match="why"):
        store.served.pin(1, why=" ")
    assert store.served.history() == []
