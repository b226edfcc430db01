"""Manifests: what a version is, and which file holds it; sealed by a checksum of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from streamrec.errors import StoreError

__all__ = ["Manifest", "NewerFormat", "Version", "decode", "encode"]

FORMAT = 2
"""Of the files; counted up when older releases could not read what this one writes."""


class Version(msgspec.Struct, frozen=True):
    """One version in a store.

    `number`: 1 for the first; later ones are greater. `created`: POSIX seconds, by the store's clock. `bytes` and
    `sha256`: size and checksum of its payload. `info`: what was written with it. `base`: the number of the version
    whose changes the payload holds; None where it is whole.
    """

    number: int
    created: float
    bytes: int
    sha256: str
    info: Mapping[str, Any] = {}
    base: int | None = None


class Manifest(msgspec.Struct, frozen=True):
    """A version and where it is.

    `payload`: the name of its file. `token`: drawn anew for each state that is written; making a version whole leaves
    it as it is. `base_token`: that of the base, so that changes are never made to another state of the same number.
    """

    version: Version
    payload: str
    token: str = ""
    base_token: str = ""


class NewerFormat(Exception):
    """A manifest that a newer release has written."""


def _seal(body: bytes) -> bytes:
    """A manifest's last member, which is the checksum of all before it."""
    return b',"checksum":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


_SEAL_BYTES = len(_seal(b""))


def encode(manifest: Manifest) -> bytes:
    """The bytes of its file. Raises `StoreError` for an `info` that JSON cannot hold."""
    version = manifest.version
    places = {"payload": manifest.payload, "token": manifest.token, "base_token": manifest.base_token}
    try:
        fields = {"format": FORMAT, **msgspec.structs.asdict(version), "info": dict(version.info), **places}
        body = json.dumps(fields, separators=(",", ":"))[:-1].encode()  # json, not msgspec: it keeps nan
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"info must be a mapping that JSON can hold: {error}") from error
    return body + _seal(body)


def decode(data: bytes) -> Manifest:
    """What `encode` was given. Raises `ValueError` and the like for what it has not written, and `NewerFormat`."""
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != _seal(body):
        raise ValueError("its checksum does not match")
    fields = json.loads(body + b"}")
    if fields["format"] != FORMAT:
        raise NewerFormat(f"format {fields['format']}, and this release reads {FORMAT}")
    places = {name: str(fields[name]) for name in ("payload", "token", "base_token")}
    return Manifest(msgspec.convert(fields, Version), **places)
