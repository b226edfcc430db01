"""Saver: cuts a model's state out of the stream, and writes it in one thread while the stream goes on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from streamrec.errors import DamagedError
from streamrec.protocols import Model, State
from streamrec.storage import DamagedWarning, Shelf, Version, resolve

__all__ = ["Cut", "Saver"]


class Cut(NamedTuple):
    """What is to be written: a copy, so that the stream can go on.

    `base`: the version that `state` is changes of, `copied`: the state of the model that it is changes of; both None
    where it is whole. `published`: whether it is for scorers.
    """

    state: State
    info: Mapping[str, Any]
    base: int | None
    published: bool
    copied: State | None = None


class Saver:
    """Knows which versions a model's next changes are made to, and does one piece of writing at a time in a thread.

    Changes are made to the last version that this model was written as, or was read from; after a failure, and for a
    model without `changes`, the whole state is written. It is written whole too where the changes before weighed more
    than half of it.

    A large table is not copied while the stream waits, either: the thread copies it as it is being learned, and the
    rows that were learned since the copy began, which may be half old and half new in it, are put right by the changes
    that are cut when it is done.
    """

    def __init__(self, model: Model) -> None:
        self._model: Any = model
        self._bases: dict[bool, int | None] = {}
        self._whole: dict[bool, int] = {}  # bytes of the last whole version
        self._copies: dict[bool, State] = {}  # taken since the mark while the stream went on
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # -- what is written -----------------------------------------------------------------------------------------------

    @property
    def _follows(self) -> bool:
        return hasattr(self._model, "changes") and hasattr(self._model, "mark")

    def cut(self, *, published: bool) -> tuple[State, int | None, State | None]:
        """The model's state now, or its published part; the version or the copy that it is changes of."""
        model = self._model
        # forgotten until this is written: after a failure the next is whole
        base, copied = self._bases.pop(published, None), self._copies.pop(published, None)
        if base is not None or copied is not None:
            state = model.changes(published)
        else:
            state = getattr(model, "published", model.state_dict)() if published else model.state_dict()
        if self._follows:
            model.mark(published)
        return state, base, copied

    def write(self, shelf: Shelf, cut: Cut) -> Version:
        """Write what was cut, the last thing to be cut of its kind. Raises `StoreError`."""
        state = cut.state if cut.copied is None else resolve([{"model": cut.copied}, cut.state])
        version = shelf.write(state, cut.info, cut.base)
        if not self._follows:
            return version
        if version.base is None:
            self._whole[cut.published] = version.bytes
        if version.base is None or 2 * version.bytes <= self._whole.get(cut.published, 2 * version.bytes):
            self._bases[cut.published] = version.number
        return version

    def compact(self, shelf: Shelf, *, published: bool) -> None:
        """Cut the chain of a shelf short, if it has grown. Raises `StoreError`."""
        if not self._follows:
            return
        try:
            made = shelf.compact()
        except DamagedError as error:
            warnings.warn(f"{error}; the next is written whole", DamagedWarning, stacklevel=2)
            self._bases.pop(published, None)
        else:
            if made is not None:
                self._whole[published] = made.bytes

    def forget(self) -> None:
        """The model has become another one: the next versions are whole."""
        self._bases.clear()
        self._whole.clear()
        self._copies.clear()

    def resumed(self, version: Version) -> None:
        """The model has just become this checkpoint: the next may be its changes."""
        self.forget()
        if self._follows:
            self._model.mark(False)
            self._bases[False] = version.number
            if version.base is None:
                self._whole[False] = version.bytes

    # -- while the stream goes on --------------------------------------------------------------------------------------

    def prepared(self) -> bool:
        """Whether cutting now takes no longer than the changes do; else a copy is begun, to ask again when it is done.

        Nothing may be under way.
        """
        if not (self._follows and hasattr(self._model, "live")):
            return True
        missing = [which for which in (True, False) if which not in self._bases and which not in self._copies]
        if not missing:
            return True
        live = {}
        for which in missing:
            self._model.mark(which)
            live[which] = self._model.live(which)

        def copy() -> None:
            copies = {which: _copied(state) for which, state in live.items()}
            self._copies.update(copies)

        self.start(copy)
        return False

    @property
    def busy(self) -> bool:
        """Whether something is being written. Raises what went wrong with the last writing, once."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()
        return self._thread is not None

    def start(self, work: Callable[[], object]) -> None:
        """Do this in a thread. A process that ends waits for it; nothing else may be under way."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="streamrec checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until all is written. Raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.detach().clone() if hasattr(value, "detach") else value
