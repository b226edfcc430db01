"""No request waits for a compiler: what is compiled is compiled when a scorer is made, whatever the cache is like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import streamrec as sr

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("genres"), sr.Number("price", standardize=True))

# A service in a process of its own. It prints how much was compiled or loaded by the time the scorer was made, and
# how much its first requests added.
SERVICE = """
import gc, sys
import numba
from numba.core import event
from numba.core.dispatcher import Dispatcher
import streamrec as sr

def loaded():
    return sum(len(one.signatures) for one in gc.get_objects() if isinstance(one, Dispatcher))

store = sys.argv[1]
scorer = sr.Scorer(store)
before = loaded()
with event.install_recorder("numba:compile") as compiled:
    shown = [sr.Impression("i", 0.0, "u1", "p1", {"genres": ["a", "b"], "price": 2.0}), sr.Impression("i", 0.0, "", "")]
    scorer.score(shown)
    scorer.score(shown[1:])
    few = ["p1", sr.Candidate("p2", {"genres": ["a"]}), sr.Candidate("p3", {"price": 1.0})]
    scorer.rank(user="u1", candidates=few, k=1, features={"price": 3.0})
    scorer.set_catalogue([sr.Candidate(f"p{n}", {"genres": [f"g{n % 7}"]}) for n in range(600)])
    names = [f"p{n}" for n in range(100)]
    scorer.rank(user="u1", candidates=names, k=3, features={"price": 3.0})
    scorer.rank(user="u1", candidates=names)
    scorer.rank(user="u1", candidates=few)
    scorer.rank(user="u1", candidates=scorer.shortlist(names), k=3)
    for k in (3, None):
        scorer.retrieve(user="u1", k=k)
        scorer.retrieve(user="u1", k=k, exclude=["p3"], features={"price": 1.0})
print(before, loaded() - before, len(compiled.buffer))
"""


def served(store: Path, cache: str) -> list[int]:
    """What the service says: functions loaded before its first request, functions loaded and compiled by requests."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", SERVICE, str(store)],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=tmp_path / "store")
    trainer.push([sr.Labeled(sr.Impression(f"i{n}", float(n), "u1", f"p{n % 9}"), float(n % 2)) for n in range(50)])
    trainer.publish()
    return tmp_path / "store"


def test_no_request_compiles_with_an_empty_cache_nor_with_a_full_one(store: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"  # missing, the first time
    for _ in range(2):
        loaded, by_requests, compiled = served(store, str(cache))
        assert loaded > 10 and by_requests == 0 and compiled == 0
    assert any(cache.rglob("*.nbi"))


def test_a_cache_that_cannot_be_written_is_done_without(store: Path) -> None:
    loaded, by_requests, compiled = served(store, "/dev/null/cache")  # not even root makes a folder there
    assert loaded > 10 and by_requests == 0 and compiled == 0
