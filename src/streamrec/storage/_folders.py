"""Folders of files, on a disk or in a bucket: what is written is whole and safe from a power cut, or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from streamrec.errors import ConfigError

__all__ = ["Folder", "folder"]


class Folder(Protocol):
    """Where files are. Failures are `OSError`s."""

    uri: str

    def make(self) -> None:
        """Make it, if it is not there."""
        ...

    def names(self) -> list[str]:
        """What is in it; nothing if it is not there."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> NDArray[np.uint8]:
        """A file's bytes, fresh and writable."""
        ...

    def write(self, name: str, chunks: Sequence[bytes | memoryview], token: str) -> None:
        """Write a file, in the place of one of that name, so that it is whole and safe from a power cut, or as it was.

        `token`: this writer's own.
        """
        ...

    def remove(self, name: str) -> None: ...


class LocalFolder:
    """A directory."""

    def __init__(self, path: str) -> None:
        self.uri = self.path = path

    def make(self) -> None:
        missing = []
        path = self.path
        while not os.path.lexists(path) and path != os.path.dirname(path):
            missing.append(path)
            path = os.path.dirname(path)
        os.makedirs(self.path, exist_ok=True)
        for path in missing:
            _sync_directory(os.path.dirname(path))

    def names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        try:
            os.lstat(os.path.join(self.path, name))
        except FileNotFoundError:
            return False
        return True  # another failure is none of the two

    def read(self, name: str) -> NDArray[np.uint8]:
        with open(os.path.join(self.path, name), "rb") as file:
            data = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
            return data[: file.readinto(data.data)]

    def write(self, name: str, chunks: Sequence[bytes | memoryview], token: str) -> None:
        target = os.path.join(self.path, name)
        temporary = f"{target}.{token}.tmp"
        try:
            with open(temporary, "xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.remove(temporary)
            raise
        _sync_directory(self.path)

    def remove(self, name: str) -> None:
        os.remove(os.path.join(self.path, name))


class RemoteFolder:
    """A prefix of an object store, or what else fsspec knows. On an object store a put is whole or not at all."""

    def __init__(self, fs: Any, path: str) -> None:
        self.fs = fs
        self.path = path
        self.uri = str(fs.unstrip_protocol(path))

    def make(self) -> None:
        with suppress(OSError), _os_errors():  # not all have folders, or let one make them: the next write will tell
            self.fs.makedirs(self.path, exist_ok=True)

    def names(self) -> list[str]:
        with _os_errors():
            self.fs.invalidate_cache(self.path)  # others write here too
            try:
                return [path.rsplit("/", 1)[-1] for path in self.fs.ls(self.path, detail=False)]
            except FileNotFoundError:
                return []

    def exists(self, name: str) -> bool:
        return name in self.names()

    def read(self, name: str) -> NDArray[np.uint8]:
        with _os_errors():
            content: bytes = self.fs.cat_file(f"{self.path}/{name}")
        return np.array(np.frombuffer(content, dtype=np.uint8))  # a copy, to write to

    def write(self, name: str, chunks: Sequence[bytes | memoryview], token: str) -> None:
        with _os_errors():
            self.fs.pipe_file(f"{self.path}/{name}", b"".join(chunks))

    def remove(self, name: str) -> None:
        with _os_errors():
            self.fs.rm_file(f"{self.path}/{name}")


@contextmanager
def _os_errors() -> Iterator[None]:
    """What goes wrong within is an `OSError`: some file systems raise errors of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def folder(uri: str, name: str) -> Folder:
    """The folder `name` in what `uri` names. Raises `ConfigError` for a URI that nothing can open."""
    try:
        fs, path = url_to_fs(uri)
    except ValueError as error:
        raise ConfigError(f"uri must be a path or an fsspec URI, got {uri!r}: {error}") from error
    path = path.rstrip("/") + "/" + name
    return LocalFolder(os.path.abspath(path)) if isinstance(fs, LocalFileSystem) else RemoteFolder(fs, path)


def _sync_directory(path: str) -> None:
    if os.name != "posix":  # elsewhere directories cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
