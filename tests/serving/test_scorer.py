"""Scorer: what the trainer's model says, of one version at a time, in the order of the best."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.preprocessors import encode
from streamrec.storage import DamagedWarning
from streamrec.testing._state import copy_state, first_difference

SCHEMA = sr.Schema(
    sr.Id("user"), sr.Id("item"), sr.Id("device"), sr.Ids("genres"), sr.Number("price", standardize=True)
)


def shown(number: int, **features: Any) -> sr.Impression:
    known = {"genres": ["abc"[number % 3]], "price": 1.0 + number % 11, "device": "tv" if number % 4 else "phone"}
    return sr.Impression(f"i{number}", 1.7e9 + number, f"u{number % 6}", f"p{number % 10}", {**known, **features})


def labeled(number: int) -> sr.Labeled:
    return sr.Labeled(shown(number), float((number * 7) % 10 < number % 6))


def trained(uri: str | Path, count: int = 300, **changed: Any) -> sr.OnlineTrainer:
    trainer = sr.OnlineTrainer(**{"model": sr.FM(SCHEMA, dim=4), "store": uri, **changed})
    trainer.push([labeled(n) for n in range(count)])
    trainer.publish()
    return trainer


def bits(scores: Any) -> bytes:
    return np.asarray(scores, dtype=np.float32).tobytes()


IMPRESSIONS = [shown(n) for n in range(1000, 1060)]


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_scores_are_those_of_the_trainer_s_model(where: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "ctr") if where == "folder" else "memory://test-scorer/scores"
    trainer = trained(uri)
    expected = trainer.model.predict(encode(SCHEMA, IMPRESSIONS).batch)
    for scorer in (sr.Scorer(uri), sr.Scorer(sr.Store(uri))):
        scores = scorer.score(IMPRESSIONS)
        assert scores.dtype == np.float32 and scores.shape == (60,)
        assert len(set(scores.tolist())) > 30  # it has learned something to tell them apart by
        assert bits(scores) == bits(expected)
        assert bits([scorer.score([one])[0] for one in IMPRESSIONS]) == bits(expected)
    # and those the trainer gives
    assert bits(trainer.push(IMPRESSIONS)) == bits(expected)
    if where == "folder":
        assert bits(sr.Scorer(tmp_path / "ctr").score(IMPRESSIONS)) == bits(expected)


def test_scoring_changes_nothing() -> None:
    trained("memory://test-scorer/reads")
    scorer = sr.Scorer("memory://test-scorer/reads")
    before = copy_state(scorer._serving.model.state_dict())
    first = scorer.score(IMPRESSIONS)
    scorer.rank(user="new", candidates=["p1", "never seen"])
    assert first_difference(before, copy_state(scorer._serving.model.state_dict())) is None
    assert bits(scorer.score(IMPRESSIONS)) == bits(first)
    assert scorer.score([]).shape == (0,)


def test_rank_gives_the_best_first_with_the_features_of_each() -> None:
    trained("memory://test-scorer/rank")
    scorer = sr.Scorer("memory://test-scorer/rank")
    own = {"p1": {"price": 3.0}, "p2": {"device": "tv"}, "p3": {}, "p4": {"genres": ["a"]}}
    candidates = [*(sr.Candidate(item, features) for item, features in own.items()), "p5", "p6"]
    shared = {"device": "phone", "price": 7.0}
    ranked = scorer.rank(user="u5", candidates=candidates, features=shared)

    alone = {
        item: float(scorer.score([sr.Impression("", 0.0, "u5", item, {**shared, **own.get(item, {})})])[0])
        for item in [*own, "p5", "p6"]
    }
    # what the candidates share is added in another order than in score: to float32's rounding
    expected = sorted(alone.items(), key=lambda one: -one[1])
    assert [one.item for one in ranked] == [item for item, _ in expected]
    assert [one.score for one in ranked] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert all(isinstance(one, sr.Ranked) and type(one.score) is float for one in ranked)
    assert len({one.score for one in ranked}) == 6
    for k in range(8):
        assert scorer.rank(user="u5", candidates=candidates, features=shared, k=k) == ranked[:k]
    assert scorer.rank(user="u5", candidates=[]) == []
    assert shared == {"device": "phone", "price": 7.0}
    with pytest.raises(sr.ConfigError, match="k must be >= 0, got -1"):
        scorer.rank(user="u5", candidates=candidates, k=-1)


def test_ties_stay_in_the_order_given() -> None:
    trained("memory://test-scorer/ties")
    scorer = sr.Scorer("memory://test-scorer/ties")
    candidates = ["p9", "p3", "p9", "p3", "p9"]
    numbered = [sr.Candidate(item, {"place": n}) for n, item in enumerate(candidates)]  # "place" is in no schema
    ranked = scorer.rank(user="u1", candidates=numbered)
    assert [one.item for one in ranked] in (["p9"] * 3 + ["p3"] * 2, ["p3"] * 2 + ["p9"] * 3)
    flat = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("device")), dim=0), store="memory://test-scorer/flat")
    flat.push([labeled(n) for n in range(50)])
    flat.publish()  # a model to which all items are one
    order = [f"p{(7 * n) % 23}" for n in range(23)]
    assert [one.item for one in sr.Scorer("memory://test-scorer/flat").rank(user="u", candidates=order)] == order
    top = sr.Scorer("memory://test-scorer/flat").rank(user="u", candidates=order, k=5)
    assert [one.item for one in top] == order[:5]


def test_what_is_unknown_or_unusable_is_scored_and_counted() -> None:
    trained("memory://test-scorer/unknown")
    scorer = sr.Scorer("memory://test-scorer/unknown")
    plain = sr.Impression("", 0.0, "nobody", "nothing")
    odd = [
        plain,
        sr.Impression("", 0.0, "", "", {"genres": None, "price": None, "device": None}),
        sr.Impression("", math.nan, "u" * 100_000, "p1", {"unheard": object()}),
        shown(1, price=math.nan),
        shown(2, price="cheap", genres=7),
        shown(3, device=3.5, genres=["a", 2.5]),
        shown(4, genres=[str(n) for n in range(5_000)]),
    ]
    assert scorer.counts == {}
    scores = scorer.score(odd)
    assert np.isfinite(scores).all() and ((scores > 0) & (scores < 1)).all()
    assert scorer.counts == {"price": 2, "genres": 3, "device": 1}
    scorer.rank(user="u1", candidates=["p1", "p2"], features={"price": math.inf})
    assert scorer.counts["price"] == 4


def test_refresh_serves_the_newest_version() -> None:
    uri = "memory://test-scorer/refresh"
    trainer = trained(uri)
    scorer = sr.Scorer(uri)
    first = scorer.score(IMPRESSIONS)
    assert scorer.version.number == 1 and scorer.version.info["events"] == 300
    assert scorer.refresh() is False

    trainer.push([labeled(n) for n in range(300, 400)])
    assert scorer.refresh() is False
    trainer.publish()
    assert bits(scorer.score(IMPRESSIONS)) == bits(first)  # until it is told to
    assert scorer.refresh() is True and scorer.version.number == 2
    assert bits(scorer.score(IMPRESSIONS)) == bits(trainer.model.predict(encode(SCHEMA, IMPRESSIONS).batch))
    assert bits(scorer.score(IMPRESSIONS)) != bits(first)
    assert scorer.refresh() is False


def test_a_request_sees_one_version_whole_while_others_are_swapped_in() -> None:
    uri = "memory://test-scorer/threads"
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store=sr.Store(uri, keep=50))
    known = set()
    versions = 20

    def publish(number: int) -> None:
        trainer.push([labeled(n) for n in range(50 * number, 50 * number + 50)])
        known.add(bits(trainer.model.predict(encode(SCHEMA, IMPRESSIONS).batch)))
        trainer.publish()

    publish(0)
    scorer = sr.Scorer(uri)
    seen: list[bytes] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work(refreshing: bool) -> None:
        try:
            while not done.is_set() or not seen:
                if refreshing:
                    scorer.refresh()
                seen.append(bits(scorer.score(IMPRESSIONS)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place > 0,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, versions):
        publish(number)
        count = len(seen)
        while len(seen) < count + 2 and not errors:  # let the others have a look at each
            done.wait(0.001)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(known) == versions and set(seen) <= known and len(set(seen)) > 1
    scorer.refresh()
    assert scorer.version.number == versions


def test_nothing_published_is_said_with_the_cure(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "none"), "memory://test-scorer/none"):
        with pytest.raises(sr.StoreError, match=r"nothing is published in .*none: run a trainer on it first"):
            sr.Scorer(uri)
    assert list(tmp_path.iterdir()) == []


def damage(store: Path) -> None:
    newest = max((store / "versions").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-50] ^= 4
    newest.write_bytes(content)


def test_a_damaged_newest_version_is_passed_over_loudly(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    good = bits(trainer.model.predict(encode(SCHEMA, IMPRESSIONS).batch))
    running = sr.Scorer(tmp_path)
    trainer.push([labeled(n) for n in range(300, 350)])
    trainer.publish()
    damage(tmp_path)
    with pytest.warns(DamagedWarning, match="version 1 is used instead"):
        scorer = sr.Scorer(tmp_path)
    assert scorer.version.number == 1 and bits(scorer.score(IMPRESSIONS)) == good
    with pytest.warns(DamagedWarning):
        assert running.refresh() is False
    assert bits(running.score(IMPRESSIONS)) == good

    trainer.publish()  # and the next good one is taken
    assert running.refresh() is True and running.version.number == 3


def test_where_no_version_is_good_the_scorer_keeps_the_one_it_has(tmp_path: Path) -> None:
    trained(tmp_path)
    running = sr.Scorer(tmp_path)
    before = bits(running.score(IMPRESSIONS))
    damage(tmp_path)
    with pytest.raises(sr.StoreError, match="has no good version"):
        sr.Scorer(tmp_path)
    assert running.refresh() is False and bits(running.score(IMPRESSIONS)) == before


class Rates:
    """A user's own model: the click rate of each item, smoothed. Row by row, and no more than a model needs."""

    def __init__(self, schema: sr.Schema) -> None:
        self.schema = schema
        self.sums: dict[int, list[float]] = {}

    def _item(self, batch: sr.Batch, row: int) -> int:
        return int(batch.ids[batch.starts[row] + 1])

    def predict(self, batch: sr.Batch) -> Any:
        found = [self.sums.get(self._item(batch, row), [0.0, 0.0]) for row in range(len(batch))]
        return np.array([(clicks + 1.0) / (total + 2.0) for clicks, total in found], dtype=np.float32)

    def learn(self, batch: sr.Batch, labels: Any, weights: Any = None) -> None:
        for row, label in enumerate(labels.tolist()):
            clicks, total = self.sums.get(self._item(batch, row), [0.0, 0.0])
            self.sums[self._item(batch, row)] = [clicks + label, total + 1.0]

    def state_dict(self) -> dict[str, Any]:
        sums = np.array([*self.sums.values()], dtype=np.float64).reshape(-1, 2)
        return {"items": np.array([*self.sums], dtype=np.int64), "sums": sums}

    def load_state_dict(self, state: Any) -> None:
        self.sums = dict(zip(state["items"].tolist(), state["sums"].tolist(), strict=True))


def test_a_model_of_the_user_s_own_is_made_by_the_user() -> None:
    uri = "memory://test-scorer/own"
    trainer = trained(uri, model=Rates(SCHEMA))
    with pytest.raises(sr.ConfigError, match=r"version 1 is of a Rates, .* pass Scorer\(..., model="):
        sr.Scorer(uri)
    scorer = sr.Scorer(uri, model=lambda: Rates(SCHEMA))
    expected = trainer.model.predict(encode(SCHEMA, IMPRESSIONS).batch)
    assert bits(scorer.score(IMPRESSIONS)) == bits(expected) and len(set(expected.tolist())) > 2
    trainer.push([labeled(n) for n in range(300, 350)])
    trainer.publish()
    assert scorer.refresh() and bits(scorer.score(IMPRESSIONS)) != bits(expected)

    other = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Id("os"))
    with pytest.raises(sr.SchemaError, match="that of version 2: 'os' is only here; 'device' is only there"):
        sr.Scorer(uri, model=lambda: Rates(other))


def test_a_version_holds_no_optimizer_memory() -> None:
    trainer = trained("memory://test-scorer/small")
    trainer.checkpoint()
    assert trainer.store is not None
    version, state = trainer.store.versions.read()
    checkpoint, _ = trainer.store.checkpoints.read()
    assert set(state) == {"model"}
    assert not [name for name in state["model"] if name.startswith("optimizer")]
    assert {"ids", "weights", "bias", "statistics"} <= set(state["model"])
    assert version.bytes < checkpoint.bytes
    floats = state["model"]["weights"].numel()
    assert checkpoint.bytes - version.bytes > 4 * floats  # at least a number for each weight


def test_standardised_numbers_are_published_with_the_model() -> None:
    trainer = trained("memory://test-scorer/numbers")
    model: Any = sr.Scorer("memory://test-scorer/numbers")._serving.model
    assert first_difference(copy_state(trainer.model.published()), copy_state(model.published())) is None
    assert model.statistics[4, 0] == 300
