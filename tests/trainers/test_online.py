"""OnlineTrainer: the same whatever the cut, scored in order, judged as served, and nothing lost uncounted."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.events import encode_event
from streamrec.preprocessors import Validate, encode
from streamrec.storage import DamagedWarning
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference
from streamrec.trainers.held_rows import HeldRows

START = 1_700_000_000.0
slowly = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def shown(number: int, time: float | None = None, **features: Any) -> sr.Impression:
    when = START + number if time is None else time
    return sr.Impression(f"i{number}", when, f"u{number % 5}", f"p{number % 7}", features)


def labeled(number: int) -> sr.Labeled:
    return sr.Labeled(shown(number, genres=["a"], age=number % 50), float(number % 3 == 0))


def small(**changed: Any) -> sr.OnlineTrainer:
    """Without a join, over two ids."""
    return sr.OnlineTrainer(
        **{"model": sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4), "metrics": [sr.AUC(), sr.CTR()], **changed}
    )


def parts(stream: list[Any], sizes: list[int]) -> list[list[Any]]:
    """The stream cut into pieces of these sizes, again and again."""
    pieces, at = [], 0
    while at < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[at : at + size])
        at += size
    return pieces


def same_scores(left: list[float], right: list[float]) -> bool:
    return np.array(left).tobytes() == np.array(right).tobytes()


# The cut changes nothing.


@pytest.mark.parametrize("own", [False, True], ids=["FM", "a user's model"])
def test_a_push_of_many_equals_many_pushes(
    own: bool, make_stream: Any, make_trainer: Any, canonical: Any, Logistic: Any, schema: sr.Schema
) -> None:
    def new() -> sr.OnlineTrainer:
        return make_trainer(model=Logistic(schema)) if own else make_trainer()

    @slowly
    @given(st.integers(0, 2**32), st.lists(st.integers(1, 64), min_size=1, max_size=12), st.booleans())
    @example(0, [256], True)
    def check(seed: int, sizes: list[int], joined: bool) -> None:
        stream = make_stream(seed, 100)
        one, many = new(), new()
        if not joined:
            one.join = many.join = None
        expected = [score for event in stream for score in one.push([event])]
        found = [score for part in parts(stream, sizes) for score in many.push(part)]
        assert same_scores(expected, found)
        assert first_difference(canonical(one.state_dict()), canonical(many.state_dict())) is None
        assert one.report() == many.report() or repr(one.report()) == repr(many.report())  # a nan is no equal
        assert repr(list(one.dead_letters)) == repr(list(many.dead_letters))

    check()


@slowly
@given(seed=st.integers(0, 2**32), cut=st.integers(1, 200), sizes=st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_a_trainer_that_loads_a_state_goes_on_as_the_first(
    seed: int, cut: int, sizes: list[int], make_stream: Any, make_trainer: Any, canonical: Any
) -> None:
    stream = make_stream(seed, 100)
    first, twin = make_trainer(), make_trainer()
    first.push(stream[:cut])
    state = first.state_dict()
    check_state_is_plain({name: part for name, part in state.items() if name != "model"})
    saved = copy_state(state)
    expected = first.push(stream[cut:])
    assert first_difference(saved, copy_state(state)) is None  # a cut does not move
    twin.load_state_dict(saved)
    assert same_scores(expected, [score for part in parts(stream[cut:], sizes) for score in twin.push(part)])
    assert first_difference(canonical(first.state_dict()), canonical(twin.state_dict())) is None


# Against a slow and plain reference.


class Reference:
    """The trainer, one event at a time, encoding anew whatever it learns."""

    def __init__(self, model: Any, join: sr.LabelJoin, dedup: sr.Dedup) -> None:
        self.model, self.join, self.dedup, self.validate = model, join, dedup, Validate()
        self.served: dict[int, float] = {}  # by the impression itself: ids may come twice
        self.kept: list[Any] = []
        self.judged: list[tuple[str, float, float, float]] = []

    def batch(self, impression: sr.Impression) -> sr.Batch:
        return encode(self.model.schema, [impression]).batch

    def score(self, impression: sr.Impression) -> float:
        score = float(self.model.predict(self.batch(impression))[0])
        self.served[id(impression)] = float(np.float32(score if impression.score is None else impression.score))
        self.kept.append(impression)
        return score

    def learn(self, one: sr.Labeled) -> None:
        self.judged.append((one.kind, one.label, self.served[id(one.impression)], one.weight))
        if one.kind == "click":
            self.model.learn(self.batch(one.impression), np.float32([one.label]), np.float32([one.weight]))

    def push(self, event: Any) -> list[float]:
        is_shown = isinstance(event, (sr.Impression, sr.Labeled))
        (checked,) = self.validate.push([event])
        if isinstance(checked, sr.DeadLetter) or not self.dedup.push([checked]):
            return [math.nan] if is_shown else []
        if isinstance(event, sr.Labeled):
            score = self.score(event.impression)
            self.learn(event)
            return [score]
        for closed in self.join.push([event]):
            self.learn(closed)
        return [self.score(event)] if is_shown else []


@pytest.mark.parametrize("own", [False, True], ids=["FM", "a user's model"])
@pytest.mark.parametrize("seed", range(3))
def test_each_impression_is_scored_with_all_before_it_learned_and_nothing_after(
    own: bool, seed: int, make_stream: Any, make_trainer: Any, Logistic: Any, schema: sr.Schema
) -> None:
    trainer = make_trainer(model=Logistic(schema)) if own else make_trainer()
    twin = make_trainer(model=Logistic(schema)) if own else make_trainer()
    slow = Reference(twin.model, twin.join, twin.preprocessors[0])
    stream = make_stream(seed, 300)
    found = [score for part in parts(stream, [100, 7]) for score in trainer.push(part)]
    expected = [score for event in stream for score in slow.push(event)]
    assert same_scores(found, expected)
    assert trainer.validation._whole[-1].judged == slow.judged
    assert first_difference(trainer.model.state_dict(), slow.model.state_dict()) is None
    assert {len({score for score in expected if score == score}) > 200, len(slow.judged) > 300} == {True}


# Judged as served.


def test_metrics_judge_the_served_scores_by_the_labels_of_an_offline_oracle(
    make_stream: Any, make_trainer: Any, Recorder: Any
) -> None:
    stream = make_stream(5, 400, messy=False, labeled=0.0, kinds=["click"])
    last = sr.Feedback("end", "nobody's", START + 10_000.0)  # closes all
    metrics = [sr.AUC(), sr.LogLoss(), sr.NormalizedEntropy(), sr.Calibration(), sr.CTR(), Recorder()]
    trainer = make_trainer(join=sr.LabelJoin(windows={"click": 60.0}, lateness=20.0), metrics=metrics)
    impressions = [event for event in stream if isinstance(event, sr.Impression)]
    scores = [score for part in parts([*stream, last], [64]) for score in trainer.push(part)]
    assert len(scores) == len(impressions) == 400

    clicks = {e.impression_id: e.time for e in stream if isinstance(e, sr.Feedback)}
    labels = np.array([0.0 <= clicks.get(one.id, math.inf) - one.time <= 60.0 for one in impressions], dtype=float)
    ours = zip(impressions, scores, strict=True)
    served = np.array([score if one.score is None else np.float32(one.score) for one, score in ours], dtype=float)
    assert sum(one.score is not None for one in impressions) > 40  # those were judged by what they came with
    assert sorted((label, score) for _, label, score, _ in metrics[-1].judged) == sorted(
        zip(labels.tolist(), served.tolist(), strict=True)
    )

    loss = -np.mean(np.log(np.where(labels == 1, np.clip(served, 1e-7, 1 - 1e-7), np.clip(1 - served, 1e-7, 1 - 1e-7))))
    rate = labels.mean()
    above = served[labels == 1][:, None] - served[labels == 0][None, :]
    report = trainer.report()
    assert report.metrics["LogLoss"] == pytest.approx(loss, rel=1e-5)
    assert report.metrics["CTR"] == rate
    assert report.metrics["Calibration"] == pytest.approx(served.sum() / labels.sum())
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert report.metrics["NormalizedEntropy"] == pytest.approx(loss / entropy, rel=1e-5)
    area = np.mean((above > 0) + 0.5 * (above == 0))
    assert report.metrics["AUC"] == pytest.approx(area, abs=metrics[0].error_bound() + 1e-9)
    assert report.counts["learned"] == 400 and report.counts["pending"] == 0
    assert sum(window.count for window in report.windows) == 400


def test_labeled_items_are_progressive(Recorder: Any) -> None:
    trainer, twin = small(metrics=[Recorder()]), small().model
    stream = [labeled(n) for n in range(200)]
    scores = trainer.push(stream)
    expected = []
    for one in stream:
        batch = encode(twin.schema, [one.impression]).batch
        expected += twin.predict(batch).tolist()
        twin.learn(batch, np.float32([one.label]))
    assert scores == expected
    assert [score for _, _, score, _ in trainer.validation._whole[0].judged] == expected
    assert trainer.report().counts["learned"] == 200


def test_an_impression_s_own_score_is_the_one_judged_and_ours_the_one_returned(Recorder: Any) -> None:
    trainer = small(metrics=[Recorder()], join=sr.LabelJoin(windows={"click": 5.0}))
    one = sr.Labeled(msgspec.structs.replace(shown(0), score=0.875), 1.0)
    waits = msgspec.structs.replace(shown(1), score=0)  # an integer will do
    scores = trainer.push([one, waits, shown(2, START + 50)])
    assert len(scores) == 3 and 0.4 < scores[0] < 0.6
    assert [score for _, _, score, _ in trainer.validation._whole[0].judged] == [0.875, 0.0]


def test_other_kinds_than_the_target_are_judged_but_not_learned(Recorder: Any) -> None:
    metrics = [Recorder(), sr.CTR(), sr.CTR(kind="purchase"), sr.ConversionRate(of="purchase")]
    trainer = small(metrics=metrics, join=sr.LabelJoin(windows={"click": 5.0, "purchase": 20.0}, lateness=20.0))
    trainer.push([sr.Labeled(shown(n), 1.0, "purchase") for n in range(9)])
    assert len(trainer.model.ids) == 0 and not trainer.model.bias.any()
    assert trainer.report().counts["learned"] == 0 and len(metrics[0].judged) == 9

    trainer.push([sr.Feedback(f"c{n}", f"i{n}", START + 100.0 + n) for n in range(100, 104)])
    trainer.push([shown(n, START + 100.0 + n) for n in range(100, 110)])
    trainer.push([sr.Feedback("b100", "i100", START + 210.0, "purchase")])
    trainer.push([shown(999, START + 10_000.0)])
    counts = trainer.report().counts
    assert (counts["learned"], counts["pending"]) == (10, 1)
    assert trainer.report().metrics["CTR"] == 0.4
    assert trainer.report().metrics["CTR[purchase]"] == 10 / 19
    assert trainer.report().metrics["ConversionRate[purchase]"] == 10 / 4

    buys = small(target="purchase", join=sr.LabelJoin(windows={"click": 5.0, "purchase": 20.0}))
    buys.push([sr.Labeled(shown(0), 1.0), sr.Labeled(shown(1), 1.0, "purchase")])
    assert buys.report().counts["learned"] == 1


# Nothing is lost without being counted.


@pytest.mark.parametrize("seed", range(8))
def test_every_event_is_learned_pending_used_or_counted(
    seed: int, make_stream: Any, make_trainer: Any, Recorder: Any
) -> None:
    recorder = Recorder()
    trainer = make_trainer(join=sr.LabelJoin(windows={"click": 60.0}, lateness=20.0), metrics=[recorder])
    stream = make_stream(seed, 300)
    for part in parts(stream, [50, 3]):
        trainer.push(part)
    counts = trainer.report().counts
    join = trainer.state_dict()["join"]
    assert counts["events"] == len(stream)

    refused = sum(trainer.dead_letters.counts.values()) - trainer.dead_letters.counts["unusable value"]
    bought = sum(kind == "purchase" for kind, *_ in recorder.judged)  # labeled items of a kind that is not learned
    late = counts["late_impression"] + counts["duplicate_impression"] + counts["evicted_impression"]
    assert counts["impressions"] == counts["learned"] + counts["left_out"] + counts["pending"] + late + bought

    clicks_used = sum(label for kind, label, _, weight in recorder.judged if kind == "click" and weight == 1.0)
    clicks_used += int(join["positive"].sum())
    early = len(join["early"]["kinds"])
    dropped = ("late_feedback", "outside_window", "repeated", "unknown_kind", "unmatched", "evicted_feedback")
    feedback = clicks_used + early + sum(counts[reason] for reason in dropped)
    assert counts["events"] == refused + counts["duplicate"] + counts["impressions"] + feedback
    assert min(counts[name] for name in ("duplicate", "outside_window", "unmatched", "unknown_kind", "repeated")) > 0


def test_what_is_evicted_is_counted_and_its_row_let_go(make_trainer: Any) -> None:
    trainer = make_trainer(join=sr.LabelJoin(windows={"click": 1e6}, capacity=100))
    trainer.push([shown(n) for n in range(1000)])
    counts = trainer.report().counts
    assert (counts["pending"], counts["evicted_impression"], counts["learned"]) == (100, 900, 0)
    assert len(trainer._rows) == 100


def test_without_a_join_impressions_are_scored_and_counted() -> None:
    trainer = small()
    scores = trainer.push([shown(0), sr.Feedback("f1", "i0", START), labeled(1), shown(2)])
    assert len(scores) == 3 and scores[1] == small().push([labeled(1)])[0]
    counts = trainer.report().counts
    assert (counts["events"], counts["impressions"], counts["learned"], counts["unjoined"]) == (4, 3, 1, 3)
    assert len(trainer._rows) == 0


def test_there_is_a_score_for_each_impression_pushed_and_nan_where_it_was_dropped(
    make_stream: Any, make_trainer: Any
) -> None:
    trainer = make_trainer()
    for part in parts(make_stream(11, 300), [40]):
        pushed = [event for event in part if isinstance(event, (sr.Impression, sr.Labeled))]
        scores = trainer.push(part)
        assert len(scores) == len(pushed)
        assert all(score != score or 0.0 < score < 1.0 for score in scores)
    assert trainer.push([]) == []
    assert trainer.push([sr.Feedback("f", "i", START + 9e3)]) == []


def test_scores_stand_where_their_impressions_do_even_where_ids_are_shared() -> None:
    nothing: Any = None
    stream = [
        msgspec.structs.replace(shown(1), time=math.nan),
        sr.Labeled(nothing, 1.0),
        shown(1),
        sr.Feedback("f1", "i1", START),
        shown(1, START + 2, odd=1),  # dropped
        msgspec.structs.replace(shown(2), features={"odd": 1}),  # dropped; the next has its id
        shown(2),
        labeled(3),
        sr.Labeled(shown(3), 1.0, "purchase"),
    ]
    odd = sr.Filter(lambda event: not isinstance(event, sr.Impression) or "odd" not in event.features)
    scores = small(preprocessors=[odd]).push(stream)
    assert [score == score for score in scores] == [False, False, True, False, False, True, True, True]


def test_scores_are_aligned_where_a_preprocessor_builds_events_anew() -> None:
    class Lower:
        def __init__(self) -> None:
            self.counts = {"anonymous": 0}

        def push(self, events: Any) -> list[Any]:
            kept = [e for e in events if isinstance(e, sr.Feedback) or e.user != "u1"]
            return [e if isinstance(e, sr.Feedback) else msgspec.structs.replace(e, user="someone") for e in kept]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    scores = small(preprocessors=[Lower()]).push([shown(n) for n in range(7)])
    assert [n for n, score in enumerate(scores) if score != score] == [1, 6]


# Bad input.


def test_letters_say_where_the_event_stood_in_all_that_was_pushed(make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.push([shown(0), shown(1)])
    trainer.push([shown(2), shown(3, time=-1.0), shown(4, price=math.nan), sr.DeadLetter({"topic": "t"}, "lost: x")])
    trainer.push([None, shown(5, time=START + 1e9)])
    assert [(letter.position, letter.reason.split(":")[0]) for letter in trainer.dead_letters] == [
        ({"event": 3}, "bad time"),
        ({"impression_id": "i4"}, "unusable value"),
        ({"topic": "t"}, "lost"),
        ({"event": 6}, "bad event"),
        ({"event": 7}, "far ahead"),
    ]
    counts = trainer.report().counts
    assert (counts["events"], counts["impressions"], counts["unusable value"], counts["lost"]) == (8, 4, 1, 1)


def wire(number: int, **changed: Any) -> bytes:
    fields = msgspec.to_builtins(shown(number, genres=["a"], price=1.5)) | changed
    return json.dumps(fields).encode()


def test_a_file_full_of_bad_lines_is_read_to_its_end(tmp_path: Path, make_trainer: Any) -> None:
    bad = {
        "truncated": (wire(1)[:40], "malformed"),
        "wrong type": (wire(2, user=5), "malformed"),
        "no object": (b"[1, 2]", "malformed"),
        "another type": (wire(3, type="sale"), "malformed"),
        "NaN": (wire(4, time=math.nan), "malformed"),
        "infinite": (wire(5).replace(b"1700000005.0", b"1e999"), "malformed"),
        "negative time": (wire(6, time=-5.0), "bad time"),
        "milliseconds": (wire(7, time=START * 1000), "bad time"),
        "far future": (wire(8, time=START + 1e9), "far ahead"),
        "1 MB id": (wire(9, id="x" * 1_000_000), "id too long"),
        "1 MB user": (wire(10, user="x" * 1_000_000), "id too long"),
        "invalid UTF-8": (wire(11).replace(b"u1", b"\xff\xfe"), "malformed"),
        "bytes": (bytes(range(1, 10)) + b"\x00\xff", "malformed"),
        "100,000 values": (wire(12, features={"genres": [str(n) for n in range(100_000)]}), "unusable value"),
        "odd values": (wire(13, features={"price": "cheap"}), "unusable value"),
    }
    good = [encode_event(labeled(n)) for n in range(100, 100 + len(bad) + 1)]
    path = tmp_path / "events.jsonl"
    lines, offsets = [good[0]], {}
    for line, after in zip([line for line, _ in bad.values()], good[1:], strict=True):
        offsets[len(offsets)] = sum(len(before) + 1 for before in lines)
        lines += [line, after]
    path.write_bytes(b"\n".join(lines))
    trainer = make_trainer(store=tmp_path / "store", dead_letters=sr.DeadLetters(), batch_size=8)
    report = trainer.run(sr.JsonLines(path))

    assert [letter.reason.split(":")[0] for letter in trainer.dead_letters] == [reason for _, reason in bad.values()]
    places = [letter.position for letter in trainer.dead_letters]
    for number, (place, (_, reason)) in enumerate(zip(places, bad.values(), strict=True)):
        if reason == "malformed":
            assert place == {"path": str(path), "offset": offsets[number]}
        elif reason == "unusable value":
            assert place == {"impression_id": f"i{12 + number - 13}"}
        else:
            assert place == {"event": 2 * number + 1}
    assert max(len(letter.raw) for letter in trainer.dead_letters) <= 4096
    assert report.counts["events"] == 2 * len(bad) + 1
    assert report.counts["learned"] == len(good)
    assert report.counts["learned"] + sum(trainer.dead_letters.counts.values()) == report.counts["events"]
    assert report.counts["pending"] == 2  # those with an unusable value wait as any other
    assert make_trainer(store=tmp_path / "store").run(sr.JsonLines(path)).counts == report.counts


def test_an_empty_file_is_a_stream_that_ended(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    report = small(store=tmp_path / "store").run(sr.JsonLines(tmp_path / "empty.jsonl"))
    assert report.counts["events"] == 0 and math.isnan(report.metrics["AUC"])
    assert not (tmp_path / "store").exists()
    assert "events" in str(report) and "undefined" in str(report)


# A run.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_run_goes_on_from_the_checkpoint(make_stream: Any, make_trainer: Any, canonical: Any) -> None:
    stream = make_stream(3, 300)
    whole = make_trainer()
    whole.push(stream)
    store = sr.Store("memory://test-online/goes-on", keep=1000)
    limits = [1, 100, 7, 0, 200, None, None]
    reports = []
    for limit in limits:
        source = sr.Memory(stream)
        reports.append(make_trainer(store=store, batch_size=16).run(source, limit=limit))
    assert [report.counts["events"] for report in reports] == [1, 101, 108, 108, 308, len(stream), len(stream)]
    _, state = store.checkpoints.read()
    assert state.pop("position") == {"index": len(stream)}
    assert first_difference(canonical(whole.state_dict()), canonical(state)) is None
    # what adds nothing cuts nothing
    assert [version.number for version in store.checkpoints.list()] == [1, 2, 3, 4, 5]
    assert [version.info["events"] for version in store.versions.list()] == [1, 101, 108, 308, len(stream)]
    assert repr(reports[-1].metrics) == repr(whole.report().metrics)
    assert repr(reports[-1].windows) == repr(whole.report().windows)
    assert reports[-1].counts == whole.report().counts


def test_the_same_trainer_goes_on_where_its_source_stands(make_trainer: Any) -> None:
    trainer, source = small(), sr.Memory([labeled(n) for n in range(100)])
    assert trainer.run(source, limit=30).counts["events"] == 30
    assert trainer.run(source).counts["learned"] == 100
    assert trainer.run(source).counts["learned"] == 100


def test_checkpoints_come_every_so_many_events_and_at_the_end() -> None:
    store = sr.Store("memory://test-online/every", keep=100)
    trainer = small(store=store, batch_size=10, checkpoint_every=25, background=False, clock=Clock())
    report = trainer.run(sr.Memory([labeled(n) for n in range(95)]))
    assert [store.checkpoints.read(n)[1]["counts"]["events"] for n in range(1, 5)] == [30, 60, 90, 95]
    assert [version.info["events"] for version in store.versions.list()] == [30, 60, 90, 95]
    newest = store.versions.latest()
    assert newest is not None and newest.info["metrics"] == report.metrics
    assert newest.info["model"]["type"] == "FM" and newest.info["model"]["config"]["dim"] == 4


def test_checkpoints_come_every_so_many_seconds() -> None:
    clock = Clock()

    class Ticking(sr.Memory):
        def read(self, limit: int) -> Any:
            clock.now += 10.0
            return super().read(limit)

    store = sr.Store("memory://test-online/seconds", keep=100)
    trainer = small(store=store, batch_size=10, checkpoint_seconds=30.0, background=False, clock=clock)
    report = trainer.run(Ticking([labeled(n) for n in range(100)]))
    assert [version.info["events"] for version in store.versions.list()] == [30, 60, 90, 100]
    assert report.seconds == 110.0  # ten reads, and one that finds nothing
    _, state = store.checkpoints.read()
    assert state["seconds"] == 110.0

    # a second run adds its own seconds, not those in between
    clock.now += 1e6
    again = small(store=store, batch_size=10, checkpoint_seconds=1e9, clock=clock)
    report = again.run(Ticking([labeled(n) for n in range(120)]))
    assert report.seconds == 110.0 + 30.0 and report.counts["events"] == 120


def test_pushing_writes_nothing_and_says_when_a_checkpoint_is_due(tmp_path: Path) -> None:
    clock = Clock()
    trainer = small(store=tmp_path / "store", checkpoint_every=50, checkpoint_seconds=60.0, clock=clock)
    trainer.push([labeled(n) for n in range(49)])
    assert not trainer.checkpoint_due
    trainer.push([labeled(49)])
    assert trainer.checkpoint_due and not (tmp_path / "store").exists()
    version = trainer.checkpoint({"offset": 7})
    assert version.number == 1 and not trainer.checkpoint_due
    clock.now += 60.0
    assert trainer.checkpoint_due
    twin = small(store=str(tmp_path / "store"))
    assert twin.resume() == {"offset": 7}
    assert twin.report().counts == trainer.report().counts
    assert small(store="memory://test-online/nothing").resume() is None


def test_without_a_store_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = small(checkpoint_every=1, batch_size=10)
    report = trainer.run(sr.Memory([labeled(n) for n in range(50)]))
    assert report.counts["learned"] == 50 and list(tmp_path.iterdir()) == []
    assert not trainer.checkpoint_due and trainer.resume() is None
    for write in (trainer.checkpoint, trainer.publish):
        with pytest.raises(sr.ConfigError, match='give it a store, such as store="runs/ctr"'):
            write()


def test_the_report_says_what_became_of_the_stream(make_stream: Any, make_trainer: Any) -> None:
    report = make_trainer().run(sr.Memory(make_stream(2, 200)))
    assert isinstance(report, sr.Report) and report.interrupted is False and report.seconds > 0.0
    assert {"AUC", "LogLoss", "NormalizedEntropy", "Calibration", "CTR", "LogLoss[purchase]"} < set(report.metrics)
    assert {"events", "impressions", "learned", "pending", "left_out", "unjoined", "duplicate"} < set(report.counts)
    assert {"late_impression", "unmatched", "bad time", "unusable value"} < set(report.counts)
    assert all(type(count) is int for count in report.counts.values())
    assert len(report.windows) > 5 and report.windows[0].metrics.keys() == report.metrics.keys()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("screen", [io.StringIO, Terminal])
def test_progress_is_drawn_on_terminals_only(screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = screen()
    monkeypatch.setattr(sys, "stderr", drawn)
    small().run(sr.Memory([labeled(n) for n in range(50)]))
    assert ("events" in drawn.getvalue()) is (screen is Terminal)


FORKED = """
import os, signal, sys
import streamrec as sr

class Terminal:
    def isatty(self): return True
    def flush(self): pass
    def write(self, text): os.kill(os.getpid(), signal.SIGKILL)  # amid the drawing, with what that holds

def run():
    trainer = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("user")), dim=4))
    trainer.run(sr.Memory([sr.Labeled(sr.Impression("i1", 0.0, "u1", "p1"), 1.0)]))

run()
child = os.fork()
if child == 0:
    sys.stderr = Terminal()
    run()
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
run()
"""


def test_a_process_that_is_killed_amid_drawing_holds_up_no_other() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=300)


def test_a_checkpoint_before_anything_was_learned(make_trainer: Any) -> None:
    store = sr.Store("memory://test-online/nothing-learned")
    stream = [shown(n) for n in range(20)]
    make_trainer(store=store).run(sr.Memory(stream), limit=10)
    assert make_trainer(store=store).run(sr.Memory(stream)).counts["pending"] == 20


def test_a_source_that_breaks_ends_the_run_and_the_next_one_goes_on(make_stream: Any, make_trainer: Any) -> None:
    class Broken(sr.Memory):
        def read(self, limit: int) -> Any:
            if self.position()["index"] >= 200:
                raise sr.SourceError("the disk is gone")
            return super().read(limit)

    stream = make_stream(3, 200)
    store = sr.Store("memory://test-online/breaks")
    with pytest.raises(sr.SourceError, match="disk is gone"):
        make_trainer(store=store, batch_size=50, checkpoint_every=100).run(Broken(stream))
    whole = make_trainer()
    whole.push(stream)
    assert make_trainer(store=store).run(sr.Memory(stream)).counts == whole.report().counts


# Signals, in a process of its own.

CHILD = """
import sys
import streamrec as sr

log, store = sys.argv[1:]

class Waiting(sr.JsonLines):
    reads = 0
    def read(self, limit):
        self.reads += 1
        if self.reads == 20:  # amid the stream: say so, and wait until the signal has come
            print("ready", flush=True)
            sys.stdin.readline()
        return super().read(limit)

trainer = sr.OnlineTrainer(
    model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4),
    join=sr.LabelJoin(windows={"click": 60.0}, lateness=20.0),
    metrics=[sr.AUC()], store=store, batch_size=16,
)
report = trainer.run(Waiting(log))
print(report.interrupted, report.counts["events"])
print(report)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_between_two_batches(
    number: signal.Signals, tmp_path: Path, make_stream: Any, canonical: Any
) -> None:
    log, store = tmp_path / "events.jsonl", str(tmp_path / "store")
    stream = make_stream(8, 400, messy=False)
    log.write_bytes(b"".join(encode_event(event) + b"\n" for event in stream))
    command = [sys.executable, "-c", CHILD, str(log), store]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(number)
        out, error = child.communicate(b"\n", timeout=120)
    assert child.returncode == 0, error
    assert out.decode().startswith("True 320\n") and "interrupted" in out.decode()
    assert error == b""  # no traceback, no progress bar

    def trainer(store: str | None) -> sr.OnlineTrainer:
        join = sr.LabelJoin(windows={"click": 60.0}, lateness=20.0)
        return small(join=join, metrics=[sr.AUC()], store=store)

    resumed, whole = trainer(store), trainer(None)
    report = resumed.run(sr.JsonLines(log))
    assert report.interrupted is False
    whole.push(stream)
    assert first_difference(canonical(whole.state_dict()), canonical(resumed.state_dict())) is None


def test_handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    small().run(sr.Memory([labeled(0)]))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# Checkpoints of another trainer, damaged ones, and no room for any.


def other_models(schema: sr.Schema, Logistic: Any) -> dict[str, tuple[Any, type[Exception], str]]:
    fields = list(schema)
    new, old = fields[0], fields[1]
    return {
        "dim": (sr.FM(schema, dim=8, seed=3), sr.ConfigError, "dim=4 there and 8 here"),
        "optimizer": (sr.FM(schema, dim=4, seed=3, optimizer=sr.SGD()), sr.ConfigError, "optimizer=.*adagrad.* there"),
        "seed": (sr.FM(schema, dim=4), sr.ConfigError, "seed=3 there and 0 here"),
        "type": (Logistic(schema), sr.ConfigError, "checkpoint 1 is of a FM, not of a Logistic"),
        "missing": (sr.FM(sr.Schema(*fields[1:]), dim=4, seed=3), sr.SchemaError, "'user' is only there"),
        "more": (sr.FM(sr.Schema(*fields, sr.Id("os")), dim=4, seed=3), sr.SchemaError, "'os' is only here"),
        "order": (sr.FM(sr.Schema(old, new, *fields[2:]), dim=4, seed=3), sr.SchemaError, "order is item, user"),
        "changed": (
            sr.FM(sr.Schema(*fields[:3], sr.Number("price"), *fields[4:]), dim=4, seed=3),
            sr.SchemaError,
            "'price' is .* here and .*log=True.* there",
        ),
    }


def test_a_checkpoint_of_another_model_is_refused(
    make_stream: Any, make_trainer: Any, schema: sr.Schema, Logistic: Any
) -> None:
    store = sr.Store("memory://test-online/other-model")
    make_trainer(store=store).run(sr.Memory(make_stream(1, 50)))
    for what, (model, error, message) in other_models(schema, Logistic).items():
        with pytest.raises(error, match=message):
            make_trainer(store=store, model=model).run(sr.Memory([]))
        assert what and len(store.checkpoints.list()) == 1


def test_a_checkpoint_of_another_pipeline_is_refused(make_stream: Any, make_trainer: Any) -> None:
    store = sr.Store("memory://test-online/other-pipeline")
    stream = make_stream(1, 50)
    make_trainer(store=store).run(sr.Memory(stream))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"join": sr.LabelJoin(windows={"click": 61.0, "purchase": 240.0})}, "windows="),
        ({"join": None}, "and a join"),
        ({"preprocessors": []}, r"preprocessors \[Dedup\]"),
        ({"preprocessors": [sr.Filter(bool)]}, r"preprocessors \[Dedup\]"),
        ({"metrics": [sr.AUC()]}, "not of \\['AUC'\\]"),
        ({"window": 50.0}, "windows of 100.0 s"),
    ]
    for changed, message in changes:
        with pytest.raises(sr.ConfigError, match=message):
            make_trainer(store=store, **changed).run(sr.Memory([]))
    # what only bounds or paces may change
    join = sr.LabelJoin(windows={"click": 60.0, "purchase": 240.0}, lateness=5.0, capacity=10)
    dedup = sr.Dedup(ttl=1.0, capacity=5)
    make_trainer(store=store, join=join, batch_size=3, preprocessors=[dedup]).run(sr.Memory(stream))


def test_a_checkpoint_of_another_format_is_refused() -> None:
    store = sr.Store("memory://test-online/format")
    trainer = small(store=store)
    trainer.run(sr.Memory([labeled(0)]))
    version, state = store.checkpoints.read()
    store.checkpoints.write({**state, "format": 99}, version.info)
    with pytest.raises(sr.StoreError, match="format 99"):
        small(store=store).run(sr.Memory([labeled(0)]))


@pytest.mark.parametrize("what", ["payload", "manifest", "gone"])
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(
    what: str, tmp_path: Path, make_stream: Any, make_trainer: Any, canonical: Any
) -> None:
    stream = make_stream(4, 300)
    whole = make_trainer()
    whole.push(stream)
    store = sr.Store(tmp_path / "store")
    make_trainer(store=store, checkpoint_every=100, background=False).run(sr.Memory(stream), limit=350)
    newest = store.checkpoints.list()[-1].number
    (payload,) = (tmp_path / "store" / "checkpoints").glob(f"{newest:010d}-*")
    manifest = tmp_path / "store" / "checkpoints" / f"{newest:010d}.json"
    if what == "gone":
        payload.unlink()
    else:
        path = payload if what == "payload" else manifest
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    resumed = make_trainer(store=store)
    with pytest.warns(DamagedWarning, match=f"version {newest - 1} is used instead"):
        report = resumed.run(sr.Memory(stream))
    assert report.counts == whole.report().counts
    assert first_difference(canonical(whole.state_dict()), canonical(resumed.state_dict())) is None


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_store_that_cannot_be_written_says_so_with_the_cure(tmp_path: Path) -> None:
    link = tmp_path / "store"
    link.symlink_to(tmp_path / "away" / "far")  # also root cannot write there
    trainer = small(store=link, batch_size=10)
    with pytest.raises(sr.StoreError, match=r"cannot write to .*; give a path or URI that this process may write to"):
        trainer.run(sr.Memory([labeled(n) for n in range(20)]))
    assert trainer.report().counts["learned"] == 20  # what was learned is still there, to be saved elsewhere


# Arguments, and memory.


def test_what_cannot_work_is_refused() -> None:
    for changed, message in (
        ({"batch_size": 0}, "batch_size must be >= 1 event, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1 event, got 0"),
        ({"checkpoint_seconds": 0.0}, "checkpoint_seconds must be > 0, got 0.0"),
        ({"checkpoint_seconds": math.nan}, "checkpoint_seconds must be > 0, got nan"),
        ({"join": sr.LabelJoin(windows={"purchase": 5.0})}, "learn 'click', but the join has windows for purchase"),
        ({"metrics": [sr.AUC, sr.CTR]}, "metrics must be metric objects"),
        ({"metrics": [sr.AUC(), sr.AUC()]}, "two metrics are named 'AUC'"),
    ):
        with pytest.raises(sr.ConfigError, match=message):
            small(**changed)


def test_memory_follows_what_is_pending(make_trainer: Any) -> None:
    trainer = make_trainer(metrics=[], join=sr.LabelJoin(windows={"click": 100.0}))
    sizes = Counter()
    for first in range(0, 20_000, 250):
        trainer.push([shown(n, genres=["a", "b"], title=f"title {n}") for n in range(first, first + 250)])
        assert len(trainer._rows) == trainer.join.pending
        rows = trainer._rows
        sizes[len(rows._starts), len(rows._ids)] += 1
        assert len(rows.batch.texts) <= 2 * len(rows._starts) + 250
    assert trainer.join.pending == 101
    assert len(sizes) <= 2, sizes  # grown once at the most, then flat


def test_rows_are_held_as_they_were() -> None:
    schema = sr.Schema(sr.Id("user"), sr.Ids("tags"), sr.Text("title"))
    rng = np.random.default_rng(0)
    rows, held = HeldRows(1), {}
    for _ in range(300):
        impressions = [
            sr.Impression("", 0.0, f"u{rng.integers(99)}", "", {"tags": [*map(str, range(rng.integers(9)))]} | more)
            for more in rng.permutation([{}, {"title": f"t{rng.integers(999)}"}] * rng.integers(9)).tolist()
        ]
        batch = encode(schema, impressions).batch
        for place, slot in enumerate(rows.add(batch, [0.0] * len(batch))):
            assert slot not in held
            rows.served[slot] = rng.random()
            held[slot] = impressions[place], rows.served[slot]
        gone = [slot for slot in held if rng.random() < 0.2]
        rows.free(gone)
        for slot in gone:
            del held[slot]
        assert len(rows) == len(held)
        if rng.random() < 0.05:
            twin = HeldRows(1)
            twin.load_state_dict(rows.state_dict())
            assert first_difference(rows.state_dict(), twin.state_dict()) is None
            rows = twin
    for slot, (impression, served) in held.items():
        found, expected = rows.batch.take([slot]).compact(), encode(schema, [impression]).batch
        assert rows.served[slot] == served
        for name in ("ids", "values", "fields"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
        assert list(found.texts) == list(expected.texts)


def test_texts_nobody_holds_are_let_go() -> None:
    schema = sr.Schema(sr.Text("title"))
    rows = HeldRows(1)
    for n in range(5000):
        one = shown(n, title=f"t{n}")
        rows.free(rows.add(encode(schema, [one]).batch, [one.time]))
    assert len(rows.batch.texts) <= 2 * 512 + 1
