"""What is done when the loss has risen: told once, the rate raised for a while, a model retrained from an archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.evaluators import ADWIN
from streamrec.testing._state import copy_state, first_difference
from streamrec.trainers import Alert, Drift

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


def events(count: int, flipped_from: int) -> list[sr.Labeled]:
    rng = np.random.default_rng(0)
    users, items, noise = rng.integers(20, size=count), rng.integers(12, size=count), rng.random(count)
    likes = ((items % 3 == 0) ^ (noise < 0.1)) ^ (np.arange(count) >= flipped_from)
    return [
        sr.Labeled(sr.Impression(f"i{n}", 10.0 * n, f"u{users[n]}", f"p{items[n]}"), float(likes[n]))
        for n in range(count)
    ]


def trainer(**options: Any) -> tuple[sr.OnlineTrainer, list[Alert]]:
    told: list[Alert] = []
    drift = Drift(ADWIN(), on_alert=told.append, **options)
    return sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), drift=drift), told


def test_a_change_is_told_and_the_rate_is_raised_for_a_while() -> None:
    stream = events(6_000, flipped_from=4_000)
    one, told = trainer(rate=4.0, lasts=1_500)
    rates = []
    for begin in range(0, len(stream), 256):
        one.push(stream[begin : begin + 256])
        rates.append(one.model.rate)  # type: ignore[attr-defined]
    flip = [alert for alert in told if 40_000 <= alert.time < 42_560]
    assert flip[:1] == told[:1] != [] and all(alert.time == 10.0 * alert.label for alert in told)
    assert rates[14] == 1.0 and rates[17] == 4.0 and one.report().counts["drift"] == len(told)
    plain, _ = trainer()
    plain.push(stream)
    assert plain.model.rate == 1.0  # type: ignore[attr-defined]


def test_neither_cuts_nor_a_kill_change_a_bit() -> None:
    stream = events(5_000, flipped_from=4_000)
    whole, told = trainer(rate=4.0, lasts=300)
    expected = whole.push(stream)
    pieces, _ = trainer(rate=4.0, lasts=300)
    found = [score for begin in range(0, 4_350, 75) for score in pieces.push(stream[begin : begin + 75])]
    twin, _ = trainer(rate=4.0, lasts=300)
    twin.load_state_dict(copy_state(pieces.state_dict()))
    assert twin.model.rate == pieces.model.rate == 4.0  # type: ignore[attr-defined]
    assert found + twin.push(stream[4_350:]) == expected
    a, b = ({**one.state_dict(), "seconds": 0.0} for one in (whole, twin))
    assert first_difference(copy_state(a), copy_state(b)) is None
    assert told and twin.drift is not None and whole.drift is not None
    # what was found after the last of the events at which things are done is not told yet
    assert twin.drift.alerts == whole.drift.alerts and told == whole.drift.alerts[: len(told)]


def test_it_retrains_from_the_archive(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    made: list[sr.FM] = []

    def retrain(alert: Alert) -> None:
        # what the archive has until its last commit, learned by a new model
        model = sr.FM(SCHEMA, dim=4)
        rows = sr.JoinedEvents(sr.Archive(tmp_path / "archive").read("labeled"), schema=SCHEMA)
        sr.BatchTrainer(model=model, store=tmp_path / f"retrained-{alert.label}").run(rows, progress=False)
        made.append(model)

    one = sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=4),
        drift=Drift(ADWIN(), on_alert=retrain),
        store=tmp_path / "store",
        archive=tmp_path / "archive",
        checkpoint_every=1_000,
        background=False,
    )
    one.run(sr.Memory(events(5_000, flipped_from=4_000)))
    assert made and made[-1].ids.used > 20


def test_what_cannot_work_is_said() -> None:
    for options, said in (({"rate": 0.0}, "rate must be"), ({"lasts": 0}, "lasts must be")):
        with pytest.raises(sr.ConfigError, match=said):
            Drift(ADWIN(), **options)  # type: ignore[arg-type]

    class Fixed:
        schema = SCHEMA

        def predict(self, batch: Any) -> Any:
            return np.full(len(batch), 0.5, dtype=np.float32)

        def learn(self, batch: Any, labels: Any, weights: Any = None) -> None: ...

        def state_dict(self) -> Any:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(sr.ConfigError, match="has no `rate`"):
        sr.OnlineTrainer(model=Fixed(), drift=Drift(ADWIN(), rate=2.0))
