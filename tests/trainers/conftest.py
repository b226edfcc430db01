"""Streams as they come: out of order, doubled, late, early, half empty and partly unusable; and what to compare."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

import streamrec as sr
from streamrec.events import Item
from streamrec.testing._state import copy_state

START = 1_700_000_000.0
WINDOWS = {"click": 60.0, "purchase": 240.0}
LATENESS = 20.0

Schema = sr.Schema(
    sr.Id("user"),
    sr.Id("item"),
    sr.Ids("genres", limit=5),
    sr.Number("price", log=True),
    sr.Number("age", standardize=True),
    sr.Text("title"),
)

ODD_FEATURES: list[dict[str, Any]] = [
    {"price": math.nan},
    {"price": "cheap", "genres": ["a", 2.5]},
    {"genres": [str(n) for n in range(9)]},
    {"age": math.inf, "title": 5, "price": -math.inf},
]


def unusable(rng: random.Random, number: int, time: float) -> Any:
    """An event that cannot be used; some share their id with one that can."""
    shown = sr.Impression(id=f"i{number}", time=time, user="u1", item="p1")
    nothing: Any = None
    change = msgspec.structs.replace
    return rng.choice(
        [
            change(shown, time=-1.0),
            change(shown, time=math.nan),
            change(shown, time=time + 1e9),
            change(shown, id="x" * 2000),
            change(shown, score=2.0),
            sr.Labeled(change(shown, time=math.inf), 1.0),
            sr.Labeled(shown, 1.5),
            sr.Labeled(nothing, 1.0),
            sr.Feedback(id="", impression_id=shown.id, time=time),
            {"type": "impression"},
            None,
            sr.DeadLetter({"path": "a.jsonl", "offset": number}, "malformed: JSON is malformed", b"{"),
        ]
    )


def make_stream(
    seed: int, count: int = 150, *, messy: bool = True, labeled: float = 0.1, kinds: Sequence[str] = tuple(WINDOWS)
) -> list[Item]:
    """About `count` impressions and what follows them, in order of arrival.

    `messy`: with duplicates, late events, kinds nobody asked for and what cannot be used. Without, all comes within
    the lateness, and every event but those is good.
    """
    rng = random.Random(seed)
    arriving: list[tuple[float, Any]] = []
    if labeled:  # something to learn from the first event on
        arriving.append((START, sr.Labeled(sr.Impression("first", START, "u1", "p1"), 1.0, weight=2.0)))

    def send(time: float, event: Any) -> None:
        late = rng.uniform(30.0, 400.0) if messy and rng.random() < 0.03 else rng.uniform(0.0, LATENESS)
        arriving.append((time + late, event))
        if messy and rng.random() < 0.05:
            arriving.append((time + late + rng.uniform(0.0, 90.0), msgspec.structs.replace(event)))

    for number in range(count):
        time = START + 4.0 * number + rng.randrange(16) / 4
        features: dict[str, Any] = {
            "genres": rng.sample("abcde", rng.randrange(4)),
            "price": rng.uniform(0.0, 50.0),
            "age": rng.randrange(18, 80),
            "title": f"title {rng.randrange(30)}",
        }
        for name in list(features):
            if rng.random() < 0.1:
                del features[name]
        if messy and rng.random() < 0.1:
            features |= rng.choice(ODD_FEATURES)
        item = rng.randrange(20)
        served = round(rng.random(), 3) if rng.random() < 0.2 else None
        shown = sr.Impression(f"i{number}", time, f"u{rng.randrange(10)}", f"p{item}", features, served)
        clicked = rng.random() < 0.1 + 0.04 * item
        if rng.random() < labeled:
            send(time, sr.Labeled(shown, float(clicked), rng.choice(kinds), rng.choice([0.5, 2.0])))
            continue
        send(time, shown)
        for kind in kinds:
            if clicked and rng.random() < 0.9:
                after = round(rng.uniform(0.0, 1.3 * WINDOWS[kind]), 2)
                send(time + after, sr.Feedback(f"{kind}{number}", shown.id, time + after, kind))
        if messy and rng.random() < 0.05:
            send(time, sr.Feedback(f"like{number}", shown.id, time, "like", 1.0))
            send(time, sr.Feedback(f"lost{number}", "nobody's", time))
            send(time, sr.Feedback(f"again{number}", shown.id, time + 1.0))
        if messy and rng.random() < 0.1:
            arriving.append((time, unusable(rng, number, time)))
    return [event for _, event in sorted(arriving, key=lambda one: one[0])]


class Recorder:
    """A metric that keeps all it is told: `judged` holds (kind, label, score, weight)."""

    kinds = ("click", "purchase")
    name = "Recorder"

    def __init__(self) -> None:
        self.judged: list[tuple[str, float, float, float]] = []

    def update(self, labels: Any, scores: Any, weights: Any = None, kind: str = "click") -> None:
        given = np.ones(len(labels)) if weights is None else weights
        self.judged += zip([kind] * len(labels), labels.tolist(), scores.tolist(), given.tolist(), strict=True)

    def compute(self) -> float:
        return float(len(self.judged))

    def merge(self, other: Recorder) -> None:
        self.judged += other.judged

    def fresh(self) -> Recorder:
        return Recorder()

    def state_dict(self) -> dict[str, Any]:
        return {"kinds": [one[0] for one in self.judged], "rest": np.array([one[1:] for one in self.judged])}

    def load_state_dict(self, state: Any) -> None:
        rest = state["rest"].tolist()
        self.judged = [(kind, *row) for kind, row in zip(state["kinds"], rest, strict=True)]


class Logistic:
    """A user's own model, with what a model needs and no more."""

    def __init__(self, schema: sr.Schema) -> None:
        self.schema = schema
        self.weights: dict[int, float] = {}

    def predict(self, batch: sr.Batch) -> Any:
        return np.array([self._probability(batch, row) for row in range(len(batch))], dtype=np.float32)

    def learn(self, batch: sr.Batch, labels: Any, weights: Any = None) -> None:
        for row, label in enumerate(labels.tolist()):
            step = 0.1 * (label - self._probability(batch, row)) * (1.0 if weights is None else float(weights[row]))
            for entry in range(batch.starts[row], batch.ends[row]):
                one = int(batch.ids[entry])
                self.weights[one] = self.weights.get(one, 0.0) + step * math.tanh(float(batch.values[entry]))

    def _probability(self, batch: sr.Batch, row: int) -> float:
        at = slice(batch.starts[row], batch.ends[row])
        found = [self.weights.get(one, 0.0) for one in batch.ids[at].tolist()]
        logit = sum(w * math.tanh(x) for w, x in zip(found, batch.values[at].tolist(), strict=True))
        return 1.0 / (1.0 + math.exp(-logit))

    def state_dict(self) -> dict[str, Any]:
        return {"ids": np.array([*self.weights], np.int64), "weights": np.array([*self.weights.values()], np.float64)}

    def load_state_dict(self, state: Any) -> None:
        self.weights = dict(zip(state["ids"].tolist(), state["weights"].tolist(), strict=True))


def make_trainer(**changed: Any) -> sr.OnlineTrainer:
    settings: dict[str, Any] = {
        "model": sr.FM(Schema, dim=4, seed=3),
        "preprocessors": [sr.Dedup(ttl=300.0, capacity=10_000)],
        "join": sr.LabelJoin(windows=WINDOWS, lateness=LATENESS),
        "metrics": [
            *(sr.AUC(), sr.LogLoss(), sr.NormalizedEntropy(), sr.Calibration(), sr.CTR()),
            *(sr.LogLoss(kind="purchase"), sr.ConversionRate(of="purchase"), Recorder()),
        ],
        "window": 100.0,
        "dead_letters": sr.DeadLetters(capacity=20),
    }
    return sr.OnlineTrainer(**{**settings, **changed})


def canonical(state: Any) -> Any:
    """A trainer's state without slot numbers, which depend on how the stream was cut, and without wall-clock time.

    What a slot holds stands under `held` instead, in the order of the join.
    """
    state = copy_state(state)
    state.pop("seconds")
    rows, join = state.pop("rows"), state["join"]
    slots = rows["slots"].tolist()
    payloads = [] if join is None else join.pop("payloads").tolist()
    assert sorted(payloads) == slots, "each row that is held belongs to one open impression"
    ends = np.cumsum(rows["lengths"])
    held = []
    for slot in payloads:
        place = slots.index(slot)
        at = slice(int(ends[place] - rows["lengths"][place]), int(ends[place]))
        held.append(
            {
                **{name: rows[name][at] for name in ("ids", "values", "fields")},
                "served": rows["served"][place],
                "texts": [None if ref < 0 else rows["texts"][ref] for ref in rows["text_refs"][place].tolist()],
            }
        )
    return {**state, "held": held}


@pytest.fixture(scope="session", name="make_stream")
def _make_stream() -> Callable[..., list[Item]]:
    return make_stream


@pytest.fixture(scope="session", name="make_trainer")
def _make_trainer() -> Callable[..., sr.OnlineTrainer]:
    return make_trainer


@pytest.fixture(scope="session", name="canonical")
def _canonical() -> Callable[[Any], Any]:
    return canonical


@pytest.fixture(scope="session", name="Recorder")
def _recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture(scope="session", name="Logistic")
def _logistic() -> type[Logistic]:
    return Logistic


@pytest.fixture(scope="session", name="schema")
def _schema() -> sr.Schema:
    return Schema
