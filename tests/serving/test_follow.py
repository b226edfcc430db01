"""A scorer that follows a trainer: by changes where it can, and never a request that sees half of one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.preprocessors import encode
from streamrec.storage import Shelf
from streamrec.testing._state import first_difference

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price", standardize=True))
USERS = 2_000


def labeled(number: int, user: int) -> sr.Labeled:
    shown = sr.Impression(f"i{number}", 1.7e9 + number, f"u{user}", f"p{number % 50}", {"price": 1.0 + number % 7})
    return sr.Labeled(shown, float(number % 3 == 0))


IMPRESSIONS = [labeled(n, n * 31 % USERS).impression for n in range(200)]


class Followed:
    """A trainer with so many users that a few events change little of it, and what was read of its store."""

    def __init__(self, uri: str | Path, monkeypatch: pytest.MonkeyPatch, keep: int = 50) -> None:
        self.store = sr.Store(uri, keep=keep)
        self.trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=self.store)
        self.trainer.push([labeled(n, n) for n in range(USERS)])
        self.trainer.publish()
        self.whole = 0
        read = Shelf.read

        def counted(shelf: Shelf, number: int | None = None) -> Any:
            self.whole += 1
            return read(shelf, number)

        monkeypatch.setattr(Shelf, "read", counted)

    def publish(self, number: int) -> bytes:
        """Learn a few more events, some of users never seen; return the scores of now."""
        begin = 1_000_000 * (number + 1)
        self.trainer.push([labeled(begin + n, (number * 17 + n) % (USERS + 5 * number)) for n in range(20)])
        self.trainer.publish()
        return self.scores()

    def scores(self) -> bytes:
        return self.trainer.model.predict(encode(SCHEMA, IMPRESSIONS).batch).tobytes()


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Followed:
    return Followed(tmp_path / "ctr", monkeypatch)


def test_it_reads_the_whole_twice_and_then_changes_alone(followed: Followed) -> None:
    scorer = sr.Scorer(followed.store)
    for number in range(12):
        expected = followed.publish(number)
        assert scorer.refresh() is True
        assert scorer.score(IMPRESSIONS).tobytes() == expected
        assert not scorer.refresh()
    assert followed.whole == 2
    # the model that was brought up to date is the one that was read whole, in all that it holds
    fresh = sr.Scorer(followed.store)._serving.model
    assert first_difference(fresh.state_dict(), scorer._serving.model.state_dict()) is None


def test_a_scorer_that_fell_behind_catches_up(followed: Followed) -> None:
    scorer = sr.Scorer(followed.store)
    for number in range(9):
        expected = followed.publish(number)
        if number % 3 == 2:
            assert scorer.refresh()
            assert scorer.score(IMPRESSIONS).tobytes() == expected
    assert followed.whole == 2


def test_a_gap_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = Followed(tmp_path / "ctr", monkeypatch)
    scorer = sr.Scorer(followed.store)
    for number in range(3):
        followed.publish(number)
        scorer.refresh()
    for number in range(3, 40):  # compaction goes over the version that is served
        followed.publish(number)
    before = followed.whole
    assert followed.store.versions.changes_since(scorer.version.number) is None
    assert scorer.refresh() and followed.whole == before + 1
    assert scorer.score(IMPRESSIONS).tobytes() == followed.scores()
    expected = followed.publish(40)
    assert scorer.refresh() and scorer.score(IMPRESSIONS).tobytes() == expected


def test_another_trainer_on_the_same_store_is_read_whole(followed: Followed) -> None:
    scorer = sr.Scorer(followed.store)
    for number in range(3):
        followed.publish(number)
        scorer.refresh()
    other = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=followed.store)
    other.push([labeled(n, n) for n in range(100)])
    other.publish()
    assert scorer.refresh()
    assert scorer.score(IMPRESSIONS).tobytes() == other.model.predict(encode(SCHEMA, IMPRESSIONS).batch).tobytes()


def test_a_model_that_a_request_still_reads_is_left_alone(followed: Followed) -> None:
    scorer = sr.Scorer(followed.store)
    for number in range(3):
        followed.publish(number)
        scorer.refresh()
    whole = followed.whole
    request = scorer._serving  # what each request holds until it is answered
    expected = scorer.score(IMPRESSIONS).tobytes()
    for number in range(3, 6):
        followed.publish(number)
        assert scorer.refresh()
        assert request.model.predict(request.encoder(IMPRESSIONS).batch).tobytes() == expected
    assert followed.whole == whole + 1  # the first refresh had another model to bring up to date, the second had none
    assert scorer.score(IMPRESSIONS).tobytes() == followed.scores()


def test_changes_that_do_not_fit_are_raised_once_and_then_read_whole(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = sr.Scorer(followed.store)
    for number in range(3):
        expected = followed.publish(number)
        scorer.refresh()

    def broken(self: sr.FM, changes: Any) -> None:
        raise sr.StoreError("the changes belong to another state")

    newest = followed.publish(3)
    with monkeypatch.context() as patch:
        patch.setattr(sr.FM, "load_changes", broken)
        with pytest.raises(sr.StoreError, match="belong to another state"):
            scorer.refresh()
    assert scorer.score(IMPRESSIONS).tobytes() == expected
    assert scorer.refresh() and scorer.score(IMPRESSIONS).tobytes() == newest


def test_requests_in_threads_see_one_version_each(followed: Followed) -> None:
    known = {followed.scores()}
    scorer = sr.Scorer(followed.store)
    scorer.set_catalogue([f"p{n}" for n in range(50)])
    seen: list[bytes] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                seen.append(scorer.score(IMPRESSIONS).tobytes())
                ranked = scorer.retrieve(user="u1", k=10, features={"price": 2.0})
                assert len(ranked) == 10 and np.isfinite([one.score for one in ranked]).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        known.add(followed.publish(number))
        scorer.refresh()
        count = len(seen)
        while len(seen) < count + 3 and not errors:
            done.wait(0.001)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(seen) <= known and len(set(seen)) > 10
    assert scorer.score(IMPRESSIONS).tobytes() == followed.scores()
