"""A store that is away for a while: the run goes on learning, and nothing is lost, learned twice or decided wrongly."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import streamrec as sr
from streamrec.errors import ConfigError, StoreError, UnreachableError
from streamrec.testing._state import first_difference
from streamrec.trainers import Gate
from tests.trainers.test_gate import HOUR, TAIL, events, reasons

BATCH = 5
AWAY = range(200, 500)  # events


class Bucket(MemoryFileSystem):
    """Does not answer whom `refuses` says: asked with the name of what is done, and the path."""

    protocol = "bucket"
    store: dict[str, Any] = {}  # noqa: RUF012  # of fsspec
    pseudo_dirs = [""]  # noqa: RUF012
    refuses: Callable[[str, str], bool] | None = None

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("ls", "cat_file", "pipe_file", "rm_file", "exists", "find", "_open", "makedirs"):
            return found

        def asked(path: str, *args: Any, **named: Any) -> Any:
            refuses = Bucket.refuses
            if refuses is not None and refuses(name, str(path)):
                raise OSError(f"no answer to {name} {path}")
            return found(path, *args, **named)

        return asked


@pytest.fixture(name="bucket")
def _bucket(tmp_path: Path) -> Iterator[str]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    try:
        yield f"bucket://{tmp_path.name}"
    finally:
        Bucket.refuses = None
        Bucket.store.clear()


class Killed(BaseException):
    """Not an Exception: nobody catches it."""


class Ticking(sr.Memory):
    """A source whose clock goes on by a second with each read, and that tells how many events it has given before.

    What is being written then has been: so that a test knows what a thread has done.
    """

    def __init__(self, items: Any, told: Callable[[int], None] = lambda given: None) -> None:
        super().__init__(items)
        self.told, self.now, self.released = told, 0.0, [-1]
        self.trainer: sr.OnlineTrainer | None = None

    def clock(self) -> float:
        return self.now

    def release(self, position: Any) -> None:
        self.released.append(position["index"])

    def read(self, limit: int) -> Any:
        self.now += 1.0
        thread = None if self.trainer is None else self.trainer._saver._thread
        if thread is not None:
            thread.join()
        self.told(self._index)
        return super().read(limit)


@pytest.fixture(name="make")
def _make(make_trainer: Any) -> Callable[..., sr.OnlineTrainer]:
    def make(source: Ticking, place: str, **more: Any) -> sr.OnlineTrainer:
        settings = {
            "store": sr.Store(f"{place}/store", keep=2),
            "archive": sr.Archive(f"{place}/archive", compact=3),
            "checkpoint_every": 40,
            "batch_size": BATCH,
            "clock": source.clock,
        }
        source.trainer = make_trainer(**{**settings, **more})
        return source.trainer

    return make


@pytest.fixture(name="stream", scope="module")
def _stream(make_stream: Any) -> Any:
    return make_stream(3, 400)


def archived(place: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name in ("events", "labeled", "dead"):
        source = sr.Archive(f"{place}/archive").read(name)
        found[name] = []
        while some := source.read(100):
            found[name] += some
    return found


def named(place: str) -> tuple[set[str], set[str]]:
    """The files that an archive names, and those that there are."""
    fs, root = fsspec.url_to_fs(f"{place}/archive")
    names = {name for data in ("events", "labels", "dead") for name in sr.Archive(f"{place}/archive").files(data)}
    there = {str(fs.unstrip_protocol(path)) for path in fs.find(root) if not str(path).endswith(".json")}
    return names, there


@pytest.fixture(name="check", scope="module")
def _check(
    tmp_path_factory: pytest.TempPathFactory, stream: Any, make_trainer: Any, canonical: Any
) -> Callable[[sr.OnlineTrainer, str], None]:
    """That a run has ended as one that nothing disturbed: in memory, in the store, and in the archive."""
    folder = str(tmp_path_factory.mktemp("whole"))
    whole = make_trainer(store=f"{folder}/store", archive=f"{folder}/archive", batch_size=BATCH)
    whole.run(sr.Memory(stream))
    expected, rows = state_of(whole.state_dict(), canonical), archived(folder)
    assert len(rows["events"]) > 400 and len(rows["dead"]) > 10 and len(rows["labeled"]) > 300

    def check(trainer: sr.OnlineTrainer, place: str) -> None:
        assert trainer.store is not None
        saved = trainer.store.checkpoints.read()
        assert saved is not None and saved[1]["position"] == {"index": len(stream)}
        for state in (trainer.state_dict(), {k: v for k, v in saved[1].items() if k != "position"}):
            assert first_difference(expected, state_of(state, canonical)) is None
        counts = {name: n for name, n in trainer.report().counts.items() if name != "failed_checkpoints"}
        assert counts == whole.report().counts
        assert archived(place) == rows
        names, there = named(place)
        assert names == there

    return check


def state_of(state: Any, canonical: Any) -> Any:
    found = canonical(state)
    found.pop("archive")  # its parts end where checkpoints were cut
    return found


def put_away(place: Path) -> None:
    """A file where a folder was: nothing in it can be read or written, not by root either."""
    place.rename(place.with_suffix(".away"))
    place.write_bytes(b"")


def give_back(place: Path) -> None:
    place.unlink()
    place.with_suffix(".away").rename(place)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("killed", [0, 400, 700])
def test_a_run_outlives_the_folder_of_its_store(
    tmp_path: Path,
    make: Any,
    stream: Any,
    check: Any,
    caplog: pytest.LogCaptureFixture,
    background: bool,
    killed: int,
) -> None:
    place = tmp_path / "disk"

    def told(given: int) -> None:
        if given == AWAY.start:
            put_away(place)
        if given == AWAY.stop:
            give_back(place)
        if given == killed > 0:
            raise Killed

    source = Ticking(stream, told)
    trainer = make(source, str(place), background=background)
    with caplog.at_level(logging.INFO, "streamrec"):
        if killed:
            with pytest.raises(Killed):
                trainer.run(source)
            if killed in AWAY:
                give_back(place)
            source = Ticking(stream)
            trainer = make(source, str(place), background=background)
        report = trainer.run(source)
    check(trainer, str(place))
    told_of = [one.getMessage() for one in caplog.records if one.name.startswith("streamrec.trainers")]
    assert [text[:27] for text in told_of] == ["a checkpoint could not be w", "checkpoints are written aga"][
        : 1 if killed in AWAY else 2
    ]
    assert "for 300 s: " in told_of[0] and str(place) in told_of[0]
    # of an outage of 60 s, in which one was due every 8 s
    assert killed or 5 <= report.counts["failed_checkpoints"] <= 8
    assert source.released == sorted(source.released)


def test_no_position_is_released_before_it_is_on_disk(bucket: str, make: Any, stream: Any) -> None:
    def told(given: int) -> None:
        if given == AWAY.start:
            on_disk.extend(one.number for one in trainer.store.checkpoints.list())
            Bucket.refuses = lambda what, path: True
        if AWAY.start < given <= AWAY.stop:
            assert source.released[-1] <= AWAY.start
        if given == AWAY.stop:
            Bucket.refuses = None

    on_disk: list[int] = []
    source = Ticking(stream, told)
    trainer = make(source, bucket)
    trainer.run(source)
    assert len(on_disk) > 2 and source.released[-1] > AWAY.stop


@pytest.mark.parametrize(
    "what",
    [
        *("/archive", "/manifest", "pipe_file .*/manifest", "/parts-", "rm_file .*/archive"),
        *("/store/checkpoints", "/store/versions"),
    ],
)
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of versions that cannot be removed
def test_a_part_of_it_is_away(bucket: str, make: Any, stream: Any, check: Any, what: str, background: bool) -> None:
    def told(given: int) -> None:
        if given == AWAY.start:
            Bucket.refuses = lambda name, path: bool(re.search(what, f"{name} {path}"))
        if given == AWAY.stop:
            Bucket.refuses = None

    source = Ticking(stream, told)
    trainer = make(source, bucket, background=background)
    assert trainer.run(source).counts["failed_checkpoints"] > 0
    check(trainer, bucket)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("every", [2, 3, 7])
def test_every_so_many_requests_fail(bucket: str, make: Any, stream: Any, check: Any, every: int) -> None:
    asked = 0

    def refuses(name: str, path: str) -> bool:
        nonlocal asked
        asked += 1
        return asked % every == 0

    def told(given: int) -> None:
        if given == 50:
            Bucket.refuses = refuses
        if given == 800:
            Bucket.refuses = None

    source = Ticking(stream, told)
    trainer = make(source, bucket)
    assert trainer.run(source).counts["failed_checkpoints"] > 0
    check(trainer, bucket)


def test_nothing_is_written_to_a_folder_that_is_empty_all_at_once(
    tmp_path: Path, make: Any, stream: Any, check: Any
) -> None:
    place, away = tmp_path / "disk", tmp_path / "unmounted"

    def told(given: int) -> None:
        if given == AWAY.start:
            place.rename(away)
            place.mkdir()
        if given == AWAY.stop:
            assert not [*place.rglob("*.json")] and not [*place.rglob("*.parquet")]
            shutil.rmtree(place)
            away.rename(place)

    source = Ticking(stream, told)
    trainer = make(source, str(place), archive=sr.Archive(place / "archive", most=200))
    assert trainer.run(source).counts["failed_checkpoints"] > 4
    check(trainer, str(place))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("patience", [0.0, 20.0])
def test_after_its_patience_the_error_ends_the_run(
    bucket: str, make: Any, stream: Any, check: Any, background: bool, patience: float
) -> None:
    since: list[float] = []

    def told(given: int) -> None:
        if given == AWAY.start:
            Bucket.refuses = lambda what, path: True
        if trainer._checkpoints.outage.failed and not since:
            since.append(source.now)

    source = Ticking(stream, told)
    trainer = make(source, bucket, background=background, store_patience=patience)
    with pytest.raises(UnreachableError, match="no answer to"):
        trainer.run(source)
    failed = trainer.report().counts["failed_checkpoints"]
    if patience:
        assert since[0] + patience - 2 <= source.now <= since[0] + patience + 2 and 3 <= failed <= 6
    else:
        assert not since and failed == 1

    Bucket.refuses = None
    again = Ticking(stream)
    trainer = make(again, bucket)
    trainer.run(again)
    check(trainer, bucket)


def test_a_run_that_ends_meanwhile_says_so_at_once(bucket: str, make: Any, stream: Any, check: Any) -> None:
    def told(given: int) -> None:
        if given == 800:
            Bucket.refuses = lambda what, path: True

    source = Ticking(stream, told)
    trainer = make(source, bucket)
    with pytest.raises(UnreachableError):
        trainer.run(source)
    assert trainer.report().counts["events"] == len(stream)
    Bucket.refuses = None
    trainer.run(source)  # there is nothing left but to save
    check(trainer, bucket)


class Odd(sr.CTR):
    """Holds what no checkpoint can, after a while."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "odd": object() if self.compute() < 2 else 0.0}


def test_what_does_not_pass_ends_the_run_at_once(bucket: str, make: Any, stream: Any, make_trainer: Any) -> None:
    source = Ticking(stream)
    with pytest.raises(StoreError, match="cannot store") as found:
        make(source, bucket, metrics=[Odd()]).run(source)
    assert not isinstance(found.value, UnreachableError) and source._index < 100

    def told(given: int) -> None:
        if given == 200:
            fsspec.filesystem("bucket").pipe_file(f"{bucket}/archive/manifest/archive.json", b"{")

    source = Ticking(stream, told)
    with pytest.raises(StoreError, match=r"archive\.json of .* is damaged"):
        make(source, bucket).run(source)
    assert 200 < source._index < 300
    with pytest.raises(ConfigError, match="store_patience must be >= 0 seconds, got -1"):
        make_trainer(store_patience=-1)


def test_rows_that_cannot_be_archived_are_held_up_to_a_bound(bucket: str, make: Any, stream: Any, check: Any) -> None:
    most: list[int] = []

    def told(given: int) -> None:
        if given == AWAY.start:
            Bucket.refuses = lambda what, path: "archive" in path
        if given == AWAY.stop and len(most) < 2:
            Bucket.refuses = None

    source = Ticking(stream, told)
    trainer = make(source, bucket, archive=sr.Archive(f"{bucket}/archive", compact=3, most=40))
    with pytest.raises(StoreError, match=r"1[0-9]{2} rows wait to be written to bucket://.*most=40"):
        trainer.run(source)
    assert source._index < AWAY.stop

    # there is room for what comes meanwhile, though each 300 are too many to be held when all is well
    Bucket.refuses = None
    source = Ticking(stream, told)
    trainer = make(source, bucket, archive=sr.Archive(f"{bucket}/archive", compact=3, most=300))
    trainer.run(source)
    check(trainer, bucket)


def test_a_loop_of_ones_own_bears_it_too(bucket: str, make: Any, stream: Any, check: Any) -> None:
    source = Ticking(stream)
    trainer = make(source, bucket)
    while some := source.read(BATCH):
        Bucket.refuses = (lambda what, path: True) if source._index in AWAY else None
        trainer.push(some)
        if trainer.checkpoint_due:
            try:
                trainer.checkpoint(source.position())
            except StoreError as error:
                trainer.bear(error)
    trainer.checkpoint(source.position())
    assert 5 <= trainer.report().counts["failed_checkpoints"] <= 12
    check(trainer, bucket)


def gated(source: Ticking, bucket: str) -> sr.OnlineTrainer:
    source.trainer = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=4),
        metrics=[sr.LogLoss()],
        store=sr.Store(bucket, keep=2),
        checkpoint_every=500,
        batch_size=100,
        gate=Gate(worse=0.05, watch=7_000, every=500, patience=20_000),
        clock=source.clock,
    )
    return source.trainer


def test_a_gate_keeps_what_the_checkpoint_on_disk_compares(bucket: str) -> None:
    """Versions are published and decided about while no checkpoint can be written; then the process dies."""

    def told(given: int) -> None:
        if given == 3_000:
            Bucket.refuses = lambda name, path: name == "pipe_file" and "/checkpoints/" in path
        if given == 20_000:
            raise Killed

    source = Ticking(events(0, 24_000), told)
    trainer = gated(source, bucket)
    with pytest.raises(Killed):
        trainer.run(source)
    assert trainer.store is not None and trainer.gate is not None
    found = trainer.store.checkpoints.read()
    assert found is not None and found[1]["counts"]["events"] <= 3_000
    saved = found[1]["gate"]["versions"]
    assert {*filter(None, saved.values())}.isdisjoint(trainer.gate.state_dict()["versions"].values())
    Bucket.refuses = None
    again = gated(source, bucket)
    again.resume()
    assert again.gate is not None and again.gate.state_dict()["versions"] == saved


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("every", [0, 5])
def test_a_gate_decides_when_the_store_is_back(bucket: str, every: int) -> None:
    """A poisoned hour, and the store away when it is found out: wholly, or for every so manieth request."""
    hour = HOUR.stop - HOUR.start
    stream = [*events(0, HOUR.start), *events(HOUR.start, hour, flipped=True), *events(HOUR.stop, TAIL)]
    asked = 0

    def refuses(name: str, path: str) -> bool:
        nonlocal asked
        asked += 1
        return not every or asked % every == 0

    def told(given: int) -> None:
        if given == HOUR.stop:
            Bucket.refuses = refuses
        if given == HOUR.stop + 2_500:
            if not every:
                assert trainer.gate is not None and trainer.gate.regressed
                assert trainer.report().counts["unlearned"] == 0
            Bucket.refuses = None

    source = Ticking(stream, told)
    trainer = gated(source, bucket)
    report = trainer.run(source)
    assert 3 <= report.counts["failed_checkpoints"] <= 6  # in 25 s, though each push of 1 s finds one due
    assert report.counts["unlearned"] > 0
    assert trainer.store is not None and trainer.gate is not None
    goes_back = [why for why in reasons(trainer.store) if "the learner goes back to the checkpoint" in why]
    assert len(goes_back) in ((1,) if not every else (1, 2))  # told, and told again where the next request failed
    state = trainer.gate.state_dict()["versions"]
    assert state["champion"] == trainer.store.served.pinned() and not trainer.gate.regressed
    for version in filter(None, state.values()):
        assert trainer.store.versions.read(version) is not None
    # and whoever starts anew goes on with it
    again = gated(source, bucket)
    assert again.resume() == source.position()
    assert first_difference(trainer.state_dict()["model"], again.state_dict()["model"]) is None
    assert first_difference(trainer.gate.state_dict(), again.gate.state_dict()) is None  # type: ignore[union-attr]
