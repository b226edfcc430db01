"""A scorer in a service: over HTTP, ready or not, stale or not, and what survives the faults of its store."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import streamrec as sr
from streamrec.serving import Follower
from streamrec.storage import DamagedWarning

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price", standardize=True))
SHOWN = [sr.Impression(f"i{n}", float(n), f"u{n % 300}", f"p{n % 20}", {"price": 1.0 + n % 7}) for n in range(3000)]


class Published:
    """A trainer whose versions are mostly changes, for a few events change little of it."""

    def __init__(self, folder: Path, keep: int = 20) -> None:
        self.store = sr.Store(folder, keep=keep, clock=lambda: 1000.0)
        self.trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=self.store, background=False)
        self.trainer.push([sr.Labeled(one, float(n % 3 == 0)) for n, one in enumerate(SHOWN)])
        self.trainer.publish()
        self.begin = 0

    def another(self) -> sr.storage.Version:
        """Other rows than the versions before: so that one that is left out shows."""
        self.trainer.push([sr.Labeled(one, 1.0) for one in SHOWN[self.begin : self.begin + 8]])
        self.begin = (self.begin + 8) % 48
        return self.trainer.publish()

    def scores(self) -> bytes:
        return self.trainer.model.predict(self.trainer._encoder(SHOWN[:50])[0]).tobytes()


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path / "ctr")


def until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it has not come to that within 30 seconds")


def test_requests_over_http_are_answered_by_one_version_each_while_versions_are_swapped(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    from benchmarks.serving import Answer, ask, publish, requests, wrong
    from examples.ranking_service import make_app, served

    started, ended = threading.Event(), threading.Event()
    publisher = threading.Thread(target=publish, args=(str(tmp_path), 0.1, started, ended), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.serving.USERS", 2000)
        publisher.start()
        started.wait()
        asked = requests(16)
        follower = Follower(sr.Scorer(tmp_path), every=0.02)
        answers: list[Answer] = []
        with served(make_app(follower)) as address:
            for _ in range(100):  # on a slow machine until there were swaps enough
                answers += asyncio.run(ask(int(address.rsplit(":", 1)[1]), asked, 8, 0.5))
                if len({one.version for one in answers}) > 4:
                    break
            ended.set()
            publisher.join()
    assert wrong(answers, asked, sr.Store(tmp_path, keep=1000)) == (0, 0)
    assert len({one.version for one in answers}) > 4


def test_a_view_answers_by_its_version_whatever_is_swapped_in(published: Published) -> None:
    scorer = sr.Scorer(published.store)
    scorer.set_catalogue(["p1", "p2", "p3"])
    view = scorer.view()
    asked = {"user": "u1", "features": {"price": 2.0}}

    def answers() -> list[object]:
        ranked = view.rank(candidates=["p1", "p9"], **asked)
        return [view.version.number, view.score(SHOWN[:50]).tobytes(), ranked, view.retrieve(k=2, **asked)]

    before = answers()
    for _ in range(3):
        published.another()
        assert scorer.refresh()
    assert answers() == before and scorer.version.number == 4
    assert scorer.score(SHOWN[:50]).tobytes() == published.scores() != before[1]


def test_models_of_versions_that_nobody_reads_are_freed(published: Published) -> None:
    scorer = sr.Scorer(published.store)
    seen = []
    for _ in range(8):
        seen.append(weakref.ref(scorer.view()._serving.model))
        held = scorer.view()  # a request that is slow
        published.another()
        scorer.refresh()
        del held
    gc.collect()
    assert len({id(model) for model in (one() for one in seen) if model is not None}) <= 2  # the one served, a spare


def test_it_is_ready_when_there_is_a_version_and_stale_when_the_store_is_silent(tmp_path: Path) -> None:
    place, now = tmp_path / "ctr", [5_000.0]
    follower = Follower(
        lambda: sr.Scorer(sr.Store(place, clock=lambda: 1060.0), clock=lambda: now[0]), every=0.01, stale_after=30.0
    )
    with follower:
        until(lambda: follower._error is not None)
        assert not follower.ready and follower.status() is None
        with pytest.raises(sr.StoreError, match="no version to serve yet: nothing is published"):
            follower.scorer.version  # noqa: B018
        published = Published(place)
        until(lambda: follower.ready)
        status = follower.status()
        assert status is not None and (status.version, status.age, status.failed) == (1, 60.0, 0)
        # the store is gone, for a minute, which is longer than is fresh enough, and comes back
        before = follower.scorer.score(SHOWN[:50]).tobytes()
        shutil.move(place / "versions", tmp_path / "gone")
        (place / "versions").write_text("no folder")
        until(lambda: follower.scorer.status().failed > 0)
        assert follower.ready, "for a second, an old version will do"
        now[0] += 60.0
        assert not follower.ready
        status = follower.status()
        assert status is not None and status.looked == 60.0 and "Not a directory" in str(status.error)
        assert follower.scorer.score(SHOWN[:50]).tobytes() == before
        (place / "versions").unlink()
        shutil.move(tmp_path / "gone", place / "versions")
        published.another()
        until(lambda: follower.ready and follower.scorer.version.number == 2)
        assert follower.scorer.score(SHOWN[:50]).tobytes() == published.scores()


def test_a_clock_that_jumps_moves_ages_and_nothing_else(tmp_path: Path) -> None:
    now = [1e9]
    store = sr.Store(tmp_path, clock=lambda: now[0])
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=store)
    trainer.publish()
    follower = Follower(sr.Scorer(store), every=0.01, stale_after=30.0)
    for jump in (-5e8, 9e9, 0.0):  # back by years, forward by centuries, to 1970
        now[0] = jump if not jump else now[0] + jump
        number = trainer.publish().number
        assert follower.scorer.refresh() and follower.scorer.version.number == number
        assert follower.ready and follower.scorer.status().age == 0.0
        now[0] -= 1e6
        assert follower.scorer.status().age == 0.0


def test_a_gap_in_the_changes_is_read_whole(published: Published) -> None:
    scorer = sr.Scorer(published.store)
    published.another()
    scorer.refresh()
    for _ in range(3):
        published.another()
    published.trainer._saver.forget()
    published.another()  # whole, after changes that this scorer has never seen
    versions = published.store.versions
    assert versions.list()[-1].base is None and versions.changes_since(2) is None
    assert scorer.refresh() and scorer.score(SHOWN[:50]).tobytes() == published.scores()


def test_damaged_changes_leave_the_newest_good_version_and_are_not_read_again_and_again(published: Published) -> None:
    scorer = sr.Scorer(published.store)
    published.another()
    scorer.refresh()
    published.another()
    good = published.scores()
    number = published.another().number
    (damaged,) = Path(published.store.versions.uri).glob(f"{number:010d}-*.safetensors")
    os.truncate(damaged, damaged.stat().st_size - 1)
    with pytest.warns(DamagedWarning, match="version 3 is used instead"):
        assert scorer.refresh()
    assert scorer.version.number == 3 and scorer.score(SHOWN[:50]).tobytes() == good
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not scorer.refresh()  # it learns that there is nothing newer that is good,
        told.clear()
        assert not scorer.refresh() and told == []  # and asks no more
    published.trainer._saver.forget()
    published.another()
    assert scorer.refresh() and scorer.version.number == 5
    assert scorer.score(SHOWN[:50]).tobytes() == published.scores()


def test_pinned_versions_come_as_changes_too_and_those_after_them_fit(published: Published) -> None:
    scorer = sr.Scorer(published.store)
    for _ in range(2):
        published.another()
        scorer.refresh()
    scores = {}
    for _ in range(3):
        number = published.another().number
        scores[number] = published.scores()
    served = published.store.served
    for number in (5, 4, 6):  # forward, back, forward
        served.pin(number, why="a try")
        assert scorer.refresh() and scorer.version.number == number
        assert scorer.score(SHOWN[:50]).tobytes() == scores[number]
    served.follow(why="done")
    published.another()
    assert scorer.refresh() and scorer.score(SHOWN[:50]).tobytes() == published.scores()


KILLED = """
import os, sys, threading
import streamrec as sr
from streamrec.models import FM
scorer = sr.Scorer(sys.argv[1])
apply = FM.load_changes
def slow(self, changes):
    apply(self, changes)
    print("half way", flush=True)
    threading.Event().wait()
FM.load_changes = slow
print("ready", flush=True)
for _ in sys.stdin:
    scorer.refresh()
"""


def test_a_scorer_that_is_killed_during_a_swap_harms_nobody(published: Published) -> None:
    uri = published.store.uri
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):  # the first makes its second model
            published.another()
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline() == "half way\n"
        process.kill()
    before = sorted(os.listdir(f"{uri}/versions"))
    scorer = sr.Scorer(uri)
    assert scorer.score(SHOWN[:50]).tobytes() == published.scores()
    published.another()
    assert scorer.refresh() and scorer.score(SHOWN[:50]).tobytes() == published.scores()
    assert set(before) <= set(os.listdir(f"{uri}/versions"))


def test_what_cannot_work_is_refused(published: Published) -> None:
    scorer = sr.Scorer(published.store)
    with pytest.raises(sr.ConfigError, match="every must be > 0"):
        Follower(scorer, every=0.0)
    with pytest.raises(sr.ConfigError, match=r"stale_after must be longer than every=1\.0"):
        Follower(scorer, every=1.0, stale_after=0.5)
