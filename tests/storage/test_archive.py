"""The archive: everything exactly once, wherever a run is killed; back as a source, for Dask, and without a user."""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.errors import ConfigError, StoreError, UnreachableError
from streamrec.events import decode_event, encode_event
from streamrec.hashing import id_of
from streamrec.storage import archive as module
from streamrec.testing import check_source

START = 1_700_000_000.0
SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price"))


def stream(count: int = 120) -> list[Any]:
    """Impressions over some hours, clicks, purchases, duplicates, and what cannot be used."""
    events: list[Any] = []
    for n in range(count):
        time = START + 100.0 * n
        features = {"price": float(n), "tags": ["a", "b"]} if n % 3 else {}
        events.append(sr.Impression(f"i{n}", time, f"u{n % 7}", f"p{n % 5}", features, 0.25 if n % 11 == 0 else None))
        if n % 4 == 0:
            events.append(sr.Feedback(f"c{n}", f"i{n}", time + 30.0, "click", 2.5 if n % 8 == 0 else None))
        if n % 10 == 0:
            events.append(events[-1])
        if n % 13 == 0:
            events.append(sr.DeadLetter({"offset": n}, "malformed: JSON", encode_event(events[-1])[:-1]))
        if n % 17 == 0:
            events.append(sr.Labeled(sr.Impression(f"l{n}", time, "u1", "p1"), 1.0, "click", 2.0))
    return events


def trainer_of(folder: Path, **more: Any) -> sr.OnlineTrainer:
    settings: dict[str, Any] = {
        "model": sr.FM(SCHEMA, dim=4),
        "preprocessors": [sr.Dedup(ttl=1e6, capacity=10_000)],
        "join": sr.LabelJoin(windows={"click": 300.0}, late="correct", keep="1h"),
        "store": sr.Store(folder / "store", keep=2),
        "archive": sr.Archive(folder / "archive", compact=3),
        "checkpoint_every": 15,
        "batch_size": 5,
        "background": False,
    }
    return sr.OnlineTrainer(**{**settings, **more})


def everything(source: Any) -> list[Any]:
    found: list[Any] = []
    while some := source.read(7):
        found += some
    return found


def contents(folder: Path) -> dict[str, list[Any]]:
    archive = sr.Archive(folder / "archive")
    return {name: everything(archive.read(name)) for name in ("events", "labeled", "dead")}


@pytest.fixture(name="kept", scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nothing disturbed has written. Only to be read."""
    folder = tmp_path_factory.mktemp("kept")
    trainer_of(folder).run(sr.Memory(stream()))
    return folder


@pytest.fixture(name="whole", scope="module")
def _whole(kept: Path) -> dict[str, list[Any]]:
    return contents(kept)


def test_it_holds_each_event_once_and_gives_it_back(whole: dict[str, list[Any]]) -> None:
    expected: list[Any] = []
    for event in stream():
        shown = event.impression if isinstance(event, sr.Labeled) else event
        if not isinstance(shown, sr.DeadLetter) and shown not in expected:
            expected.append(shown)
    # within an hour in the order in which they came, and hour by hour
    assert whole["events"] == sorted(expected, key=lambda event: event.time // 3600)
    assert len(whole["labeled"]) > 100 and all(isinstance(one, sr.Labeled) for one in whole["labeled"])
    by_id = {one.impression.id: one for one in whole["labeled"]}
    [shown] = [one for one in stream() if isinstance(one, sr.Impression) and one.id == "i4"]
    assert by_id["i4"] == sr.Labeled(shown, 1.0) and by_id["i5"].label == 0.0
    assert by_id["l0"] == sr.Labeled(sr.Impression("l0", START, "u1", "p1"), 1.0, "click", 2.0)
    dead = [one for one in stream() if isinstance(one, sr.DeadLetter)]
    assert whole["dead"] == dead


def test_dead_letters_are_replayed_after_a_fix(kept: Path, whole: dict[str, list[Any]]) -> None:
    archive = sr.Archive(kept / "archive")
    events = everything(archive.read("dead", decode=lambda raw: decode_event(raw + b"}")))
    assert len(events) == len(whole["dead"]) > 5 and not any(isinstance(one, sr.DeadLetter) for one in events)
    # and into a model; whoever replays them twice has duplicates
    trainer = sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=4),
        preprocessors=[sr.Dedup(ttl=1e6, capacity=10_000)],
        join=sr.LabelJoin(windows={"click": 300.0}),
    )
    counts = trainer.run(archive.read("dead", decode=lambda raw: decode_event(raw + b"}"))).counts
    shown = sum(isinstance(one, sr.Impression) for one in events)
    assert counts["events"] == len(events) and counts["impressions"] == shown
    assert counts["learned"] + counts["pending"] == shown and counts["learned"] > 3
    trainer.push(events)
    assert trainer.report().counts["duplicate"] == len(events)


def test_files_of_an_hour_are_put_together(kept: Path, whole: dict[str, list[Any]]) -> None:
    archive = sr.Archive(kept / "archive")
    files = archive.files("events")
    assert any("/parts-" in name for name in files) and all("/date=2023-11-1" in name for name in files)
    hours = {name.rpartition("/")[0] for name in files}
    assert len(files) <= 5 * len(hours) and len(hours) == 4
    on_disk = {str(path) for path in (kept / "archive").rglob("*.parquet")}
    named = [name for data in module.DATASETS for name in archive.files(data)]
    assert {name.removeprefix("file://") for name in named} == on_disk


def test_an_archive_on_another_file_system(whole: dict[str, list[Any]]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    root = "memory://test_archive"

    def trainer() -> sr.OnlineTrainer:
        archive = sr.Archive(f"{root}/archive", compact=3)
        return trainer_of(Path("unused"), store=sr.Store(f"{root}/store", keep=2), archive=archive)

    try:
        trainer().run(sr.Memory(stream()), limit=70)
        source = sr.Memory(stream())
        last = trainer()
        last.run(source)
        archive = sr.Archive(f"{root}/archive")
        assert {name: everything(archive.read(name)) for name in whole} == whole
        # a Hive-partitioned data set like any other
        rows = everything(sr.Parquet(f"{root}/archive/events", features=[]))
        assert sorted(map(encode_event, rows)) == sorted(map(encode_event, whole["events"]))
        assert [row.time for row in rows] == sorted(row.time for row in rows)
        assert last.forget("u3", source.position())["archive"] > 15
        left = {one.user for one in everything(archive.read("events")) if isinstance(one, sr.Impression)}
        assert "u3" not in left and "u2" in left
    finally:
        memory.rm("/test_archive", recursive=True)


class Killed(BaseException):
    """Not an Exception: nobody catches it."""


@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_is_killed_anywhere_archives_the_same(
    tmp_path: Path, whole: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    put, steps, lock = module.Archive._put_bytes, {"left": 0, "before": True}, threading.Lock()

    def dying(self: Any, name: str, content: Any) -> None:
        with lock:  # files are written by several threads
            steps["left"] -= 1
            mine, before = steps["left"], steps["before"]
        if mine == 0 and before:
            raise Killed
        put(self, name, content)
        if mine == 0:
            raise Killed

    monkeypatch.setattr(module.Archive, "_put_bytes", dying)
    folder = tmp_path / "killed"
    deaths = 0
    for attempt in range(60):
        steps["left"], steps["before"] = 1 + (attempt * 5) % 17, attempt % 2 == 0
        try:
            trainer_of(folder, background=background).run(sr.Memory(stream()))
        except Killed:
            deaths += 1
            continue
        break
    assert deaths >= 2
    steps["left"] = -1
    trainer_of(folder).run(sr.Memory(stream()))
    assert contents(folder) == whole


def test_a_run_that_goes_back_to_an_older_checkpoint_takes_rows_back(
    tmp_path: Path, whole: dict[str, list[Any]]
) -> None:
    folder = tmp_path / "older"
    trainer_of(folder).run(sr.Memory(stream()), limit=80)
    newest = max((folder / "store" / "checkpoints").glob("*.json"))
    newest.unlink()  # as if it were damaged
    trainer_of(folder).run(sr.Memory(stream()))
    assert contents(folder) == whole


def test_more_than_may_be_held_is_written_before_the_checkpoint(tmp_path: Path, whole: dict[str, list[Any]]) -> None:
    folder = tmp_path / "small"
    trainer = trainer_of(folder, archive=sr.Archive(folder / "archive", most=10), checkpoint_every=100)
    trainer.run(sr.Memory(stream()), limit=90)
    for event in stream()[90:130]:
        trainer.push([event])
    assert trainer.archive is not None and trainer.archive._spilled
    trainer_of(folder).run(sr.Memory(stream()))  # what was spilled belongs to no checkpoint
    assert contents(folder) == whole


def test_what_found_no_room_on_the_disk_is_written_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, left = module.Archive._put_bytes, [1]

    def failing(self: Any, name: str, content: Any) -> None:
        if name.startswith("events") and left:
            left.clear()
            raise StoreError("no room")
        put(self, name, content)

    monkeypatch.setattr(module.Archive, "_put_bytes", failing)
    archive = sr.Archive(tmp_path / "archive", most=3)
    shown = [sr.Impression(f"i{n}", START + n, "u1", "p1") for n in range(8)]
    with pytest.raises(StoreError, match="no room"):
        archive.add(shown[:4])
    archive.add(shown[4:])
    archive.cut()
    archive.write()
    archive.commit(1, 1)
    assert everything(archive.read("events")) == shown


def test_what_an_interrupted_write_has_left_is_in_no_ones_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, away = tmp_path / "disk", tmp_path / "away"

    def lose(descriptor: int) -> None:
        place.rename(away)  # so that it cannot be removed, either
        raise OSError("gone")

    archive = sr.Archive(place / "archive")
    shown = [sr.Impression(f"i{n}", START + n, "u1", "p1") for n in range(8)]
    archive.add(shown)
    archive.cut()
    place.mkdir()
    archive.begin()
    monkeypatch.setattr("streamrec.storage._folders._sync_directory", lambda path: None)
    monkeypatch.setattr(os, "fsync", lose)
    with pytest.raises(UnreachableError, match="gone"):
        archive.write()
    monkeypatch.undo()
    assert [*away.rglob("*.tmp")]
    away.rename(place)
    archive.write()
    archive.commit(1, 1)
    assert everything(archive.read("events")) == shown


class Offer(sr.Impression, frozen=True, tag="offer"):
    """An impression of a user's own kind."""

    campaign: str = "spring"


def test_whatever_stands_in_an_event_is_archived(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    features: list[dict[str, Any]] = [
        {"text": 'a "quoted"\nline \\ \x00 \u2028 \u00e9'},
        {"vector": np.arange(2.0), "count": np.int64(3), "set": {1}, "nan": float("nan")},
        {"half": "\ud800", "price": 2.5},
        {"large": 2**80, "nested": {"deep": [1, {"x": None}]}},
        endless,
        {"object": object()},
        {},
    ]
    shown = [sr.Impression(f"i\x00{n}", START + n, "u\n\u00e9", "", one) for n, one in enumerate(features)]
    told = [sr.Feedback("f\x00", "i\x000", START + 9.0, 'a "kind"', 0.5), sr.Feedback("f2", "i\x000", START + 9.0)]
    archive = sr.Archive(tmp_path / "archive")
    for events in ([shown[0]], [*shown[1:], *told], [Offer("o1", START + 10.0, "u1", "p1", {"a": 1.0}, 0.5)]):
        archive.add(events)
    archive.cut()
    archive.write()
    archive.commit(1, 1)
    found = everything(archive.read("events"))
    assert [one.id for one in found] == [*(one.id for one in shown), "f\x00", "f2", "o1"]
    assert found[0] == shown[0] and found[6] == shown[6] and found[7:9] == told
    assert found[1].features == {"vector": [0.0, 1.0], "count": 3, "set": [1], "nan": None}
    assert found[2].features == {"half": "?", "price": 2.5}
    assert found[3].features["nested"] == {"deep": [1, {"x": None}]} and "again" in found[4].features
    assert found[9] == sr.Impression("o1", START + 10.0, "u1", "p1", {"a": 1.0}, 0.5)


@pytest.mark.parametrize("dataset", ["events", "labeled", "dead"])
def test_each_reading_is_a_source(kept: Path, whole: dict[str, list[Any]], dataset: str) -> None:
    archive = sr.Archive(kept / "archive")
    check_source(lambda: archive.read(dataset))


def test_learning_from_the_archive_is_learning_from_the_stream(kept: Path, whole: dict[str, list[Any]]) -> None:
    events = [one for one in stream() if isinstance(one, (sr.Impression, sr.Feedback))]
    plain = sr.OnlineTrainer(
        model=sr.FM(SCHEMA, dim=4),
        join=sr.LabelJoin(windows={"click": 300.0}),
        preprocessors=[sr.Dedup(ttl=1e6, capacity=9999)],
    )
    again = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), join=sr.LabelJoin(windows={"click": 300.0}))
    plain.push(events)
    source = sr.Archive(kept / "archive").read("events")
    again.push([one for one in everything(source) if not one.id.startswith("l")])
    assert again.report().counts["learned"] == plain.report().counts["learned"]


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of pandas, by Dask
def test_dask_reads_it(kept: Path, whole: dict[str, list[Any]]) -> None:
    dataframe = pytest.importorskip("dask.dataframe")
    archive = sr.Archive(kept / "archive")
    frame = dataframe.read_parquet(archive.files("labels"))
    # here, and not by a client that another test has left, whose workers are gone
    assert len(frame.compute(scheduler="synchronous")) == len(whole["labeled"])
    clicked = frame[frame.label > 0].compute(scheduler="synchronous")
    assert len(clicked) == sum(one.label > 0 for one in whole["labeled"])
    events = dataframe.read_parquet(archive.files("events"))
    hours = events.time.floordiv(3600).compute(scheduler="synchronous").value_counts()
    assert hours.to_dict() == Counter(one.time // 3600 for one in whole["events"])


def test_an_archive_of_another_run_is_not_written_over(tmp_path: Path, kept: Path, whole: dict[str, list[Any]]) -> None:
    archive = sr.Archive(kept / "archive")
    with pytest.raises(StoreError, match="another run"):
        trainer_of(tmp_path / "other", archive=archive).run(sr.Memory(stream()))
    with pytest.raises(ConfigError, match="give a store"):
        sr.OnlineTrainer(model=sr.FM(SCHEMA), archive=archive)
    with pytest.raises(ConfigError, match="no dataset"):
        archive.files("clicks")


def test_letters_without_their_bytes(tmp_path: Path) -> None:
    archive = sr.Archive(tmp_path / "archive", raw=False)
    trainer_of(tmp_path, archive=archive).run(sr.Memory(stream()))
    assert {(one.reason, one.raw) for one in everything(archive.read("dead"))} == {("malformed", b"")}


SECRET = "u3-whose-name-must-go"


@pytest.mark.parametrize("expires", [False, True])
def test_a_forgotten_user_is_in_no_file(tmp_path: Path, expires: bool) -> None:
    schema = sr.Schema(sr.Id("user", ttl="30d" if expires else None), sr.Id("item"))
    events: list[Any] = []
    for event in stream():
        if isinstance(event, sr.Impression) and event.user == "u3":
            event = sr.Impression(event.id, event.time, SECRET, event.item, event.features, event.score)
        events.append(event)
    events.insert(40, sr.DeadLetter({"offset": 5}, "bad id", f'{{"user": "{SECRET}"'.encode()))
    trainer = trainer_of(
        tmp_path,
        model=sr.FM(schema, dim=4),
        preprocessors=[sr.Dedup(ttl=1e6, capacity=10_000), sr.RateLimit(most=1000, within="1h"), sr.History()],
    )
    source = sr.Memory(events)
    trainer.run(source)
    assert traces(tmp_path, SECRET)
    before = trainer.report()
    gone = trainer.forget(SECRET, source.position())
    assert gone["rows"] > 1 and gone["History"] > 3 and gone["RateLimit"] == 1 and gone["archive"] > 15
    assert traces(tmp_path, SECRET) == []
    assert trainer.report().counts["pending"] < before.counts["pending"]
    assert trainer.forget(SECRET, source.position())["rows"] == 0
    left = {one.user for one in contents(tmp_path)["events"] if isinstance(one, sr.Impression)}
    assert SECRET not in left and "u2" in left
    resumed = trainer_of(
        tmp_path,
        model=sr.FM(schema, dim=4),
        preprocessors=[sr.Dedup(ttl=1e6, capacity=10_000), sr.RateLimit(most=1000, within="1h"), sr.History()],
    )
    assert resumed.resume() == source.position()
    later = [sr.Impression(f"later{n}", START + 13_000.0 + n, user, "p1") for n, user in enumerate([SECRET, "u2"])]
    assert np.isfinite(sr.Scorer(tmp_path / "store").score(later)).all()
    scores = resumed.push(later)
    assert scores == trainer.push(later) and np.isfinite(scores).all()


def traces(folder: Path, user: str) -> list[str]:
    """Files that hold the name of a user, or the hash by which a model knows it."""
    import pyarrow.parquet as pq

    found = []
    wanted = [user.encode(), struct.pack("<q", id_of("user", user))]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":  # packed: by what is in it
                content += repr(pq.read_table(path).to_pylist()).encode()
            found += [str(path) for one in wanted if one in content]
    return found


def test_a_user_behind_a_pseudonym_is_forgotten_by_name(tmp_path: Path) -> None:
    door = sr.Pseudonymize({0.0: b"k" * 16, START + 5000.0: b"j" * 16})
    trainer = trainer_of(tmp_path, preprocessors=[door], join=sr.LabelJoin(windows={"click": 300.0}))
    trainer.run(sr.Memory(stream()))
    users = {one.user for one in contents(tmp_path)["events"] if isinstance(one, sr.Impression)}
    assert set(door.pseudonyms("u3")) <= users and "u3" not in users
    assert trainer.forget("u3")["archive"] > 15
    users = {one.user for one in contents(tmp_path)["events"] if isinstance(one, sr.Impression)}
    assert not set(door.pseudonyms("u3")) & users
    for name in door.pseudonyms("u3"):
        assert traces(tmp_path, name) == []


def test_a_model_that_cannot_forget_says_so(tmp_path: Path) -> None:
    class Stubborn:
        schema = SCHEMA

        def predict(self, batch: Any) -> Any:
            return batch.times.astype("float32") * 0

        def learn(self, batch: Any, labels: Any, weights: Any = None) -> None: ...

        def state_dict(self) -> Any:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(ConfigError, match="cannot forget"):
        sr.OnlineTrainer(model=Stubborn()).forget("u1")
