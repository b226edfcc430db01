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


WITH_PRICE = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price"))


def priced(count: int, dearer_from: int) -> list[sr.Labeled]:
    """What is clicked has nothing to do with the price."""
    rng = np.random.default_rng(1)
    price = rng.normal(1.0, 0.1, count) + 0.2 * (np.arange(count) >= dearer_from)
    return [
        sr.Labeled(sr.Impression(one.impression.id, one.impression.time, one.impression.user, one.impression.item,
                                 {"price": float(x)}), one.label)
        for one, x in zip(events(count, flipped_from=count), price, strict=True)
    ]  # fmt: skip


def on_features(told: list[Alert], detector: ADWIN | None = None) -> sr.OnlineTrainer:
    drift = Drift(detector, features=sr.PSI(WITH_PRICE, window=1_000), on_alert=told.append, rate=4.0, lasts=700)
    return sr.OnlineTrainer(model=sr.FM(WITH_PRICE, dim=4), drift=drift)


def test_a_feature_that_shifts_is_told_though_the_loss_is_as_it_was() -> None:
    stream = priced(6_000, dearer_from=4_000)
    told: list[Alert] = []
    one, rates = on_features(told, ADWIN()), []
    for begin in range(0, len(stream), 256):
        one.push(stream[begin : begin + 256])
        rates.append(one.model.rate)  # type: ignore[attr-defined]
    # the window from 4,000 to 5,000 ends among events that are looked at together until 5,120; ADWIN says nothing
    assert [(alert.field, alert.label, alert.time) for alert in told] == [("price", 5_120, 10.0 * 4_999)]
    assert told[0].psi > 0.25 and one.report().counts["drift"] == 1
    assert rates[18:24] == [1.0, 4.0, 4.0, 4.0, 1.0, 1.0]


def test_neither_cuts_nor_a_kill_change_a_bit_of_what_features_show() -> None:
    stream = priced(4_000, dearer_from=2_000)
    told: list[Alert] = []
    whole = on_features(told)
    expected = whole.push(stream)
    pieces = on_features([])
    found = [score for begin in range(0, 3_020, 20) for score in pieces.push(stream[begin : begin + 20])]
    twin = on_features([])
    twin.load_state_dict(copy_state(pieces.state_dict()))  # a shift was found at 3,000 and is not acted upon yet
    assert twin.drift is not None and twin.drift.alerts == [] and told
    assert found + twin.push(stream[3_020:]) == expected
    a, b = ({**one.state_dict(), "seconds": 0.0} for one in (whole, twin))
    assert first_difference(copy_state(a), copy_state(b)) is None
    with pytest.raises(sr.ConfigError, match="has no detector"):
        on_features([], ADWIN()).load_state_dict(copy_state(a))


def test_a_forgotten_user_is_not_in_the_reference() -> None:
    one = on_features([])
    one.push(priced(1_500, dearer_from=1_500))
    assert one.drift is not None and one.drift.features is not None
    saved = one.drift.features.state_dict()
    marks = saved["bins"]["user"]["marks"]
    name, number = next(
        (f"u{n}", found)
        for n in range(20)
        if (found := one._encoder([sr.Impression("i", 0.0, f"u{n}", "p")])[0].ids[0]) in marks
    )
    assert number in saved["rows"]["ids"]
    one.forget(name)
    assert first_difference(one.drift.features.state_dict(), sr.PSI(WITH_PRICE, window=1_000).state_dict()) is None


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

    with pytest.raises(sr.ConfigError, match="drift of what"):
        Drift()
    with pytest.raises(sr.SchemaError, match="the model that drift watches: 'price' is only here"):
        sr.OnlineTrainer(model=Fixed(), drift=Drift(features=sr.PSI(WITH_PRICE)))
    with pytest.raises(sr.ConfigError, match="has no `rate`"):
        sr.OnlineTrainer(model=Fixed(), drift=Drift(ADWIN(), rate=2.0))
