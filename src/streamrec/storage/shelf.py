"""Shelf: numbered versions of a state, in a folder or a bucket.

A version is two files: `0000000007-5f0c2a91.safetensors`, the payload, and `0000000007.json`, its manifest. The
payload is written first, and the manifest, which holds the payload's name and checksum, makes it count. What has no
manifest is not there. A crash at any moment leaves the versions before it as they were.

The payload of some versions holds only what has changed since another one, the base, which their manifest names. They
form a chain that ends at a whole version. Nothing that a chain needs is removed, and when its changes have grown, a
version in it is made whole: its new payload is written, and its manifest is replaced by one that names that.
"""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import DamagedError, StoreError, UnreachableError
from streamrec.protocols import State
from streamrec.storage._chain import resolve
from streamrec.storage._folders import Folder
from streamrec.storage._manifest import Manifest, NewerFormat, Version, decode, encode
from streamrec.storage._pack import pack, pack_changes, unpack

__all__ = ["DamagedWarning", "Shelf"]

T = TypeVar("T")

_TRIES = 10  # how often a reader starts again because what it was about to read has been removed

# A chain is cut short when its changes weigh more than its whole version or when it has so many links: so reading takes
# at most about twice the bytes of the whole, and writing the whole at most doubles the bytes of the changes.
_HEAVY = 1.0
_LINKS = 64

_OURS = re.compile(r"(?P<number>\d{10,})(?P<kind>\.json|-[0-9a-f]{8}\.safetensors)(?P<temporary>\.[0-9a-f]{8}\.tmp)?")


class DamagedWarning(UserWarning):
    """A version is not as it was written, and an older one is used in its place."""


class Shelf:
    """Numbered versions of one state. A `Store` has two, of which `needed` says what must stay beyond `keep`.

    >>> from streamrec.storage import Store
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

    def __init__(
        self,
        folder: Folder,
        *,
        keep: int,
        clock: Callable[[], float],
        needed: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._clock = clock
        self._needed = needed
        self._bases: dict[int, int | None] = {}  # of versions written or looked at by this writer

    @property
    def uri(self) -> str:
        """Where its files are."""
        return self._folder.uri

    def __repr__(self) -> str:
        return f"<Shelf {self.uri}>"

    def write(self, state: State, info: Mapping[str, Any] = {}, base: int | None = None) -> Version:
        """Write the next version, then remove those beyond `keep`. When it returns, the version is on disk.

        `info`: what JSON can hold; `list` gives it without reading the state. `base`: the number of a version of this
        shelf that `state` may hold `Changed` leaves against; where it holds any, only they are written, and a version
        that others are changes of stays for as long as they do.

        Raises `StoreError` for a leaf of `state` that cannot be held (see `State`), where there is no version `base`,
        and where the version cannot be written: the one before stays the newest.

        >>> from streamrec.protocols import Changed
        >>> from streamrec.storage import Store
        >>> shelf = Store("memory://doc/changes").checkpoints
        >>> first = shelf.write({"step": 1, "weights": np.zeros(4)})
        >>> changed = Changed(rows=np.array([2]), values=np.array([5.0]), length=4)
        >>> second = shelf.write({"step": 2, "weights": changed}, base=first.number)
        >>> second.base, shelf.read()[1]
        (1, {'step': 2, 'weights': array([0., 0., 5., 0.])})
        """
        if base is None:
            chunks = pack(state)
        else:
            chunks, changed = pack_changes(state)
            base = base if changed else None  # whole after all
        size, digest = _sum(chunks)
        token = secrets.token_hex(4)  # so that no manifest ever refers to another writer's payload
        try:
            self._folder.make()
            names = self._folder.names()
            self._clean(names)
            numbers = _numbers(names)
            base_token = "" if base is None else self._require(base, numbers).token
            number = numbers[-1] + 1 if numbers else 1
            payload = _payload_name(number, token)
            version = Version(number, float(self._clock()), size, digest, info, base)
            manifest = encode(Manifest(version, payload, token, base_token))
            self._commit(number, payload, chunks, manifest, token)
        except StoreError:
            raise
        except OSError as error:
            raise UnreachableError(f"cannot write to {self.uri}: {error}; {_cure(error)}") from error
        self._bases[number] = base
        self._prune([*names, payload, _manifest_name(number)])
        return decode(manifest).version

    def compact(self) -> Version | None:
        """Where changes have grown, make the version whole that the newest is changes of; None where they have not.

        They have when a chain weighs more than its whole version, or has 64 links. All is done with the files, in the
        memory of one state. The newest version stays changes, so that a reader who holds the one before needs no more
        than those. Returns the version made whole, which keeps its number. A crash at any moment leaves it as it was,
        or whole. Only the writer may call this. Raises `StoreError`, and `DamagedError` if the chain is damaged: then
        write a whole version.
        """
        numbers = self._numbers()
        try:
            if not numbers or (base := self._manifest(numbers[-1]).version.base) is None:
                return None
            chain = self._chain(base)
            changes, whole = chain[:-1], chain[-1].version
            if not changes or (sum(c.version.bytes for c in changes) <= _HEAVY * whole.bytes and len(chain) < _LINKS):
                return None
            chunks = pack(resolve([self._payload(one) for one in reversed(chain)]))
        except _Removed as error:
            raise StoreError(f"{self.uri}: versions were removed by another writer; let one write at a time") from error
        size, digest = _sum(chunks)
        token = secrets.token_hex(4)
        payload = _payload_name(base, token)
        before, old = chain[0], chain[0].version
        version = Version(base, old.created, size, digest, old.info)
        try:
            self._folder.write(payload, chunks, token)
            self._folder.write(_manifest_name(base), [encode(Manifest(version, payload, before.token))], token)
        except OSError as error:
            with suppress(OSError):  # of the two payloads, that which the manifest does not name
                self._clean(self._folder.names())
            raise UnreachableError(f"cannot write to {self.uri}: {error}; {_cure(error)}") from error
        self._bases[base] = None
        self._remove([before.payload])
        self._prune(self._names())
        return version

    def read(self, number: int | None = None) -> tuple[Version, dict[str, Any]] | None:
        """A version and its state; the newest good one if no number is given, None where there is nothing.

        A newest one that is damaged is passed over with a `DamagedWarning`. Raises `DamagedError` if the one asked
        for is damaged, and `StoreError` if it is not there or if none is good. Arrays and tensors are the caller's
        own, to write to; those of one version share one allocation.
        """
        return self._asked(self._load, number)

    def _asked(self, load: Callable[[int], T], number: int | None) -> T | None:
        """A version as `load` gives it; the newest good one if no number is given."""
        if number is None:
            return self._newest(load)
        for _ in range(_TRIES):
            if number not in self._numbers():
                break
            with suppress(_Removed):
                return load(number)
        there = ", ".join(map(str, self._numbers())) or "none"
        raise StoreError(f"{self.uri} has no version {number}; it has {there}")

    def changes_since(self, number: int, to: int | None = None) -> tuple[Version, Sequence[State]] | None:
        """The newest good version, or version `to`, as changes of version `number`, oldest first; None where it is not
        made of it.

        For a reader who holds that version: the states hold `Changed` leaves against the one before, and are a small
        part of what `read` reads. None where `read` is needed: the newest is whole, or the changes of another version,
        or `number` itself, and so none. Warns and raises as `read` does.
        """
        found = self._asked(lambda newest: self._load_since(newest, number), to)
        return None if found is None or not found[1] else found

    def list(self) -> Sequence[Version]:
        """The versions there are, newest last. Payloads are not looked at; a damaged manifest is warned of."""
        versions = []
        damaged = []
        for number in self._numbers():
            try:
                versions.append(self._manifest(number).version)
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
        return self._newest(lambda number: self._manifest(number).version)

    def has(self, number: int) -> bool:
        """Whether there is such a version, by the names of the files alone. Raises `StoreError`."""
        return number in self._numbers()

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
                        _warn(damaged, f"version {number} is used instead", stacklevel=5)
                        return found
            except _Removed:
                continue  # by the writer, who keeps so many and no more: there are newer ones
            if not numbers:
                return None
            raise StoreError(f"{self.uri} has no good version: {'; '.join(map(str, damaged))}")
        raise StoreError(f"{self.uri}: versions were removed while they were read, {_TRIES} times over; raise `keep`")

    def _numbers(self) -> Sequence[int]:
        return _numbers(self._names())

    def _names(self) -> Sequence[str]:
        try:
            return self._folder.names()
        except OSError as error:
            raise UnreachableError(f"cannot list {self.uri}: {error}") from error

    def _bytes(self, name: str) -> NDArray[np.uint8]:
        try:
            return self._folder.read(name)
        except FileNotFoundError:
            raise
        except OSError as error:  # not damage: it may pass, and an older version would be the wrong answer
            raise UnreachableError(f"cannot read {self.uri}/{name}: {error}") from error

    def _require(self, base: int, numbers: Sequence[int]) -> Manifest:
        """The manifest of a version that another is to be changes of."""
        if base in numbers:
            with suppress(_Removed):
                return self._manifest(base)
        there = ", ".join(map(str, numbers)) or "none"
        raise StoreError(f"{self.uri} has no version {base} to write changes of; it has {there}; write the whole state")

    def _manifest(self, number: int) -> Manifest:
        name = _manifest_name(number)
        where = f"{self.uri}/{name}"
        try:
            data = self._bytes(name).tobytes()
        except FileNotFoundError as error:
            raise _Removed from error
        try:
            manifest = decode(data)
        except (LookupError, TypeError, ValueError) as error:
            raise DamagedError(f"{where} is damaged: {error}") from error
        except NewerFormat as error:  # whole, so not to be passed over
            raise StoreError(f"{where} has {error}: upgrade streamrec") from error
        version = manifest.version
        if version.number != number:
            raise DamagedError(f"{where} is damaged: it is the manifest of version {version.number}")
        if version.base is not None and not version.base < number:
            raise DamagedError(f"{where} is damaged: it builds on version {version.base}")
        return manifest

    def _chain(self, number: int, until: int | None = None) -> Sequence[Manifest]:
        """The manifests of a version and of those it is changes of: the last is whole, or changes of `until`."""
        chain = [self._manifest(number)]
        while (base := chain[-1].version.base) is not None and base != until:
            try:
                below = self._manifest(base)
            except _Removed as error:
                above = chain[-1]  # made whole or removed meanwhile, if this is the writer's doing
                if self._manifest(above.version.number).payload != above.payload:
                    raise
                raise DamagedError(f"version {number} of {self.uri} needs version {base}, which is missing") from error
            if below.token != chain[-1].base_token:
                raise DamagedError(f"version {number} of {self.uri} needs a version {base} that was another one")
            chain.append(below)
        return chain

    def _load(self, number: int) -> tuple[Version, dict[str, Any]]:
        chain = self._chain(number)
        states = [self._payload(manifest) for manifest in chain]
        try:
            return chain[0].version, states[0] if len(states) == 1 else resolve(states[::-1])
        except DamagedError as error:
            raise DamagedError(f"version {number} of {self.uri} is damaged: {error}") from error

    def _load_since(self, number: int, held: int) -> tuple[Version, Sequence[State]]:
        chain = [] if number <= held else self._chain(number, until=held)
        if not chain or chain[-1].version.base is None:
            return self._manifest(number).version, []
        return chain[0].version, [self._payload(manifest) for manifest in reversed(chain)]

    def _payload(self, manifest: Manifest) -> dict[str, Any]:
        """What the payload of a version holds: a state or changes."""
        version = manifest.version
        where = f"{self.uri}/{manifest.payload}"
        try:
            data = self._bytes(manifest.payload)
        except FileNotFoundError as error:
            if self._manifest(version.number).payload != manifest.payload:  # removed, with or without a new one
                raise _Removed from error
            raise DamagedError(f"{where} is missing") from error
        if data.size != version.bytes:
            raise DamagedError(f"{where} is damaged: {data.size} bytes of {version.bytes}")
        digest = hashlib.sha256(data.data).hexdigest()
        if digest != version.sha256:
            raise DamagedError(f"{where} is damaged: its sha256 is {digest}, not {version.sha256}")
        try:
            return unpack(data)
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
                    meant = self._manifest(number).payload
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

    def only_newest(self) -> None:
        """Remove all versions but the newest, whatever they are kept for. Raises `StoreError` where that is no whole
        one, or one cannot be removed."""
        names = self._names()
        numbers = _numbers(names)
        if not numbers:
            return
        if self._manifest(numbers[-1]).version.base is not None:
            raise StoreError(f"{self.uri}: version {numbers[-1]} is changes of an older one: write a whole one first")
        for number in reversed(numbers[:-1]):
            mine = [_manifest_name(number), *(name for name in names if name.startswith(f"{number:010d}-"))]
            if not self._remove(mine):
                raise StoreError(f"{self.uri}: version {number} could not be removed")
            self._bases.pop(number, None)

    def _prune(self, names: Sequence[str]) -> None:
        """Remove the versions beyond `keep` that no other is made of, the newest of them first.

        Those that are needed elsewhere stay, too. Where `keep` > 1, the whole version before the one that the newest is
        made of stays as well: so that no one damaged file takes all there is.
        """
        numbers = _numbers(names)
        try:
            bases = {number: self._base(number) for number in numbers}
            elsewhere = self._needed()
        except StoreError as error:
            warnings.warn(f"{error}: old versions stay until the next write", RuntimeWarning, stacklevel=3)
            return
        whole = [number for number in numbers if bases[number] is None]
        needed = {*numbers[-self._keep :], *whole[-min(self._keep, 2) :], *elsewhere}
        for number in reversed(numbers):  # what is made of others goes before them
            gone = number not in needed and self._remove(
                [_manifest_name(number)]  # first: nobody shall see a version without its payload
            )
            if gone:
                self._bases.pop(number, None)
                self._remove([name for name in names if name.startswith(f"{number:010d}-")])
            elif (base := bases[number]) is not None:
                needed.add(base)

    def _base(self, number: int) -> int | None:
        """What a version is changes of; None of a damaged one, too. Only the writer, who changes it, may remember."""
        if number not in self._bases:
            with suppress(DamagedError, _Removed):
                self._bases[number] = self._manifest(number).version.base
        return self._bases.get(number)

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


def _manifest_name(number: int) -> str:
    return f"{number:010d}.json"


def _payload_name(number: int, token: str) -> str:
    return f"{number:010d}-{token}.safetensors"


def _sum(chunks: Sequence[memoryview]) -> tuple[int, str]:
    """How many bytes, and their sha256."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return sum(chunk.nbytes for chunk in chunks), digest.hexdigest()


def _numbers(names: Sequence[str]) -> list[int]:
    """The numbers of the manifests among these files, ascending."""
    matches = [_OURS.fullmatch(name) for name in names]
    return sorted(int(match["number"]) for match in matches if match and match.group() == match["number"] + ".json")


def _warn(damaged: Sequence[DamagedError], instead: str, *, stacklevel: int) -> None:
    for error in damaged:
        warnings.warn(f"{error}; {instead}", DamagedWarning, stacklevel=stacklevel)


def _cure(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or lower `keep`; what was written before is whole"
    return "give a path or URI that this process may write to"
