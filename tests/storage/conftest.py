from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """A disk that is full from the `call`-th fsync on."""

    @contextmanager
    def from_call(call: int) -> Iterator[None]:
        calls = itertools.count(1)
        fsync = os.fsync

        def full(descriptor: int) -> None:
            if next(calls) >= call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            yield

    return from_call
