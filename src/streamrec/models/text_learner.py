"""TextLearner: an encoder that learns by LoRA from the stream, beside it; its vectors change version by version."""

from __future__ import annotations

import hashlib
import queue
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from streamrec.errors import ConfigError
from streamrec.models import _pretrained
from streamrec.models._gradient import Gradient
from streamrec.models._packed import Dropout
from streamrec.models.text_cache import TextCache
from streamrec.models.text_encoder import TextEncoder, one_thread
from streamrec.models.tuning import AdamW, LoRA
from streamrec.protocols import State

__all__ = ["Example", "TextLearner"]

AT_ONCE = 32  # texts that are renewed in one go: how long it takes to hear that it shall stop


class Example(NamedTuple):
    """What an event says of a text. `gradient`: float32 `(hidden,)`, of the loss by the text's vector as the model
    reads it: at length 1, less `mean`, at length 1 again."""

    text: str
    gradient: NDArray[np.float32]
    mean: NDArray[np.float32]


class TextLearner:
    """The texts of a `BertFM` whose encoder learns, too: by LoRA, at a rate of its own, on a thread beside the stream.

    Of the rows that the model learns, one in `every` becomes an example: the gradient of its loss by the vector of each
    of its texts. `optimizer.batch_size` examples make a step. After each `steps` steps there is a version: its encoder
    computes the cache's texts again, those used last and most first, and when all are there the model goes over to it,
    between two rows. Until then all vectors are by the version before, so none is ever read beside another version's.

    `texts`: the cache, with the encoder that it begins with, which stays as it is. `queue`: how many examples may wait;
    those for which there is no room are left out and counted. `background`: False: learn, compute and go over at once,
    while the stream waits: then, as everywhere, neither cuts nor a kill change a bit. With the thread, when a version
    comes depends on how fast the machine is, and a run that was killed goes on with the version that was served at its
    checkpoint, bit for bit, and with the weights and moments that the thread had then; examples in the queue, and
    vectors of a version that was not ready, are lost.

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
        self._worker = _Worker(texts, self.tune, self.optimizer, steps, queue)
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
        """Of this process: examples that were `learned`, `dropped` because as many as may waited, and `left_out`
        because their step was not finite; `steps`, and `versions` that were gone over to."""
        return dict(self._worker.counts)

    # -- learning ------------------------------------------------------------------------------------------------------

    def due(self, learns: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Which of the next operations, those marked of which learn a row, are examples; they count as learned."""
        numbers = self.rows + np.cumsum(learns)
        self.rows += int(np.count_nonzero(learns))
        return np.flatnonzero(learns & (numbers % self.every == 0))

    def has_room(self) -> bool:
        """Whether an example would be taken; one that would not is counted as dropped."""
        room = not self.background or self._worker.has_room()
        if not room:
            self._worker.counts["dropped"] += 1
        return room

    def learn(self, examples: Sequence[Example]) -> None:
        """Take these, or count them as dropped."""
        if not self.background:
            for example in examples:
                self._worker.take(example)
        else:
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
        """Stop the thread; what waits is not learned. `learn` starts it again."""
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
        return {"rows": self.rows, **self._worker.cut, **self._worker.waiting()}

    def load(self, adapters: Tensor, state: State | None) -> None:
        """Go over to the version of these adapters, and learn on from `state`, or else from there."""
        self._worker.stop()
        adapters = torch.as_tensor(adapters).detach().clone()
        if not torch.equal(adapters, self._adapters):
            encoder = self._worker.encoder_of(adapters) if len(adapters) else self._texts.encoder
            self._served = self._worker.cache = self._texts.by(encoder)
            self._adapters = adapters
        self.rows = 0 if state is None else int(state["rows"])
        self._worker.load(adapters, state)


class _Worker:
    """Learns and computes; knows nothing of the learner, so that the thread does not keep that alive.

    `cut`: all that it would go on from, replaced as a whole after each step, so that nobody waits for it.
    """

    def __init__(self, cache: TextCache, tune: LoRA, optimizer: AdamW, steps: int, room: int) -> None:
        self._tune, self._settings, self._steps = tune, optimizer, steps
        self.cache = cache
        """By the encoder of now, whose vectors are kept while those of the next are computed."""
        self._waiting: deque[Example] = deque()
        self._queue: queue.Queue[Example | None] = queue.Queue(room)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._version = cache.encoder.version
        self._encoder = cache.encoder.twin()
        self._module: Any = self._encoder.module
        _pretrained.with_lora(self._module, tune, seed=0)
        weights = {}
        for name, weight in self._module.named_parameters():
            weight.requires_grad_("lora_" in name)
            if "lora_" in name:
                weights[name] = weight
        self._gradient = Gradient(weights, optimizer, seed=0)
        Dropout.put_into(self._module, self._gradient.generator)
        self._module.eval()
        for name, part in self._module.named_modules():
            part.train("lora_dropout" in name)
        self._first = self._flat()
        self.counts = dict.fromkeys(("learned", "dropped", "left_out", "steps", "versions"), 0)
        self.ready: tuple[Tensor, TextEncoder] | None = None
        self.error: BaseException | None = None
        self.cut: State = {}
        self._note()

    # -- what is asked from the stream's thread ------------------------------------------------------------------------

    def has_room(self) -> bool:
        return not self._queue.full()

    def offer(self, examples: Sequence[Example]) -> None:
        for example in examples:
            try:
                self._queue.put_nowait(example)
            except queue.Full:
                self.counts["dropped"] += 1
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="streamrec text learner", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put(None)
        if thread is not threading.current_thread():
            thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()

    def _run(self) -> None:
        try:
            while not self._stopping:
                example = self._queue.get()
                if example is not None and not self._stopping:
                    self.take(example)
        except BaseException as error:  # the stream goes on, and says so
            self.error = error

    # -- learning ------------------------------------------------------------------------------------------------------

    def take(self, example: Example) -> None:
        """Learn it with those that wait, if there are enough; make a version, if it is time."""
        self._waiting.append(example)
        if len(self._waiting) >= self._settings.batch_size:
            some = [self._waiting.popleft() for _ in range(self._settings.batch_size)]
            self._step(some)
            self._note()
            if self._gradient.steps % self._steps == 0:
                made = self._flat(), self._encoder_now()
                while self.cache.renew(made[1], AT_ONCE):
                    if self._stopping:
                        return
                self.ready = made

    def _step(self, some: list[Example]) -> None:
        tokens = self._encoder.tokens([one.text for one in some])
        order = sorted((n for n in range(len(some)) if tokens[n]), key=lambda n: len(tokens[n]))
        left_out = self._gradient.left_out
        if order:

            def loss(part: slice) -> Tensor:
                which = order[part]
                return self._loss([tokens[n] for n in which], [some[n] for n in which]) / len(some)

            with one_thread():
                self._gradient.step(len(order), loss)
            self.counts["steps"] += 1
        self.counts["left_out"] += self._gradient.left_out - left_out
        self.counts["learned"] += len(order) - (self._gradient.left_out - left_out)

    def _loss(self, tokens: Sequence[Sequence[int]], some: Sequence[Example]) -> Tensor:
        """Moves as the examples' losses do with the vectors."""
        device = self._gradient.generator.device
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._encoder.tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(tokens), longest)
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1.0
        ids, mask = ids.to(device), mask.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._settings.bf16):
            states = self._module(input_ids=ids, attention_mask=mask).last_hidden_state  # (texts, tokens, hidden)
        states = states.float()
        pooled = states[:, 0]
        if self._encoder.pooling == "mean":
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        means = torch.from_numpy(np.stack([one.mean for one in some])).to(device)
        gradients = torch.from_numpy(np.stack([one.gradient for one in some])).to(device)
        read = functional.normalize(functional.normalize(pooled, dim=1) - means, dim=1)
        return (read * gradients).sum()

    def _flat(self) -> Tensor:
        return torch.cat([weight.detach().reshape(-1).cpu() for weight in self._gradient.weights.values()])

    def _put(self, adapters: Tensor) -> None:
        if len(adapters) != len(self._first):
            raise ConfigError(
                f"the saved adapters are {len(adapters)} numbers, but those of {self._tune} are {len(self._first)}: "
                "use the tune they were saved with"
            )
        begin = 0
        with torch.no_grad():
            for weight in self._gradient.weights.values():
                weight.copy_(adapters[begin : begin + weight.numel()].view_as(weight))
                begin += weight.numel()

    def _encoder_now(self) -> TextEncoder:
        """By the weights of now. Its version is of the adapters: their product with a matrix may differ in a last digit
        from machine to machine."""
        told = f"streamrec adapted 1 {self._version} {self._tune.rank} {self._tune.alpha} {self._tune.targets}"
        digest = hashlib.sha256(told.encode() + self._flat().numpy().tobytes())
        with one_thread():
            module = _pretrained.merged(self._module).requires_grad_(False).eval()
        return self._encoder.twin(module, digest.hexdigest()[:32])

    def encoder_of(self, adapters: Tensor) -> TextEncoder:
        """By these adapters. Nothing may be learned meanwhile."""
        before = self._flat()
        self._put(adapters)
        try:
            return self._encoder_now()
        finally:
            self._put(before)

    # -- saving --------------------------------------------------------------------------------------------------------

    def _note(self) -> None:
        self.cut = {"weights": self._flat(), "gradient": self._gradient.state_dict()}

    def waiting(self) -> State:
        """The examples that are too few for a step; beside `cut`."""
        some = list(self._waiting)
        rows = [np.stack([one.gradient, one.mean]) for one in some]
        numbers = np.stack(rows) if rows else np.zeros((0, 2, self._encoder.hidden), dtype=np.float32)
        return {"waiting": [one.text for one in some], "waiting_numbers": numbers}

    def load(self, adapters: Tensor, state: State | None) -> None:
        """Go on from `state`, or else from these adapters alone."""
        self.ready = self.error = None
        self._waiting.clear()
        self._gradient.clear()
        if state is None:
            self._put(adapters if len(adapters) else self._first)
        else:
            self._put(torch.as_tensor(state["weights"]))
            self._gradient.load_state_dict(state["gradient"])
            for text, (gradient, mean) in zip(state["waiting"], state["waiting_numbers"], strict=True):
                self._waiting.append(Example(text, gradient, mean))
        self._note()
