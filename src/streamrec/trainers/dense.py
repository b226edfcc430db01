"""Dense: a torch module that learns labeled rows, step by step of an optimizer of torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from streamrec.batch import Batch, LabeledRows
from streamrec.errors import ConfigError
from streamrec.models import FM
from streamrec.models._gradient import Peers
from streamrec.protocols import State
from streamrec.schema import Schema

__all__ = ["Dense", "Peers"]

_SETTINGS = ("batch_size", "bf16", "clip", "seed")
_COLUMNS = ("ids", "values", "fields", "starts", "ends", "text_refs", "times")


class Dense:
    """Makes a model of a torch module: it learns by the gradient of so many rows at a time.

    `module`: an `nn.Module` with a `schema` and `forward(batch) -> Tensor`, the logits `(rows,)`. Where it has
    `loss(rows: LabeledRows) -> Tensor` too, float `(rows,)`, that is what is made less, each row by its weight; else
    the log loss. `optimizer`: makes an optimizer of torch from the parameters that want gradients. An `FM` in the
    module gets rows for new ids before each step, so that they learn.

    `batch_size`: rows of a step. Rows that do not fill one wait for those that come, so that steps do not depend on how
    calls are cut; `flush` learns them too, as `BatchTrainer` does at the end of an epoch. `accumulate`: in how many
    parts a step is computed, which takes less memory and changes only rounding. `bf16`: run `forward` under autocast to
    bfloat16. `clip`: the largest norm of a step's gradient. `seed`: of what is random in the module, drawn anew for
    each part of a step, so that a training that is resumed draws the same.

    A step whose gradient is not finite is left out, and its rows are counted. `predict` is by steps of `batch_size`
    rows; matrix products may round a row otherwise in another company. Raises `ConfigError`.

    >>> from streamrec import Id, Impression, Schema
    >>> from streamrec.preprocessors import encode
    >>> model = Dense(FM(Schema(Id("user")), dim=4), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=2)
    >>> shown = encode(model.schema, [Impression(f"i{n}", 0.0, "u1", "p9") for n in range(3)]).batch
    >>> before = model.predict(shown)
    >>> model.learn(shown, np.ones(3, dtype=np.float32))
    >>> bool((model.predict(shown) > before).all()), model.steps, model.held
    (True, 1, 1)
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        batch_size: int = 256,
        accumulate: int = 1,
        bf16: bool = False,
        clip: float | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(module, nn.Module) or not isinstance(getattr(module, "schema", None), Schema):
            raise ConfigError(f"module must be an nn.Module with a schema, got a {type(module).__name__}")
        for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value!r}")
        if clip is not None and not 0 < clip < math.inf:
            raise ConfigError(f"clip must be a norm > 0, or None, got {clip!r}")
        if seed < 0:
            raise ConfigError(f"seed must be >= 0, got {seed!r}")
        self.module = module
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.bf16 = bf16
        self.clip = clip
        self.seed = seed
        self.rate = 1.0
        """What multiplies the optimizer's learning rates. A schedule sets it; no part of the state."""
        self.steps = 0
        """Steps taken or left out so far."""
        self.left_out = 0
        """Rows of steps that were left out because their gradient was not finite."""
        self._make = optimizer
        self._held: LabeledRows | None = None
        self._peers: Peers | None = None
        self._parts = 1
        self._begin_optimizer()

    def _begin_optimizer(self) -> None:
        parameters = [one for one in self.module.parameters() if one.requires_grad]
        if not parameters:
            raise ConfigError("no parameter of the module wants a gradient: there is nothing to learn")
        self.optimizer = self._make(parameters)

    @property
    def schema(self) -> Schema:
        """What its batches are encoded by."""
        schema: Schema = self.module.schema  # type: ignore[assignment]
        return schema

    @property
    def held(self) -> int:
        """How many rows wait for a step to be full."""
        return 0 if self._held is None else len(self._held.labels)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> Dense:
        """Move the module, and what the optimizer remembers, there."""
        memory = self._memory()
        self.module.to(device)
        self._load_memory(memory)
        return self

    def share(self, peers: Peers | None, parts: int = 1) -> None:
        """From now on learn and predict together with others, which are called with the same rows in the same order.

        A step has `parts` parts, and not `accumulate`, of which each of them computes its share: so what is learned
        does not depend on how many they are. None: alone again.
        """
        self._peers = peers
        self._parts = parts

    # -- scoring -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows,)`: click probabilities. Changes nothing."""
        scores = torch.zeros(len(batch), dtype=torch.float32)
        rank, size = (0, 1) if self._peers is None else (self._peers.rank, self._peers.size)
        steps = [*range(0, len(batch), self.batch_size)]
        was = self.module.training
        self.module.eval()
        try:
            with torch.inference_mode(), self._autocast():
                for at in steps[rank::size]:
                    some = slice(at, at + self.batch_size)
                    scores[some] = torch.sigmoid(self.module(batch.take(some).compact()).float()).cpu()
        finally:
            self.module.train(was)
        if self._peers is not None and len(batch):
            self._peers.add(scores)
        found: NDArray[np.float32] = scores.numpy()
        return found

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    # -- learning ------------------------------------------------------------------------------------------------------

    def learn(self, batch: Batch, labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """Learn these rows after those that wait, as many as fill steps. `labels`, `weights`: float32 `(rows,)`."""
        rows = LabeledRows.of(batch, labels, weights)
        if self._held is not None:
            rows = LabeledRows.concatenated([self._held, rows])
        whole = len(rows.labels) - len(rows.labels) % self.batch_size
        for at in range(0, whole, self.batch_size):
            self._step(_own(rows, at, at + self.batch_size))
        self._held = _own(rows, whole, len(rows.labels)) if whole < len(rows.labels) else None

    def flush(self) -> None:
        """Learn the rows that wait, in a step of their own."""
        held, self._held = self._held, None
        if held is not None:
            self._step(held)

    def _step(self, rows: LabeledRows) -> None:
        self._begin_ids(rows.batch)
        self.optimizer.zero_grad(set_to_none=True)
        was = self.module.training
        self.module.train()
        total = float(rows.weights.sum(dtype=np.float64))
        rank, size = (0, 1) if self._peers is None else (self._peers.rank, self._peers.size)
        count = len(rows.labels)
        parts = self.accumulate if self._peers is None else self._parts
        cuts = [count * n // parts for n in range(parts + 1)]
        mine = range(parts * rank // size, parts * (rank + 1) // size)
        try:
            for part in mine:
                if cuts[part] < cuts[part + 1] and total > 0:
                    self._backward(rows.take(slice(cuts[part], cuts[part + 1])), cuts[part], total)
        finally:
            self.module.train(was)
        if self._peers is not None:
            self._add_gradients(self._peers)
        self.steps += 1
        norm = nn.utils.clip_grad_norm_(self._parameters(), math.inf if self.clip is None else self.clip)
        if not bool(torch.isfinite(norm)):
            self.left_out += count
        elif total > 0:
            self._move()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, rows: LabeledRows, first: int, total: float) -> None:
        """Add the gradient of these rows, which begin at row `first` of a step of the weight `total`."""
        device = self.device
        drawn = np.random.SeedSequence([self.seed, self.steps, first]).generate_state(1, np.uint64)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # not torch.manual_seed, which notes who called it for GPUs that are not used yet: longer than a small step
            generator = torch.cuda if device.type == "cuda" else torch.default_generator
            generator.manual_seed(int(drawn[0] >> np.uint64(1)))
            with self._autocast():
                losses = self._losses(rows)  # (rows,)
            weights = torch.from_numpy(rows.weights).to(device)
            ((losses.float() * weights).sum() / total).backward()  # type: ignore[no-untyped-call]

    def _losses(self, rows: LabeledRows) -> Tensor:
        compact = LabeledRows(rows.batch.compact(), rows.labels, rows.weights)
        own: Callable[..., Tensor] | None = getattr(type(self.module), "loss", None)  # `self.loss` may be a module
        if own is not None:
            losses = own(self.module, compact)
        else:
            logits = _one_each(self.module(compact.batch), rows, "forward must give a logit")
            labels = torch.from_numpy(rows.labels).to(logits.device)
            losses = functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
        return _one_each(losses, rows, "loss must give a loss")

    def _move(self) -> None:
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, lr in zip(groups, before, strict=True):
            group["lr"] = lr * self.rate
        try:
            self.optimizer.step()
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr

    def _parameters(self) -> list[nn.Parameter]:
        return [one for group in self.optimizer.param_groups for one in group["params"]]

    def _begin_ids(self, batch: Batch) -> None:
        """Rows for ids that are new, in the order in which they come, and memory of the optimizer's for these."""
        parts = [part for part in self.module.modules() if isinstance(part, FM)]
        for part in parts:
            part.begin(batch.ids[batch.entries])
        for one in self._parameters() if parts else []:
            memory = self.optimizer.state.get(one, {})
            for name, value in memory.items():
                if isinstance(value, Tensor) and value.dim() == one.dim() > 0 and len(value) < len(one):
                    memory[name] = torch.cat([value, value.new_zeros(len(one) - len(value), *value.shape[1:])])

    def _add_gradients(self, peers: Peers) -> None:
        """The sum of all peers' gradients, on each of them; none where nobody has one."""
        parameters = self._parameters()
        has = torch.tensor([float(one.grad is not None) for one in parameters], device=self.device)
        peers.add(has)
        wanted = [one for one, count in zip(parameters, has.tolist(), strict=True) if count]
        for some in _packets(wanted):
            gradients = [torch.zeros_like(one) if one.grad is None else one.grad.to_dense() for one in some]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            peers.add(flat)
            for one, part in zip(some, torch.split(flat, [one.numel() for one in some]), strict=True):
                one.grad = part.reshape(one.shape).to(one.dtype)
        with torch.no_grad():  # running statistics, say: those of the first
            for buffer in self._buffers():
                if peers.rank:
                    buffer.zero_()
                peers.add(buffer)

    def _buffers(self) -> list[Tensor]:
        """What the module keeps beside its parameters; an FM's are those of its own loops."""
        modules = [one for one in self.module.modules() if not isinstance(one, FM)]
        buffers = [buffer for one in modules for buffer in one.buffers(recurse=False)]
        return [buffer for buffer in buffers if buffer.is_floating_point()]

    # -- saving --------------------------------------------------------------------------------------------------------

    def published(self) -> State:
        """What a scorer needs: the module's part of the state."""
        published = getattr(self.module, "published", self.module.state_dict)
        return {"module": _copied(published())}

    def state_dict(self) -> State:
        """All that learning goes on from: the module, the optimizer, the rows that wait, counts, cut now."""
        return {"module": _copied(self.module.state_dict()), **self._memory()}

    def _memory(self) -> dict[str, Any]:
        held = None
        if self._held is not None:
            batch = self._held.batch
            held = {name: getattr(batch, name).copy() for name in _COLUMNS} | {"texts": [*batch.texts]}
            held |= {"labels": self._held.labels.copy(), "weights": self._held.weights.copy()}
        return {
            "optimizer": _copied(self.optimizer.state_dict()),
            "held": held,
            "steps": self.steps,
            "left_out": self.left_out,
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """What a training that goes on must have as it was."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from; of a state that was published, with an optimizer that is new.

        Raises `ConfigError` where it was cut with other settings.
        """
        if "settings" in state and dict(state["settings"]) != self._settings():
            raise ConfigError(f"the state was cut with {state['settings']}, not with {self._settings()}: use those")
        self.module.load_state_dict(state["module"])
        self._load_memory(state)

    def _load_memory(self, state: State) -> None:
        self._begin_optimizer()
        self._held = None
        self.steps, self.left_out = int(state.get("steps", 0)), int(state.get("left_out", 0))
        if "optimizer" not in state:
            return
        saved = state["optimizer"]
        groups = [
            {name: tuple(one) if isinstance(one, list) and name != "params" else one for name, one in group.items()}
            for group in saved["param_groups"]
        ]
        memory = {int(place): _copied(one) for place, one in saved["state"].items()}  # torch would keep some as its own
        self.optimizer.load_state_dict({"state": memory, "param_groups": groups})
        held = state["held"]
        if held is not None:
            columns = {name: np.array(held[name]) for name in _COLUMNS}
            batch = Batch(**columns, texts=list(held["texts"]))
            self._held = LabeledRows(batch, np.array(held["labels"]), np.array(held["weights"]))

    def __getstate__(self) -> dict[str, Any]:
        # a copy, by copy.deepcopy or into another process: the optimizer is made anew, for the module's new parameters
        given = {name: getattr(self, name) for name in (*_SETTINGS, "module", "accumulate")}
        return {"given": {**given, "optimizer": self._make}, "memory": self._memory(), "rate": self.rate}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        Dense.__init__(self, **state["given"])
        self._load_memory(state["memory"])
        self.rate = state["rate"]


def _one_each(found: Tensor, rows: LabeledRows, what: str) -> Tensor:
    if found.shape != (len(rows.labels),):
        raise ConfigError(f"{what} for each of {len(rows.labels)} rows, but it gave {tuple(found.shape)}")
    return found


_PACKET = 1 << 24  # numbers added at a time


def _packets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Them, in order, of one kind of number and not too many numbers at a time."""
    some: list[nn.Parameter] = []
    for one in parameters:
        if some and (some[0].dtype != one.dtype or sum(map(Tensor.numel, some)) + one.numel() > _PACKET):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _own(rows: LabeledRows, begin: int, end: int) -> LabeledRows:
    """These rows in memory of their own."""
    some = rows.take(slice(begin, end))
    return some.compact()


def _copied(value: Any) -> Any:
    """A state of torch's as one of ours: plain, in the CPU's memory, not to change later."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {str(name): _copied(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(one) for one in value]
    return value
