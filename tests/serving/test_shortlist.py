"""Scorer.shortlist: the ranking of the names, without looking them up; right for every catalogue."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.serving import Shortlist

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price"))
NAMES = itertools.count()


def shown(n: int) -> sr.Labeled:
    return sr.Labeled(sr.Impression(f"i{n}", float(n), f"u{n % 5}", f"p{n % 40}", {"price": n % 7}), float(n % 3 == 0))


def trained() -> sr.OnlineTrainer:
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=f"memory://test-shortlist/{next(NAMES)}")
    trainer.push([shown(n) for n in range(300)])
    trainer.publish()
    return trainer


def scorer_of(trainer: sr.OnlineTrainer) -> sr.Scorer:
    assert trainer.store is not None
    return sr.Scorer(trainer.store)


CATALOGUE: list[Any] = [sr.Candidate(f"p{n}", {"price": float(n)}) for n in range(40)]
SOME = ["p7", "p3", "p39", "p3", *(f"p{n}" for n in range(10, 35))]


@pytest.mark.parametrize("names", [SOME, ["p4"], []])
@pytest.mark.parametrize("k", [0, 1, 3, 1000, None])
def test_it_ranks_as_its_names_do(names: list[str], k: int | None) -> None:
    scorer = scorer_of(trained())
    scorer.set_catalogue(CATALOGUE)
    for features in (None, {"price": 3.0, "other": 1}):
        asked: dict[str, Any] = {"user": "u1", "k": k, "features": features}
        assert scorer.rank(candidates=scorer.shortlist(names), **asked) == scorer.rank(candidates=names, **asked)


def test_it_outlives_a_refresh() -> None:
    trainer = trained()
    scorer = scorer_of(trainer)
    scorer.set_catalogue(CATALOGUE)
    shortlist = scorer.shortlist(SOME)
    before = scorer.rank(user="u1", candidates=shortlist)
    trainer.push([shown(7 * n) for n in range(100)])
    trainer.publish()
    assert scorer.refresh()
    after = scorer.rank(user="u1", candidates=shortlist)
    assert after == scorer.rank(user="u1", candidates=SOME) and after != before
    serving = scorer._serving.catalogue
    assert serving is not None and serving.find(shortlist) is shortlist.places  # nothing is looked up again


def test_after_another_catalogue_and_in_another_scorer_it_is_its_names() -> None:
    trainer = trained()
    scorer, other = scorer_of(trainer), scorer_of(trainer)
    scorer.set_catalogue(CATALOGUE)
    shortlist = scorer.shortlist(SOME)
    expected = scorer.rank(user="u1", candidates=shortlist)
    scorer.set_catalogue(CATALOGUE[::-1])
    assert scorer.rank(user="u1", candidates=shortlist) == expected
    scorer.set_catalogue(CATALOGUE[:20])  # some are not in it
    assert scorer.rank(user="u1", candidates=shortlist) == scorer.rank(user="u1", candidates=SOME)
    assert other.rank(user="u1", candidates=shortlist) == other.rank(user="u1", candidates=SOME)


def test_it_is_a_sequence_of_names() -> None:
    scorer = scorer_of(trained())
    scorer.set_catalogue(CATALOGUE)
    shortlist = scorer.shortlist(name for name in SOME)
    assert list(shortlist) == SOME and len(shortlist) == len(SOME) and shortlist[1] == "p3" and "p39" in shortlist
    assert shortlist.places.dtype == np.int64 and shortlist.places.tolist() == [int(name[1:]) for name in SOME]
    part = shortlist[1::2]
    assert isinstance(part, Shortlist) and list(part) == SOME[1::2]
    assert scorer.rank(user="u1", candidates=part) == scorer.rank(user="u1", candidates=SOME[1::2])
    assert repr(part) == "Shortlist(14 items: 'p3', 'p3', 'p11', ...)" and repr(part[:1]) == "Shortlist(1 items: 'p3')"


def test_mistakes_name_the_item_and_the_cure() -> None:
    scorer = scorer_of(trained())
    with pytest.raises(
        sr.ConfigError, match=r"no catalogue to look items up in: call set_catalogue\(candidates\) first"
    ):
        scorer.shortlist(["p1"])
    scorer.set_catalogue(CATALOGUE)
    with pytest.raises(sr.ConfigError, match="'p77' is not in the catalogue: leave it out, or set a catalogue"):
        scorer.shortlist(["p1", "p77", "p78"])
    with pytest.raises(sr.ConfigError, match=r"takes several items, got the one text 'p1'; pass \['p1'\]"):
        scorer.shortlist("p1")
