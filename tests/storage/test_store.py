from __future__ import annotations

import errno
import itertools
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from streamrec.errors import ConfigError, DamagedError, StoreError
from streamrec.storage import DamagedWarning, Shelf, Store, Version

_memory = itertools.count()


@pytest.fixture(params=["path", "file://", "memory://"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory://":
        return f"memory://test-store-{next(_memory)}/runs"
    return str(tmp_path / "runs") if request.param == "path" else (tmp_path / "runs").as_uri()


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Store(tmp_path / "runs").checkpoints


def files(shelf: Shelf) -> list[str]:
    return sorted(os.listdir(shelf.uri)) if os.path.isdir(shelf.uri) else []


def payload(shelf: Shelf, number: int) -> Path:
    (path,) = Path(shelf.uri).glob(f"{number:010d}-*.safetensors")
    return path


def manifest(shelf: Shelf, number: int) -> Path:
    return Path(shelf.uri) / f"{number:010d}.json"


def read(shelf: Shelf, number: int | None = None) -> tuple[Version, dict[str, Any]]:
    found = shelf.read(number)
    assert found is not None
    return found


def test_what_is_written_is_read(uri: str) -> None:
    shelf = Store(uri, clock=lambda: 1700000000.25).checkpoints

    written = shelf.write({"weights": np.arange(3.0), "step": 7}, {"AUC": 0.76, "schema": ["user", "item"]})
    version, state = read(shelf)

    assert version == written == shelf.latest() == shelf.list()[-1]
    assert (version.number, version.created) == (1, 1700000000.25)
    assert version.info == {"AUC": 0.76, "schema": ["user", "item"]}
    np.testing.assert_array_equal(state["weights"], np.arange(3.0))
    state["weights"][0] = 5.0  # the caller's own
    assert read(shelf)[1]["weights"][0] == 0.0


def test_the_newest_ones_stay(uri: str) -> None:
    shelf = Store(uri, keep=2).versions

    numbers = [shelf.write({"step": step}).number for step in range(5)]

    assert numbers == [1, 2, 3, 4, 5]
    assert [version.number for version in shelf.list()] == [4, 5]
    assert read(shelf)[1] == {"step": 4}
    assert read(shelf, 4)[1] == {"step": 3}
    with pytest.raises(StoreError, match=r"has no version 1; it has 4, 5"):
        shelf.read(1)


def test_where_nothing_is_nothing_is_read_nor_made(uri: str, tmp_path: Path) -> None:
    store = Store(uri)

    assert store.checkpoints.read() is None
    assert store.checkpoints.latest() is None
    assert list(store.versions.list()) == []
    with pytest.raises(StoreError, match=r"has no version 3; it has none"):
        store.checkpoints.read(3)
    assert os.listdir(tmp_path) == []


def test_shelves_are_apart_and_a_second_store_goes_on(uri: str) -> None:
    store = Store(uri)
    store.checkpoints.write({"step": 1})
    store.checkpoints.write({"step": 2})
    store.versions.write({"step": 3})

    twin = Store(uri)

    assert read(twin.checkpoints)[1] == {"step": 2}
    assert read(twin.versions)[0].number == 1
    assert twin.versions.write({"step": 4}).number == 2


def test_a_relative_path_stays_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("runs/ctr")
    monkeypatch.chdir("/")

    store.checkpoints.write({})

    assert os.listdir(tmp_path / "runs" / "ctr") == ["checkpoints"]
    assert repr(store) == "Store('runs/ctr', keep=3)"


def test_info_may_hold_what_a_metric_gives(shelf: Shelf) -> None:
    shelf.write({}, {"AUC": math.nan, "loss": math.inf, "NE": np.float64(0.5), "note": "\ud800"})

    info = shelf.list()[0].info

    assert math.isnan(info["AUC"])
    assert (info["loss"], info["NE"], info["note"]) == (math.inf, 0.5, "\ud800")


@pytest.mark.parametrize("info", [{"model": object()}, {"AUC": np.float32(1)}, 3])
def test_info_that_json_cannot_hold_is_refused(shelf: Shelf, info: Any) -> None:
    with pytest.raises(StoreError, match=r"info must be a mapping that JSON can hold"):
        shelf.write({}, info)

    assert files(shelf) == []


def test_a_state_that_cannot_be_held_leaves_no_trace(shelf: Shelf) -> None:
    with pytest.raises(StoreError, match=r"/join of type set"):
        shelf.write({"join": {1}})

    assert files(shelf) == []


@pytest.mark.parametrize("keep", [0, -1, 2.5])
def test_keep_is_checked(keep: Any) -> None:
    with pytest.raises(ConfigError, match=r"keep must be a whole number >= 1, got"):
        Store("runs", keep=keep)


def test_uri_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"uri must name a folder"):
        Store("")
    with pytest.raises(ConfigError, match=r"uri must be a path or an fsspec URI, got 'nosuch://runs'"):
        Store("nosuch://runs")


@pytest.mark.parametrize("damage", ["payload", "manifest"])
def test_a_damaged_newest_one_is_passed_over_loudly(shelf: Shelf, damage: str) -> None:
    shelf.write({"step": 1})
    shelf.write({"step": 2})
    path = payload(shelf, 2) if damage == "payload" else manifest(shelf, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.warns(DamagedWarning, match=rf"{path.name} is damaged: .*; version 1 is used instead") as caught:
        version, state = read(shelf)

    assert (version.number, state) == (1, {"step": 1})
    assert len(caught) == 1 and caught[0].filename == __file__  # the reader of the warning is shown their own line
    with pytest.raises(DamagedError, match=path.name):
        shelf.read(2)
    assert shelf.write({"step": 3}).number == 3
    assert read(shelf)[1] == {"step": 3}


def test_a_damaged_manifest_is_left_out_of_the_list(shelf: Shelf) -> None:
    for step in range(3):
        shelf.write({"step": step})
    manifest(shelf, 3).write_bytes(b"{}")

    with pytest.warns(DamagedWarning, match=r"0000000003.json is damaged: .*; it is left out"):
        assert [version.number for version in shelf.list()] == [1, 2]
    with pytest.warns(DamagedWarning, match=r"0000000003.json is damaged: .*; version 2 is used instead"):
        assert shelf.latest() == shelf_version(shelf, 2)


def shelf_version(shelf: Shelf, number: int) -> Version:
    return read(shelf, number)[0]


def test_if_none_is_good_it_is_an_error_and_not_a_fresh_start(shelf: Shelf) -> None:
    shelf.write({"step": 1})
    shelf.write({"step": 2})
    payload(shelf, 1).unlink()
    manifest(shelf, 2).write_bytes(b"")

    with pytest.raises(StoreError, match=r"no good version: .*0000000002.json is damaged.*0000000001-\w+.* is missing"):
        shelf.read()


def test_a_manifest_in_the_wrong_place_is_damage(shelf: Shelf) -> None:
    shelf.write({"step": 1})
    manifest(shelf, 1).rename(manifest(shelf, 9))

    with pytest.raises(DamagedError, match=r"it is the manifest of version 1"):
        shelf.read(9)


def test_what_a_newer_release_wrote_is_not_passed_over(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.write({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr("streamrec.storage._manifest.FORMAT", 3)
        shelf.write({"step": 2})

    with pytest.raises(StoreError, match=r"0000000002.json has format 3, and this release reads 2: upgrade streamrec"):
        shelf.read()
    assert read(shelf, 1)[1] == {"step": 1}


_sprung: list[str] = []


class Trap:
    """Tells if a pickle of it is ever loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _sprung.append, ("sprung",)


@pytest.mark.parametrize("content", ["pickle", "npy", "torch", "garbage", "empty"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_file_swapped_for_another_is_refused_and_never_run(
    shelf: Shelf, tmp_path: Path, content: str, sealed: bool
) -> None:
    import pickle

    import torch

    shelf.write({"step": 1})
    swapped = payload(shelf, 1)
    if content == "pickle":
        swapped.write_bytes(pickle.dumps(Trap()))
    elif content == "npy":
        with swapped.open("wb") as file:
            np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    elif content == "torch":
        torch.save({"trap": Trap()}, swapped)
    else:
        swapped.write_bytes(np.random.default_rng(0).bytes(500) if content == "garbage" else b"")
    if sealed:  # whoever can swap the payload can also write a manifest that fits it
        forge(shelf, swapped)

    with pytest.raises(DamagedError, match=rf"{swapped.name} is damaged"):
        shelf.read(1)

    assert not _sprung


def forge(shelf: Shelf, swapped: Path) -> None:
    import hashlib

    from streamrec.storage._manifest import Manifest, encode

    data = swapped.read_bytes()
    version = Version(1, 0.0, len(data), hashlib.sha256(data).hexdigest())
    manifest(shelf, 1).write_bytes(encode(Manifest(version, swapped.name)))


def test_a_place_that_cannot_be_written_is_named_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    shelf = Store(tmp_path / "file" / "runs").checkpoints

    with pytest.raises(StoreError, match=rf"cannot write to {shelf.uri}: .*give a path or URI"):
        shelf.write({"step": 1})
    with pytest.raises(StoreError, match=rf"cannot list {shelf.uri}"):
        shelf.read()


@pytest.mark.parametrize("call", range(1, 5))
def test_a_full_disk_leaves_the_one_before(shelf: Shelf, full_disk: Any, call: int) -> None:
    shelf.write({"step": 1})
    before = files(shelf)
    with (
        full_disk(call),
        pytest.raises(StoreError, match=rf"cannot write to {shelf.uri}: .*No space left.*free some space"),
    ):
        shelf.write({"step": 2})

    if call < 4:
        assert files(shelf) == before
        assert read(shelf)[1] == {"step": 1}
    else:  # the manifest was in place: not known to survive a power cut, but whole
        assert read(shelf)[1] == {"step": 2}
    shelf.write({"step": 3})
    assert read(shelf)[1] == {"step": 3}


def test_an_interrupt_leaves_no_temporary_file(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(shelf.uri)  # else the first fsync would be its parent's

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shelf.write({"step": 1})

    assert files(shelf) == []


def test_two_writers_never_mix(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = Store(Path(shelf.uri).parent).checkpoints
    shelf.write({"by": "nobody"})
    look = os.lstat

    def overtaken(path: str) -> os.stat_result:
        monkeypatch.setattr(os, "lstat", look)
        rival.write({"by": "rival"})
        return look(path)

    names = shelf._folder.names

    def listed() -> list[str]:  # after the number has been chosen, the rival takes it
        monkeypatch.setattr(os, "lstat", overtaken)
        return names()

    monkeypatch.setattr(shelf._folder, "names", listed)
    with pytest.raises(StoreError, match=r"another writer has written version 2"):
        shelf.write({"by": "us"})
    monkeypatch.undo()

    assert read(shelf)[1] == {"by": "rival"}
    assert len(files(shelf)) == 4  # the refused payload is gone


def test_leftovers_are_ignored_and_removed_in_time(shelf: Shelf) -> None:
    shelf.write({"step": 1})
    folder = Path(shelf.uri)
    ours = ["0000000001-aaaaaaaa.safetensors", "0000000001.json.aaaaaaaa.tmp", "0000000002-bbbbbbbb.safetensors"]
    ours += ["0000000002-cccccccc.safetensors.cccccccc.tmp", "0000000003-dddddddd.safetensors"]
    foreign = ["README.txt", "model.safetensors", "0000000001.json.bak", "1.json"]
    for name in ours + foreign:
        (folder / name).write_bytes(b"half")

    assert read(shelf)[1] == {"step": 1}
    assert [version.number for version in shelf.list()] == [1]

    def left() -> list[str]:
        return [name for name in ours if (folder / name).exists()]

    shelf.write({"step": 2})  # what has number 2 might be another writer's, still at work
    assert left() == ours[2:]
    shelf.write({"step": 3})
    assert left() == ours[4:]
    shelf.write({"step": 4})
    assert left() == []
    assert all((folder / name).exists() for name in foreign)
    assert len(files(shelf)) == 2 * 3 + len(foreign)


def test_payloads_of_a_damaged_manifest_stay(shelf: Shelf) -> None:
    shelf.write({"step": 1})
    extra = Path(shelf.uri) / "0000000001-aaaaaaaa.safetensors"
    extra.write_bytes(b"which of the two was meant is not known")
    manifest(shelf, 1).write_bytes(b"")

    shelf.write({"step": 2})

    assert extra.exists()


def test_what_cannot_be_removed_is_warned_of(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        shelf.write({"step": step})

    def stuck(path: str) -> None:
        raise PermissionError(errno.EACCES, "in use")

    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", stuck)
        with pytest.warns(RuntimeWarning, match=r"could not remove 0000000001.json .*in use") as caught:
            assert shelf.write({"step": 3}).number == 4

    assert caught[0].filename == __file__
    assert [version.number for version in shelf.list()] == [1, 2, 3, 4]
    assert read(shelf, 1)[1] == {"step": 0}  # never a version without its payload
    shelf.write({"step": 4})
    assert [version.number for version in shelf.list()] == [3, 4, 5]


@pytest.mark.parametrize("point", ["manifest", "payload"])
def test_a_version_removed_under_its_reader_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    shelf = Store(tmp_path, keep=1).checkpoints
    writer = Store(tmp_path, keep=1).checkpoints
    writer.write({"step": 1})
    plain = shelf._folder.read
    suffix = ".json" if point == "manifest" else ".safetensors"

    def late(name: str) -> Any:
        if name.startswith("0000000001") and name.endswith(suffix):
            writer.write({"step": 2})
        return plain(name)

    monkeypatch.setattr(shelf._folder, "read", late)

    version, state = read(shelf)

    assert (version.number, state) == (2, {"step": 2})


def test_a_reader_that_is_always_too_late_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Store(tmp_path, keep=1).checkpoints
    writer = Store(tmp_path, keep=1).checkpoints
    writer.write({})
    plain = shelf._folder.read

    def late(name: str) -> Any:
        writer.write({})
        return plain(name)

    monkeypatch.setattr(shelf._folder, "read", late)

    for ask in (shelf.read, shelf.latest):
        with pytest.raises(StoreError, match=r"removed while they were read.*raise `keep`"):
            ask()
    with pytest.raises(StoreError, match=r"has no version"):
        shelf.read(writer.list()[-1].number)
    assert list(shelf.list()) == []


def test_a_read_that_fails_is_not_taken_for_damage(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.write({"step": 1})
    shelf.write({"step": 2})

    def unreachable(name: str) -> Any:
        raise TimeoutError("the network is away")

    monkeypatch.setattr(shelf._folder, "read", unreachable)

    with pytest.raises(StoreError, match=r"cannot read .*0000000002.json: the network is away") as caught:
        shelf.read()
    assert not isinstance(caught.value, DamagedError)


def test_a_bucket_that_fails_in_its_own_way_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Store(f"memory://test-store-{next(_memory)}").checkpoints
    shelf.write({"step": 1})

    class CloudError(Exception):
        pass

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise CloudError("quota")

    for method, ask in (("ls", shelf.read), ("cat_file", shelf.read), ("pipe_file", lambda: shelf.write({}))):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, method, fails)
            with pytest.raises(StoreError, match=r"memory:.*CloudError: quota"):
                ask()
    assert read(shelf)[1] == {"step": 1}


def test_reading_changes_nothing(shelf: Shelf) -> None:
    shelf.write({"step": 1})
    shelf.write({"step": 2})
    (Path(shelf.uri) / "0000000002-aaaaaaaa.safetensors").write_bytes(b"left over")
    before = {name: (Path(shelf.uri) / name).read_bytes() for name in files(shelf)}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shelf.read()
        shelf.list()
        shelf.latest()

    assert {name: (Path(shelf.uri) / name).read_bytes() for name in files(shelf)} == before
