"""The contracts, applied to everything exported: a public class that nothing here covers fails a test."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec._event_columns import table_of
from streamrec.events import Event, encode_event
from streamrec.preprocessors import Validate, encode, steps
from streamrec.protocols import Metric, Model, Source, Stage, Stateful
from streamrec.testing import check_metric, check_model, check_source, check_stage
from streamrec.testing._state import check_state_is_plain, copy_state, first_difference

START = 1_700_000_000.0
TESTS = Path(__file__).parent


def events(count: int = 40) -> list[Event]:
    """Impressions and feedback of two kinds, some twice, some early, some late; a few labeled ones."""
    stream: list[Event] = []
    for n in range(count):
        features = {"genres": ["abcd"[n % 4]], "price": float(n % 9)}
        one = sr.Impression(f"i{n % 31}", START + 5.0 * n, f"u{n % 5}", f"p{n % 7}", features)
        click = sr.Feedback(f"c{n}", f"i{n % 29}", START + 5.0 * n + n % 13)
        buy = sr.Feedback(f"b{n}", f"i{n % 31}", START + 5.0 * n + 1.0, "purchase")
        stream += [click, one] if n % 3 else [one, click, click]
        stream += [buy] if n % 4 == 0 else []
        stream += [sr.Labeled(one, float(n % 2))] if n % 7 == 0 else []
    return stream


SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("genres"), sr.Number("price", log=True, standardize=True))
SHOWN = [one for one in events(24) if isinstance(one, sr.Impression)]
BATCH = encode(SCHEMA, SHOWN).batch
LABELS = np.array([n % 3 == 0 for n in range(len(SHOWN))], dtype=np.float32)


def pushed(log: Path) -> sr.Push:
    """A source over what was handed in to another one."""
    if not log.exists():
        with sr.Push(log=log, segment=2_000) as first:
            for event in events():
                first.put(event)
    return sr.Push(log=log, idle=0.0)


def in_parquet(folder: Path) -> sr.Parquet:
    """Two files whose times overlap."""
    if not folder.exists():
        parquet = pytest.importorskip("pyarrow.parquet")
        folder.mkdir()
        for number in (0, 1):
            parquet.write_table(table_of(events()[number::2]), folder / f"{number}.parquet", row_group_size=9)
    return sr.Parquet(str(folder))


def in_csv(path: Path) -> sr.Csv:
    """Impressions alone, and a row that is none."""
    rows = [f'{one.id},{one.time},{one.user},"{one.item}",x|y\n' for one in SHOWN]
    path.write_text("id,time,user,item,genres\n" + "".join(rows) + "i,never,u,p,\n")
    return sr.Csv(path, lists={"genres": "|"})


SOURCES: dict[str, Callable[[Path], Source]] = {
    "Memory": lambda folder: sr.Memory(events()),
    "JsonLines": lambda folder: sr.JsonLines(folder / "*.jsonl"),
    "Push": lambda folder: pushed(folder / "log"),
    "Parquet": lambda folder: in_parquet(folder / "rows"),
    "Merged": lambda folder: sr.Merged({"lines": sr.JsonLines(folder / "*.jsonl"), "memory": sr.Memory(SHOWN)}),
    "Csv": lambda folder: in_csv(folder / "a.csv"),
}
STAGES: dict[str, Callable[[], Stage]] = {
    "Dedup": lambda: sr.Dedup(ttl=60.0, capacity=20),
    "Expect": lambda: sr.Expect(ranges={"price": (0.0, 6.0)}, allowed={"genres": ["a", "b", "c"]}),
    "Filter": lambda: sr.Filter(lambda event: not isinstance(event, sr.Feedback) or event.kind == "click"),
    "History": lambda: sr.History(kinds=["click", "purchase"], window=40.0, ttl=120.0, capacity=20),
    "LabelJoin": lambda: sr.LabelJoin(
        windows={"click": 20.0, "purchase": sr.After("click", 30.0)},
        lateness=10.0,
        capacity=10,
        late="correct",
        keep=20.0,
    ),
    "Pseudonymize": lambda: sr.Pseudonymize({0.0: b"k" * 16, START + 90.0: b"j" * 16}, fields=["user", "genres"]),
    "RateLimit": lambda: sr.RateLimit(most=2, within=30.0, hold=20.0, capacity=4),
    "Redact": lambda: sr.Redact(drop=["genres"], coarsen={"price": steps(5.0)}),
    "Validate": lambda: Validate(max_ahead=60.0),  # public in streamrec.preprocessors
}
MODELS: dict[str, Callable[..., Model]] = {
    "FM": lambda: sr.FM(SCHEMA, dim=4),
    "SGD": lambda: sr.FM(SCHEMA, dim=4, optimizer=sr.SGD()),
    "Adagrad": lambda: sr.FM(SCHEMA, dim=4, optimizer=sr.Adagrad()),
    "FTRL": lambda: sr.FM(SCHEMA, dim=4, optimizer=sr.FTRL()),
    "Adam": lambda: sr.FM(SCHEMA, dim=4, optimizer=sr.Adam()),
}
METRICS: dict[str, list[Callable[[], Metric]]] = {
    "AUC": [sr.AUC],
    "LogLoss": [sr.LogLoss, lambda: sr.LogLoss(kind="purchase")],
    "NormalizedEntropy": [sr.NormalizedEntropy],
    "Calibration": [sr.Calibration],
    "CTR": [sr.CTR, lambda: sr.CTR(kind="like")],
    "ConversionRate": [sr.ConversionRate, lambda: sr.ConversionRate(of="purchase", per="like")],
    "GAUC": [lambda: sr.GAUC(capacity=64), lambda: sr.GAUC(by="item", capacity=64, kind="purchase")],
    "NDCG": [lambda: sr.NDCG(k=3, capacity=64)],
    "Recall": [lambda: sr.Recall(k=3, capacity=64, by=lambda impression: impression.user[-1])],
    "Coverage": [lambda: sr.Coverage(size=50)],
    "Slices": [
        lambda: sr.Slices(by="request", metrics=[sr.AUC(), sr.ConversionRate(of="purchase")]),
        lambda: sr.Slices(by="request", metrics=[sr.GAUC(capacity=64), sr.CTR(), sr.Coverage(size=50)]),
    ],
}
DETECTORS: dict[str, Callable[[], Any]] = {
    "ADWIN": lambda: sr.ADWIN(clock=4),
    "PageHinkley": lambda: sr.PageHinkley(threshold=4.0),
    "PSI": lambda: sr.PSI(SCHEMA, window=20, threshold=0.5),
    "Drift": lambda: sr.Drift(sr.ADWIN(clock=4), features=sr.PSI(SCHEMA, window=20, threshold=0.5), rate=2.0, lasts=30),
}
# What flows and what configures: frozen, without memory.
DATA = {
    *("After", "Batch", "Candidate", "DeadLetter", "Feedback", "Hour", "Id", "Ids", "Impression", "Labeled", "Number"),
    *("Ranked", "Report", "Schema", "Taste", "Text", "Weekday"),
}
ERRORS = {
    *("ConfigError", "DamagedError", "FullError", "SchemaError", "SourceError", "StoreError", "StreamrecError"),
    "UnreachableError",
}
# What remembers in ways of its own, and the test that holds it to them.
ELSEWHERE = {
    "BertCTR": "models/test_bert_ctr.py::test_contract",
    "BertFM": "models/test_bert_fm.py::test_it_keeps_the_contract_of_models",
    "BatchTrainer": "trainers/test_batch_trainer.py::test_a_training_that_broke_ends_as_one_that_did_not",
    "DeadLetters": "test_contracts.py::test_dead_letters_go_on_from_their_state",
    "Archive": "storage/test_archive.py::test_a_run_that_is_killed_anywhere_archives_the_same",
    "HttpPoll": "sources/test_http_poll.py::test_contract_over_pages",
    "EncodedRows": "trainers/test_batch_trainer.py::test_encoded_rows_are_as_written",
    "Gate": "trainers/test_gate.py::test_a_run_that_broke_decides_what_it_would_have",
    "JoinedEvents": "trainers/test_batch_trainer.py::test_batch_first_then_stream_equals_the_stream",
    "OnlineTrainer": "trainers/test_online.py::test_a_trainer_that_loads_a_state_goes_on_as_the_first",
    "Scorer": "serving/test_scorer.py::test_scores_are_those_of_the_trainer_s_model",
    "TextCache": "models/test_text_cache.py::test_a_text_has_one_vector_whatever_was_asked_before",
    "TextEncoder": "models/test_text_encoder.py::test_a_text_has_one_vector_whatever_it_comes_with",
    "TextLearner": "models/test_text_learner.py::test_neither_cuts_nor_a_resume_change_a_bit",
    "Tuner": "trainers/test_tuner.py::test_neither_cuts_nor_a_kill_change_a_bit",
    "Store": "storage/test_store_crash.py::test_",
}
COVERED = [SOURCES, STAGES, MODELS, METRICS, DETECTORS, DATA, ERRORS, ELSEWHERE]


def test_every_exported_class_is_under_a_contract() -> None:
    exported = {name for name in sr.__all__ if inspect.isclass(getattr(sr, name))}
    covered = [name for group in COVERED for name in group]
    assert exported == set(sr.__all__), "what is exported and no class needs a contract of its own"
    assert sorted(set(covered) - {"Validate"}) == sorted(exported), "put the new one under a contract above"
    assert len(covered) == len(set(covered)), "once is enough"


@pytest.mark.parametrize(("name", "where"), ELSEWHERE.items())
def test_what_is_held_elsewhere_is_held_there(name: str, where: str) -> None:
    path, test = where.split("::")
    assert f"def {test}" in (TESTS / path).read_text(encoding="utf-8"), f"the test of {name} is gone"


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name: str, tmp_path: Path) -> None:
    lines = [encode_event(event) + b"\n" for event in events()]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:30]) + b'{"type": \n\n')
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[30:])[:-1])
    check_source(lambda: SOURCES[name](tmp_path))


@pytest.mark.parametrize("name", STAGES)
def test_stages(name: str) -> None:
    stream: list[Any] = events()
    if name == "Validate":
        stream[5] = sr.Impression("", float("nan"), "u1", "p1")
        stream[9] = sr.Feedback("f9", "i1", START + 1e6)
        stream[11] = None
    check_stage(STAGES[name], stream)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    check_model(MODELS[name], BATCH, LABELS)


@pytest.mark.parametrize(("name", "place"), [(name, n) for name, makes in METRICS.items() for n in range(len(makes))])
def test_metrics(name: str, place: int) -> None:
    check_metric(METRICS[name][place])


def looked_at(name: str, detector: Any, rows: slice) -> Any:
    """What a detector says of a part of a stream that changes in the middle."""
    rng = np.random.default_rng(0)
    losses = np.where(np.arange(80) < 40, 0.1, 0.9) + 0.05 * rng.random(80)
    batch = encode(SCHEMA, [
        sr.Impression(f"i{n}", START + n, "u", f"p{n % 3 + 3 * (n >= 40)}", {"price": float(n % 5)}) for n in range(80)
    ]).batch  # fmt: skip
    if name == "PSI":
        return detector.update(batch.take(rows))
    if name == "Drift":
        detector.show(batch.take(rows))
        detector.update(np.ones(80, dtype=np.float32)[rows], np.float32(1.05 - losses)[rows], batch.times[rows])
        return []
    before = losses[rows].copy()
    found = detector.changes(losses[rows]).tolist()
    assert losses[rows].tobytes() == before.tobytes()
    return found


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name: str) -> None:
    """The same whatever the cuts, from a saved state at every cut, sharing nothing with a copy, and settings kept."""
    whole = DETECTORS[name]()
    assert isinstance(whole, Stateful)
    expected = looked_at(name, whole, slice(0, 80))
    model = type("Model", (), {"rate": 1.0})()
    for cut in range(81):
        first = DETECTORS[name]()
        found = looked_at(name, first, slice(0, cut))
        state = first.state_dict()
        check_state_is_plain(state)
        saved, twin = copy_state(state), DETECTORS[name]()
        looked_at(name, twin, slice(30, 80))
        twin.load_state_dict(saved)
        copied = copy.deepcopy(first)
        found += looked_at(name, copied, slice(cut, 80))
        assert first_difference(saved, copy_state(first.state_dict())) is None, "the copy shares memory"
        found_by_twin = looked_at(name, twin, slice(cut, 80))
        assert found == expected and found[len(found) - len(found_by_twin) :] == found_by_twin
        assert first_difference(whole.state_dict(), twin.state_dict()) is None
        assert first_difference(saved, copy_state(state)) is None, "a state that was cut has changed"
    if name == "Drift":
        whole.act(model)
        assert {alert.field for alert in whole.alerts} >= {"", "item"} and model.rate == 2.0
    else:
        assert any(expected), "the stream does change"
        again = whole.fresh()
        assert looked_at(name, again, slice(0, 80)) == expected and repr(again) == repr(whole)


@pytest.mark.parametrize("name", sorted(DATA | {"SGD", "Adagrad", "FTRL", "Adam"}))
def test_data_is_frozen_and_remembers_nothing(name: str) -> None:
    schema = sr.Schema(sr.Id("user"))
    one = sr.Impression("i1", START, "u1", "p1")
    made: dict[str, Any] = {
        "After": sr.After("click", 60.0),
        "Batch": encode(schema, [one]).batch,
        "Candidate": sr.Candidate("p1"),
        "DeadLetter": sr.DeadLetter({}, "lost"),
        "Feedback": sr.Feedback("f1", "i1", START),
        "Impression": one,
        "Labeled": sr.Labeled(one, 1.0),
        "Ranked": sr.Ranked("p1", 0.5),
        "Report": sr.Report({}, {}),
        "Schema": schema,
        "Taste": sr.Taste(),
        **{kind.__name__: kind("genres") for kind in (sr.Hour, sr.Id, sr.Ids, sr.Number, sr.Text, sr.Weekday)},
        **{kind.__name__: kind() for kind in (sr.SGD, sr.Adagrad, sr.FTRL, sr.Adam)},
    }
    data = made[name]
    assert type(data) is getattr(sr, name) and not isinstance(data, Stateful)
    if name != "Schema":  # its two attributes are set once, by convention
        field = next(iter(getattr(data, "__struct_fields__", None) or getattr(data, "_fields", None) or vars(data)))
        with pytest.raises(AttributeError):
            setattr(data, field, None)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_errors_have_one_root(name: str) -> None:
    assert issubclass(getattr(sr, name), sr.StreamrecError)


def test_dead_letters_go_on_from_their_state() -> None:
    letters = [sr.DeadLetter({"event": n}, f"reason {n % 3}: {n}", b"x" * n) for n in range(30)]
    whole = sr.DeadLetters(capacity=7, max_raw=10)
    assert isinstance(whole, Stateful)
    for letter in letters:
        whole.add(letter)
    for cut in range(len(letters)):
        first, twin = sr.DeadLetters(capacity=7, max_raw=10), sr.DeadLetters(capacity=7, max_raw=10)
        for letter in letters[:cut]:
            first.add(letter)
        twin.add(letters[-1])
        state = first.state_dict()
        check_state_is_plain(state)
        saved = copy_state(state)
        twin.load_state_dict(saved)
        for letter in letters[cut:]:
            first.add(letter)
            twin.add(letter)
        assert first_difference(saved, copy_state(state)) is None
        assert list(twin) == list(first) == list(whole) and twin.counts == first.counts == whole.counts
        assert first_difference(whole.state_dict(), twin.state_dict()) is None
