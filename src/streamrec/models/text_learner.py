"""TextLearner: an encoder that learns by LoRA from the stream, beside it; its vectors change version by version."""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamrec.errors import ConfigError
from streamrec.models._text_learning import Example, Learning
from streamrec.models._text_process import Stopped, TextProcess
from streamrec.models.text_cache import TextCache
from streamrec.models.text_encoder import TextEncoder
from streamrec.models.tuning import AdamW, LoRA
from streamrec.protocols import State

__all__ = ["Example", "TextLearner"]

AT_ONCE = 32  # texts that are renewed in one go: how long it takes to hear that it shall stop


class TextLearner:
    """The texts of a `BertFM` whose encoder learns, too: by LoRA, at a rate of its own, in a process beside the stream.

    Of the rows that the model learns, one in `every` becomes an example: the gradient of its loss by the vector of each
    of its texts. `optimizer.batch_size` examples make a step. After each `steps` steps there is a version: its encoder
    computes the cache's texts again, those used last and most first, and when all are there the model goes over to it,
    between two rows. Until then all vectors are by the version before, so none is ever read beside another version's.

    `texts`: the cache, with the encoder that it begins with, which stays as it is. `queue`: how many examples may wait;
    those for which there is no room are left out and counted. `background`: False: learn, compute and go over at once,
    while the stream waits: then, as everywhere, neither cuts nor a kill change a bit. With the process, when a version
    comes depends on how fast the machine is, and a run that was killed goes on with the version that was served at its
    checkpoint, bit for bit, and with the weights and moments that the process had then; examples in the queue, and
    vectors of a version that was not ready, are lost.

    The process begins with the first example, which takes some seconds, and holds a second copy of the encoder. It has
    one thread, stands behind others where there is `os.nice`, and ends with its parent, however that ends. Where it
    dies itself, another goes on from its last step, and is counted.

    Needs `pip install "streamrec[lora]"`.
    """

    def __init__(
        self,
        texts: TextCache,
        *,
        tune: LoRA | None = None,
        optimizer: AdamW | None = None,
        every: int = 64,
        steps: int = 64,
        queue: int = 256,
        background: bool = True,
    ) -> None:
        for name, value in (("every", every), ("steps", steps), ("queue", queue)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of 1 at least, got {value!r}")
        self.tune = LoRA() if tune is None else tune
        self.optimizer = AdamW(lr=1e-4, weight_decay=0.0) if optimizer is None else optimizer
        self.every, self.steps, self.queue, self.background = every, steps, queue, background
        self.rows = 0
        """How many rows the model has learned, of which one in `every` is an example."""
        self._texts, self._served = texts, texts
        self._adapters = torch.zeros(0)
        here = Learning(texts.encoder, self.tune, self.optimizer)
        self._worker = _Worker(texts, here, steps, queue, background)
        weakref.finalize(self, self._worker.stop)

    # -- vectors -------------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> TextEncoder:
        """By whom the vectors were at first."""
        return self._texts.encoder

    @property
    def served(self) -> TextCache:
        """The cache by the encoder of now."""
        return self._served

    @property
    def version(self) -> str:
        """Whose vectors they are now."""
        return self._served.encoder.version

    @property
    def hidden(self) -> int:
        """How many numbers a vector has."""
        return self._texts.hidden

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 `(n, hidden)`, all by one version."""
        return self._served.vectors(texts)

    @property
    def counts(self) -> Mapping[str, int]:
        """Since this was made: examples that were `learned`, `dropped` because as many as may waited, and `left_out`
        because their step was not finite; `steps`; how often memory ran out, so that fewer go through the model at once
        (`halved`); `versions` that were gone over to; `restarts` of the process that learns."""
        beside = self._worker.beside
        return {**self._worker.counts, "restarts": 0 if beside is None else beside.restarts}

    # -- learning ------------------------------------------------------------------------------------------------------

    def due(self, learns: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Which of the next operations, those marked of which learn a row, are examples; they count as learned."""
        numbers = self.rows + np.cumsum(learns)
        self.rows += int(np.count_nonzero(learns))
        return np.flatnonzero(learns & (numbers % self.every == 0))

    def has_room(self) -> bool:
        """Whether an example would be taken; one that would not is counted as dropped."""
        room = self._worker.has_room()
        if not room:
            self._worker.counts["dropped"] += 1
        return room

    def learn(self, examples: Sequence[Example]) -> None:
        """Take these, or count them as dropped."""
        self._worker.offer(examples)

    def turn(self) -> None:
        """Go over to the next version, if there is one. Warns where learning has failed, once; what is served stays."""
        if self._worker.error is not None:
            error, self._worker.error = self._worker.error, None
            warnings.warn(f"the encoder learns no more: {error!r}", RuntimeWarning, stacklevel=2)
        ready = self._worker.ready
        if ready is not None:
            self._worker.ready = None
            self._adapters, encoder = ready
            self._served = self._worker.cache = self._texts.by(encoder)
            self._worker.counts["versions"] += 1

    def close(self) -> None:
        """End the process; what waits is not learned. `learn` starts another."""
        self._worker.stop()

    # -- saving --------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The arguments but `texts`, as what JSON can hold."""
        names = ("every", "steps", "queue", "background")
        described = {name: msgspec.to_builtins(getattr(self, name)) for name in ("tune", "optimizer")}
        return {**described, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], texts: TextCache) -> TextLearner:
        """The learner of a `config()`, as it was at first."""
        tune, optimizer = msgspec.convert(config["tune"], LoRA), msgspec.convert(config["optimizer"], AdamW)
        return cls(texts, **{**config, "tune": tune, "optimizer": optimizer})

    def twin(self) -> TextLearner:
        """Another one over the same cache, as this was at first."""
        return self.from_config(self.config(), self._texts)

    @property
    def adapters(self) -> Tensor:
        """float32 `(n,)`: LoRA's matrices of the version of now, one after the other; none of the first."""
        return self._adapters

    def state_dict(self) -> State:
        """What learning goes on from; `adapters` are beside it."""
        return {"rows": self.rows, **self._worker.state_dict()}

    def load(self, adapters: Tensor, state: State | None) -> None:
        """Go over to the version of these adapters, and learn on from `state`, or else from there."""
        self._worker.stop()
        adapters = torch.as_tensor(adapters).detach().clone()
        if not torch.equal(adapters, self._adapters):
            encoder = self._worker.here.encoder_of(adapters) if len(adapters) else self._texts.encoder
            self._served = self._worker.cache = self._texts.by(encoder)
            self._adapters = adapters
        self.rows = 0 if state is None else int(state["rows"])
        self._worker.load(adapters, state)


class _Worker:
    """Has a `Learning` take steps and makes versions of what it has learned; knows nothing of the learner, so that its
    thread does not keep that alive."""

    def __init__(self, cache: TextCache, here: Learning, steps: int, room: int, background: bool) -> None:
        self.here, self._steps = here, steps
        self.beside = TextProcess(here) if background else None
        self._learning: Learning | TextProcess = self.beside or here
        self.cache = cache
        """By the encoder of now, whose vectors are kept while those of the next are computed."""
        self._waiting: deque[Example] = deque()
        self._queue: queue.Queue[Example | None] = queue.Queue(room)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.counts = dict.fromkeys(("learned", "dropped", "left_out", "steps", "halved", "versions"), 0)
        self.ready: tuple[Tensor, TextEncoder] | None = None
        self.error: BaseException | None = None

    # -- what is asked from the stream's thread ------------------------------------------------------------------------

    def has_room(self) -> bool:
        return self.beside is None or not self._queue.full()

    def offer(self, examples: Sequence[Example]) -> None:
        """Take these at once, or have the thread take them."""
        for example in examples:
            if self.beside is None:
                self.take(example)
                continue
            try:
                self._queue.put_nowait(example)
            except queue.Full:
                self.counts["dropped"] += 1
        if self.beside is not None and self._thread is None:
            self._stopping = False
            self.beside.go_on()
            self._thread = threading.Thread(target=self._run, name="streamrec text learner", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None or self.beside is None:
            return
        self._stopping = True
        self.beside.stop()
        self._drop()
        self._queue.put(None)
        if thread is not threading.current_thread():
            thread.join()
        self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _run(self) -> None:
        try:
            while not self._stopping:
                example = self._queue.get()
                if example is not None and not self._stopping:
                    self.take(example)
        except Stopped:
            pass
        except BaseException as error:  # the stream goes on, and says so
            self.error = error
            self._drop()  # so that the next finds room, and is told of it

    # -- learning ------------------------------------------------------------------------------------------------------

    def take(self, example: Example) -> None:
        """Learn it with those that wait, if there are enough; make a version, if it is time."""
        self._waiting.append(example)
        if len(self._waiting) < self.here.optimizer.batch_size:
            return
        some = [self._waiting.popleft() for _ in range(self.here.optimizer.batch_size)]
        before = self._learning.cut["gradient"]
        self.counts["learned"] += self._learning.step(some)
        after = self._learning.cut["gradient"]
        for name in ("steps", "left_out", "halved"):
            self.counts[name] += after[name] - before[name]
        if after["steps"] > before["steps"] and after["steps"] % self._steps == 0:
            adapters = self._learning.cut["weights"]
            encoder = self.here.encoder_of(adapters)
            for _ in self.cache.renewals(encoder, AT_ONCE, self._learning.embed):
                if self._stopping:
                    return
            self.ready = adapters, encoder

    # -- saving --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """What it would go on from, with the examples that are too few for a step."""
        some = list(self._waiting)
        rows = [np.stack([one.gradient, one.mean]) for one in some]
        numbers = np.stack(rows) if rows else np.zeros((0, 2, self.cache.hidden), dtype=np.float32)
        return {**self._learning.cut, "waiting": [one.text for one in some], "waiting_numbers": numbers}

    def load(self, adapters: Tensor, state: State | None) -> None:
        """Go on from `state`, or else from these adapters alone."""
        self.ready = self.error = None
        self._waiting.clear()
        self._learning.load(adapters, state)
        if state is not None:
            for text, (gradient, mean) in zip(state["waiting"], state["waiting_numbers"], strict=True):
                self._waiting.append(Example(text, gradient, mean))
