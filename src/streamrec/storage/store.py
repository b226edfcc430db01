"""Store: numbered versions of a state, in a folder or a bucket.

A version is two files: `0000000007-5f0c2a91.safetensors`, the payload, and `0000000007.json`, its manifest. The
payload is written first, and the manifest, which holds the payload's name and checksum, makes it count. What has no
manifest is not there. A crash at any moment leaves the versions before it as they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from streamrec.errors import ConfigError, DamagedError, StoreError
from streamrec.protocols import State
from streamrec.storage._pack import pack, unpack

__all__ = ["DamagedWarning", "Shelf", "Store", "Version"]

T = TypeVar("T")

_FORMAT = 1  # of the files; counted up when older releases could not read what this one writes
_TRIES = 10  # how often a reader starts again because what it was about to read has been removed

_OURS = re.compile(r"(?P<number>\d{10,})(?P<kind>\.json|-[0-9a-f]{8}\.safetensors)(?P<temporary>\.[0-9a-f]{8}\.tmp)?")


class DamagedWarning(UserWarning):
    """A version is not as it was written, and an older one is used in its place."""


class Version(msgspec.Struct, frozen=True):
    """One version in a store.

    `number`: 1 for the first; later ones are greater. `created`: POSIX seconds, by the store's clock. `bytes` and
    `sha256`: size and checksum of its payload. `info`: what was written with it.
    """

    number: int
    created: float
    bytes: int
    sha256: str
    info: Mapping[str, Any] = {}


class Store:
    """Checkpoints and published versions, in a folder or a bucket.

    `uri`: a path or any fsspec URI. `keep`: how many versions stay on each shelf; older ones are removed.
    `clock`: gives the POSIX seconds that versions are stamped with. Nothing is read or written before it is asked for.

    One writer and any number of readers at a time. `checkpoints` holds all that a resumed run needs,
    `versions` what a service needs. Raises `ConfigError` for arguments that cannot work.

    >>> store = Store("memory://doc/store")
    >>> store.versions.write({"bias": 0.5}, {"AUC": 0.76}).number
    1
    >>> version, state = store.versions.read()
    >>> version.info, state
    ({'AUC': 0.76}, {'bias': 0.5})
    """

    checkpoints: Shelf
    versions: Shelf

    def __init__(self, uri: str | os.PathLike[str], *, keep: int = 3, clock: Callable[[], float] = time.time) -> None:
        self.uri = os.fspath(uri)
        self.keep = keep
        if not self.uri:
            raise ConfigError("uri must name a folder, got ''")
        if not isinstance(keep, int) or keep < 1:
            raise ConfigError(f"keep must be a whole number >= 1, got {keep!r}")
        self.checkpoints = Shelf(_folder(self.uri, "checkpoints"), keep=keep, clock=clock)
        self.versions = Shelf(_folder(self.uri, "versions"), keep=keep, clock=clock)

    def __repr__(self) -> str:
        return f"Store({self.uri!r}, keep={self.keep})"


class Shelf:
    """Numbered versions of one state. A `Store` has two.

    >>> shelf = Store("memory://doc/shelf", keep=2, clock=lambda: 1700000000.0).checkpoints
    >>> shelf.read() is None
    True
    >>> for step in range(4):
    ...     version = shelf.write({"step": step})
    >>> [version.number for version in shelf.list()]
    [3, 4]
    >>> version, state = shelf.read(3)
    >>> version.created, state
    (1700000000.0, {'step': 2})
    """

    def __init__(self, folder: _Folder, *, keep: int, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._keep = keep
        self._clock = clock

    @property
    def uri(self) -> str:
        """Where its files are."""
        return self._folder.uri

    def __repr__(self) -> str:
        return f"<Shelf {self.uri}>"

    def write(self, state: State, info: Mapping[str, Any] = {}) -> Version:
        """Write the next version, then remove those beyond `keep`. When it returns, the version is on disk.

        `info`: what JSON can hold; `list` gives it without reading the state. Raises `StoreError` for a leaf of `state`
        that cannot be held (see `State`), and where the version cannot be written: the one before stays the newest.
        """
        chunks = pack(state)
        size = sum(chunk.nbytes for chunk in chunks)
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        token = secrets.token_hex(4)  # so that no manifest ever refers to another writer's payload
        try:
            self._folder.make()
            names = self._folder.names()
            self._clean(names)
            numbers = _numbers(names)
            number = numbers[-1] + 1 if numbers else 1
            payload = f"{number:010d}-{token}.safetensors"
            manifest = _encode(Version(number, float(self._clock()), size, digest.hexdigest(), info), payload)
            self._commit(number, payload, chunks, manifest, token)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"cannot write to {self.uri}: {error}; {_cure(error)}") from error
        self._prune([*numbers, number], [*names, payload])
        return _decode(manifest)[0]

    def read(self, number: int | None = None) -> tuple[Version, dict[str, Any]] | None:
        """A version and its state; the newest good one if no number is given, None where there is nothing.

        A newest one that is damaged is passed over with a `DamagedWarning`. Raises `DamagedError` if the one asked
        for is damaged, and `StoreError` if it is not there or if none is good. Arrays and tensors are the caller's
        own, to write to; those of one version share one allocation.
        """
        if number is None:
            return self._newest(self._load)
        if number in self._numbers():
            with suppress(_Removed):
                return self._load(number)
        there = ", ".join(map(str, self._numbers())) or "none"
        raise StoreError(f"{self.uri} has no version {number}; it has {there}")

    def list(self) -> Sequence[Version]:
        """The versions there are, newest last. Payloads are not looked at; a damaged manifest is warned of."""
        versions = []
        damaged = []
        for number in self._numbers():
            try:
                versions.append(self._manifest(number)[0])
            except DamagedError as error:
                damaged.append(error)
            except _Removed:
                continue
        _warn(damaged, "it is left out", stacklevel=3)
        return versions

    def latest(self) -> Version | None:
        """The newest version, None where there is nothing. Warns and raises as `read` does, of manifests alone.

        Cheap: it lists the folder and reads one manifest. Whether the payload is good, only `read` can tell.
        """
        return self._newest(lambda number: self._manifest(number)[0])

    def _newest(self, load: Callable[[int], T]) -> T | None:
        for _ in range(_TRIES):
            numbers = self._numbers()
            damaged: list[DamagedError] = []
            try:
                for number in reversed(numbers):
                    try:
                        found = load(number)
                    except DamagedError as error:
                        damaged.append(error)
                    else:
                        _warn(damaged, f"version {number} is used instead", stacklevel=4)
                        return found
            except _Removed:
                continue  # by the writer, who keeps so many and no more: there are newer ones
            if not numbers:
                return None
            raise StoreError(f"{self.uri} has no good version: {'; '.join(map(str, damaged))}")
        raise StoreError(f"{self.uri}: versions were removed while they were read, {_TRIES} times over; raise `keep`")

    def _numbers(self) -> Sequence[int]:
        try:
            return _numbers(self._folder.names())
        except OSError as error:
            raise StoreError(f"cannot list {self.uri}: {error}") from error

    def _bytes(self, name: str) -> NDArray[np.uint8]:
        try:
            return self._folder.read(name)
        except FileNotFoundError:
            raise
        except OSError as error:  # not damage: it may pass, and an older version would be the wrong answer
            raise StoreError(f"cannot read {self.uri}/{name}: {error}") from error

    def _manifest(self, number: int) -> tuple[Version, str]:
        """A version and the name of its payload."""
        name = _manifest_name(number)
        where = f"{self.uri}/{name}"
        try:
            data = self._bytes(name).tobytes()
        except FileNotFoundError as error:
            raise _Removed from error
        try:
            version, payload = _decode(data)
        except (LookupError, TypeError, ValueError) as error:
            raise DamagedError(f"{where} is damaged: {error}") from error
        except _NewerFormat as error:  # whole, so not to be passed over
            raise StoreError(f"{where} has {error}: upgrade streamrec") from error
        if version.number != number:
            raise DamagedError(f"{where} is damaged: it is the manifest of version {version.number}")
        return version, payload

    def _load(self, number: int) -> tuple[Version, dict[str, Any]]:
        version, payload = self._manifest(number)
        where = f"{self.uri}/{payload}"
        try:
            data = self._bytes(payload)
        except FileNotFoundError as error:
            if not self._folder.exists(_manifest_name(number)):  # manifests are removed before payloads
                raise _Removed from error
            raise DamagedError(f"{where} is missing") from error
        if data.size != version.bytes:
            raise DamagedError(f"{where} is damaged: {data.size} bytes of {version.bytes}")
        digest = hashlib.sha256(data.data).hexdigest()
        if digest != version.sha256:
            raise DamagedError(f"{where} is damaged: its sha256 is {digest}, not {version.sha256}")
        try:
            return version, unpack(data)
        except DamagedError as error:
            raise DamagedError(f"{where} is damaged: {error}") from error

    def _clean(self, names: Sequence[str]) -> None:
        """Remove what crashed writers left: what no manifest refers to, up to the newest number there is.

        A number that has been taken cannot be taken again, so nobody is still writing these.
        """
        numbers = _numbers(names)
        payloads = defaultdict(list)
        leftovers = []
        for name in names:
            match = _OURS.fullmatch(name)
            if match is None or not numbers or int(match["number"]) > numbers[-1]:
                continue
            if match["temporary"]:
                leftovers.append(name)
            elif match["kind"] != ".json":
                payloads[int(match["number"])].append(name)
        for number, rivals in payloads.items():
            if number not in numbers:
                leftovers += rivals
            elif len(rivals) > 1:
                with suppress(DamagedError, _Removed):  # not known which one is meant: then all stay
                    meant = self._manifest(number)[1]
                    leftovers += [name for name in rivals if name != meant]
        self._remove(leftovers)

    def _commit(self, number: int, payload: str, chunks: Sequence[memoryview], manifest: bytes, token: str) -> None:
        name = _manifest_name(number)
        taken = False
        try:
            self._folder.write(payload, chunks, token)
            taken = self._folder.exists(name)
            if taken:
                raise StoreError(f"{self.uri}: another writer has written version {number}; let one write at a time")
            self._folder.write(name, [manifest], token)
        except BaseException:
            with suppress(OSError):
                if taken or not self._folder.exists(name):  # the manifest may have come to be before the failure
                    self._folder.remove(payload)
            raise

    def _prune(self, numbers: Sequence[int], names: Sequence[str]) -> None:
        for number in numbers[: -self._keep]:
            if self._remove([_manifest_name(number)]):  # first: nobody shall see a version without its payload
                self._remove([name for name in names if name.startswith(f"{number:010d}-")])

    def _remove(self, names: Sequence[str]) -> bool:
        failed = []
        for name in names:
            try:
                self._folder.remove(name)
            except FileNotFoundError:
                continue
            except OSError as error:
                failed.append(f"{name} ({error})")
        if failed:
            warnings.warn(f"{self.uri}: could not remove {', '.join(failed)}", RuntimeWarning, stacklevel=4)
        return not failed


class _Removed(Exception):
    """What was listed a moment ago has been removed by the writer since."""


class _NewerFormat(Exception):
    """A manifest that a newer release has written."""


class _Folder(Protocol):
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
        """Write a file so that it is whole and safe from a power cut, or not there. `token`: this writer's own."""
        ...

    def remove(self, name: str) -> None: ...


class _LocalFolder:
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
        return os.path.lexists(os.path.join(self.path, name))

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


class _RemoteFolder:
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


def _folder(uri: str, name: str) -> _Folder:
    try:
        fs, path = url_to_fs(uri)
    except ValueError as error:
        raise ConfigError(f"uri must be a path or an fsspec URI, got {uri!r}: {error}") from error
    path = path.rstrip("/") + "/" + name
    return _LocalFolder(os.path.abspath(path)) if isinstance(fs, LocalFileSystem) else _RemoteFolder(fs, path)


def _sync_directory(path: str) -> None:
    if os.name != "posix":  # elsewhere directories cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_name(number: int) -> str:
    return f"{number:010d}.json"


def _numbers(names: Sequence[str]) -> list[int]:
    """The numbers of the manifests among these files, ascending."""
    matches = [_OURS.fullmatch(name) for name in names]
    return sorted(int(match["number"]) for match in matches if match and match.group() == match["number"] + ".json")


def _seal(body: bytes) -> bytes:
    """A manifest's last member, which is the checksum of all before it."""
    return b',"checksum":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


_SEAL_BYTES = len(_seal(b""))


def _encode(version: Version, payload: str) -> bytes:
    try:
        fields = {"format": _FORMAT, **msgspec.structs.asdict(version), "info": dict(version.info), "payload": payload}
        body = json.dumps(fields, separators=(",", ":"))[:-1].encode()  # json, not msgspec: it keeps nan
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"info must be a mapping that JSON can hold: {error}") from error
    return body + _seal(body)


def _decode(data: bytes) -> tuple[Version, str]:
    """A version and the name of its payload, from its manifest. Raises `ValueError` and the like for what is none."""
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != _seal(body):
        raise ValueError("its checksum does not match")
    fields = json.loads(body + b"}")
    if fields["format"] != _FORMAT:
        raise _NewerFormat(f"format {fields['format']}, and this release reads {_FORMAT}")
    return msgspec.convert(fields, Version), str(fields["payload"])


def _warn(damaged: Sequence[DamagedError], instead: str, *, stacklevel: int) -> None:
    for error in damaged:
        warnings.warn(f"{error}; {instead}", DamagedWarning, stacklevel=stacklevel)


def _cure(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or lower `keep`; what was written before is whole"
    return "give a path or URI that this process may write to"
