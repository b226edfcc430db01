"""A writer that dies at any moment leaves the version before it, and a reader never sees half of anything."""

from __future__ import annotations

import inspect
import os
import random
import shutil
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamrec.errors import DamagedError, StoreError
from streamrec.storage import DamagedWarning, Shelf, Store


def state_of(number: int) -> dict[str, Any]:
    """A state from which every part tells the version it belongs to."""
    fill = np.full((64, 17), number, dtype=np.float32)
    return {"model": {"weights": fill, "rows": [fill[0].copy(), number]}, "ids": [str(number)] * 50, "number": number}


def whole(number: int, state: dict[str, Any]) -> bool:
    wanted = state_of(number)
    return (
        state["number"] == number
        and state["ids"] == wanted["ids"]
        and state["model"]["rows"][1] == number
        and np.array_equal(state["model"]["weights"], wanted["model"]["weights"])
        and np.array_equal(state["model"]["rows"][0], wanted["model"]["rows"][0])
    )


def newest(shelf: Shelf) -> int:
    found = shelf.read()
    assert found is not None
    version, state = found
    assert whole(version.number, state)
    return version.number


def shelf_in(path: Path, keep: int = 2) -> Shelf:
    return Store(path, keep=keep).checkpoints


class Recorder:
    """Copies the folder before and after each operation that changes it: what a crash there would leave."""

    def __init__(self, shelf: Shelf, copies: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = Path(shelf.uri)
        self.copies = copies
        self.operations: list[str] = []
        self.moments: list[Path] = []
        for name in ("replace", "remove", "fsync"):
            patch.setattr(os, name, self.around(name, getattr(os, name)))

    def around(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any) -> Any:
            self.take()
            result = operation(*args)
            self.operations.append(f"{name} {self.subject(args)}")
            self.take()
            return result

        return recorded

    def subject(self, args: tuple[Any, ...]) -> str:
        if isinstance(args[0], int):
            if stat.S_ISDIR(os.fstat(args[0]).st_mode):
                return "folder"
            (name,) = [path.name for path in self.folder.iterdir() if os.path.samestat(path.stat(), os.fstat(args[0]))]
        else:
            name = Path(args[-1]).name
        return f"{int(name[:10])} {'manifest' if '.json' in name else 'payload'}"

    def take(self) -> None:
        self.moments.append(self.copies / str(len(self.moments)) / "checkpoints")
        shutil.copytree(self.folder, self.moments[-1])


def test_a_crash_between_any_two_operations_leaves_a_good_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = shelf_in(tmp_path / "runs")
    for number in (1, 2):
        shelf.write(state_of(number))

    with monkeypatch.context() as patch:
        recorder = Recorder(shelf, tmp_path / "copies", patch)
        shelf.write(state_of(3))

    assert recorder.operations == [
        "fsync 3 payload",  # the payload is on disk before its name is, and both before the manifest
        "replace 3 payload",
        "fsync folder",
        "fsync 3 manifest",
        "replace 3 manifest",
        "fsync folder",
        "remove 1 manifest",
        "remove 1 payload",
    ]
    seen = [newest(shelf_in(moment.parent)) for moment in recorder.moments]
    assert seen == sorted(seen) and set(seen) == {2, 3}
    for moment, number in zip(recorder.moments, seen, strict=True):
        after_the_crash = shelf_in(moment.parent)
        for later in range(number + 1, number + 4):
            assert after_the_crash.write(state_of(later)).number == later
            assert newest(after_the_crash) == later
        assert len(list(moment.iterdir())) == 4  # nothing of the crash is left


def test_a_crash_at_any_byte_of_a_file_in_the_making_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = shelf_in(tmp_path / "runs")
    shelf.write(state_of(1))
    with monkeypatch.context() as patch:
        recorder = Recorder(shelf, tmp_path / "copies", patch)
        shelf.write(state_of(2))

    cuts = 0
    for moment in recorder.moments:
        for temporary in moment.glob("*.tmp"):
            data = temporary.read_bytes()
            for size in sampled(len(data), 60):
                temporary.write_bytes(data[:size])
                assert newest(shelf_in(moment.parent)) == 1
                cuts += 1
    assert cuts > 100


def sampled(size: int, count: int) -> list[int]:
    """Both ends byte by byte, and some in between."""
    return sorted({*range(min(16, size)), *range(max(0, size - 16), size), *range(0, size, max(1, size // count))})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1 and 2, not to be changed."""
    path = tmp_path_factory.mktemp("written")
    for number in (1, 2):
        shelf_in(path).write(state_of(number))
    return path


def damage(written: Path, to: Path, kind: str, change: Callable[[bytes], bytes]) -> tuple[Shelf, Path]:
    """A copy of what was written in which one file of version 2 is changed."""
    shutil.copytree(written, to)
    shelf = shelf_in(to)
    (path,) = Path(shelf.uri).glob("0000000002*" + (".json" if kind == "manifest" else ".safetensors"))
    path.write_bytes(change(path.read_bytes()))
    return shelf, path


def assert_passed_over(shelf: Shelf, path: Path) -> None:
    with pytest.warns(DamagedWarning, match=f"{path.name} is damaged: .*; version 1 is used instead"):
        assert newest(shelf) == 1
    with pytest.raises(DamagedError):
        shelf.read(2)


@pytest.mark.parametrize("kind", ["payload", "manifest"])
def test_a_file_cut_at_any_byte_is_passed_over(written: Path, tmp_path: Path, kind: str) -> None:
    shelf, path = damage(written, tmp_path / "copy", kind, lambda data: data)
    data = path.read_bytes()

    for size in sampled(len(data), 60):
        path.write_bytes(data[:size])
        assert_passed_over(shelf, path)
    path.write_bytes(data + b"\0")
    assert_passed_over(shelf, path)
    path.write_bytes(data)
    assert newest(shelf) == 2


@pytest.mark.parametrize("kind", ["payload", "manifest"])
def test_a_file_with_any_byte_changed_is_passed_over(written: Path, tmp_path: Path, kind: str) -> None:
    shelf, path = damage(written, tmp_path / "copy", kind, lambda data: data)
    data = path.read_bytes()

    for place in range(len(data)) if kind == "manifest" else sampled(len(data), 100):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        assert_passed_over(shelf, path)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_any_files_gives_a_good_version_or_an_error(
    written: Path, tmp_path: Path, data: st.DataObject
) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(written, copy)
    shelf = shelf_in(copy)
    paths = sorted(Path(shelf.uri).iterdir())
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True)):
        content = path.read_bytes()
        begin = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(content[:begin] + data.draw(st.binary(max_size=8)) + content[begin + 1 :])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            number = newest(shelf)
        except StoreError:
            return

    assert {warning.category for warning in caught} == ({DamagedWarning} if number == 1 else set())
    if number == 2:  # then it was version 1 that was hit, or what was drawn is what stood there
        for path in Path(shelf.uri).glob("0000000002*"):
            assert path.read_bytes() == (written / path.relative_to(copy)).read_bytes()


_WRITER = f"""
from __future__ import annotations
import sys
from typing import Any
import numpy as np
from streamrec.storage import Store

{inspect.getsource(state_of)}

shelf = Store(sys.argv[1], keep=int(sys.argv[2])).checkpoints
latest = shelf.latest()
number = 1 if latest is None else latest.number + 1
while True:
    assert shelf.write(state_of(number)).number == number
    number += 1
"""


@pytest.mark.parametrize("keep", [1, 3])
def test_a_writer_killed_again_and_again_is_never_noticed_by_a_reader(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "runs"
    shelf = shelf_in(path, keep)
    rng = random.Random(keep)
    last = 0
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(keep)])
        try:
            wanted = last + rng.randint(1, 40)
            while last < wanted:
                assert writer.poll() is None, "the writer failed"
                if shelf.latest() is None:
                    time.sleep(0.01)
                    continue
                number = newest(shelf)  # raises for an error, and for a warning too
                assert number >= last
                last = number
            time.sleep(rng.random() * 0.02)
        finally:
            writer.kill()
            writer.wait()
        number = newest(shelf)
        assert number >= last
        last = number

    for number in range(last + 1, last + 1 + keep + 2):
        assert shelf.write(state_of(number)).number == number
    assert len(os.listdir(shelf.uri)) == 2 * keep  # nothing of the killed writers is left
