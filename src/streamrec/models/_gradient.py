"""One step of AdamW after the other: micro-batches, clipping, warm-up; less at once where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from streamrec.errors import ConfigError
from streamrec.models.tuning import AdamW
from streamrec.protocols import State

__all__ = ["Gradient", "Peers", "draw"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Peers(Protocol):
    """Processes that learn the same rows together, of which this one is the number `rank` of `size`."""

    rank: int
    size: int

    def add(self, tensor: Tensor) -> None:
        """In place, on all of them: the sum of what each gives, the same bits everywhere."""
        ...


def draw(*numbers: int) -> int:
    """A seed drawn by these numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Gradient:
    """Moves `weights` (by name, in order). All that is random in a step comes from `generator`, whose seed is drawn by
    the number of the step: so it need not be saved, and no other part of a program disturbs it."""

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: AdamW, seed: int) -> None:
        self.settings = settings
        self.weights = dict(weights)
        self.rate = 1.0
        self.seed = seed
        self.generator = torch.Generator(next(iter(self.weights.values())).device)
        self.peers: Peers | None = None
        """Processes that learn the same examples together; each step has `parts` parts, of which each has a share."""
        self.parts = 1
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        settings = self.settings
        self.steps = self.left_out = self.halved = 0
        self.micro_batch = settings.micro_batch or settings.batch_size
        decays = [weight for weight in self.weights.values() if weight.ndim > 1]
        others = [weight for weight in self.weights.values() if weight.ndim <= 1]
        groups = [
            {"params": some, "weight_decay": decay}
            for some, decay in ((decays, settings.weight_decay), (others, 0.0))
            if some
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )

    def step(self, count: int, loss: Callable[[slice], Tensor]) -> None:
        """Learn `count` examples. `loss`: their part of the step's loss, which is the sum of all parts.

        A step whose gradient is not finite moves nothing, and its examples count as left out. Raises the error of torch
        where memory runs out with a single example.
        """
        while True:
            try:
                for part in self._mine(count):
                    # by where it begins, so that it draws the same whoever computes it
                    self.generator.manual_seed(draw(self.seed, self.steps, part.start))
                    loss(part).backward()  # type: ignore[no-untyped-call]
                break
            except (MemoryError, RuntimeError) as error:
                self._forget()
                at_once = min(self.micro_batch, count)
                if at_once == 1 or not _out_of_memory(error):
                    raise
            self.micro_batch = at_once // 2  # outside of `except`, which holds on to what was computed
            self.halved += 1
        if self.peers is not None:
            self._add_up(self.peers)
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.settings.clip or float("inf"))
        if bool(torch.isfinite(norm)):
            warm = min(1.0, (self.steps + 1) / self.settings.warmup) if self.settings.warmup else 1.0
            for group in self._optimizer.param_groups:
                group["lr"] = self.settings.lr * warm * self.rate
            self._optimizer.step()
        else:
            self.left_out += count
        self.steps += 1
        self._forget()

    def _mine(self, count: int) -> Iterator[slice]:
        """The micro-batches of a step that are computed here."""
        rank, size, parts = (0, 1, 1) if self.peers is None else (self.peers.rank, self.peers.size, self.parts)
        for part in range(parts * rank // size, parts * (rank + 1) // size):
            end = count * (part + 1) // parts
            for begin in range(count * part // parts, end, self.micro_batch):
                yield slice(begin, min(end, begin + self.micro_batch))

    def _add_up(self, peers: Peers) -> None:
        """The sum of all peers' gradients, on each of them; none where nobody has one."""
        weights = list(self.weights.values())
        has = torch.tensor([float(one.grad is not None) for one in weights], device=weights[0].device)
        peers.add(has)
        for weight, count in zip(weights, has.tolist(), strict=True):
            if count:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
                peers.add(weight.grad)

    def _forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> State:
        moments = {}
        for name, weight in self.weights.items():
            held = self._optimizer.state.get(weight)
            if held:
                moments[name] = {one: held[one].detach().cpu().clone() for one in _MOMENTS}
        counts = {"steps": self.steps, "left_out": self.left_out, "halved": self.halved}
        return {**counts, "micro_batch": self.micro_batch, "moments": moments}

    def load_state_dict(self, state: State) -> None:
        self.clear()
        strangers = sorted(set(state["moments"]) - set(self.weights))
        if strangers:
            raise ConfigError(f"the saved optimizer has moments of {strangers[0]}, which does not learn here")
        for name, held in state["moments"].items():
            weight = self.weights[name]
            # `step` stays where torch made it: on the weights' device for the fused kernel
            self._optimizer.state[weight] = {one: held[one].to(weight.device, copy=True) for one in _MOMENTS}
        self.steps, self.left_out = int(state["steps"]), int(state["left_out"])
        self.halved, self.micro_batch = int(state["halved"]), int(state["micro_batch"])


def _out_of_memory(error: BaseException) -> bool:
    known: Sequence[Any] = (MemoryError, torch.OutOfMemoryError)
    text = str(error)  # on a CPU it is a RuntimeError like any other
    return isinstance(error, tuple(known)) or "can't allocate memory" in text or "out of memory" in text
