"""How an encoder learns by LoRA from what events say of texts: steps, the adapters they move, encoders by these."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from streamrec.errors import ConfigError
from streamrec.models import _pretrained
from streamrec.models._gradient import Gradient
from streamrec.models._packed import Dropout
from streamrec.models.text_encoder import TextEncoder, one_thread
from streamrec.models.tuning import AdamW, LoRA
from streamrec.protocols import State

__all__ = ["Example", "Learning"]


class Example(NamedTuple):
    """What an event says of a text. `gradient`: float32 `(hidden,)`, of the loss by the text's vector as the model
    reads it: at length 1, less `mean`, at length 1 again."""

    text: str
    gradient: NDArray[np.float32]
    mean: NDArray[np.float32]


class Learning:
    """Adapters of an encoder, which stays as it is, and the memory of their optimizer.

    `cut`: all that it would go on from, replaced as a whole after each step.
    """

    def __init__(self, encoder: TextEncoder, tune: LoRA, optimizer: AdamW) -> None:
        self.tune, self.optimizer, self.first = tune, optimizer, encoder
        self.encoder = encoder.twin()
        self._version = encoder.version
        self._module: Any = self.encoder.module
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
        self._start = self._flat()
        self._made: tuple[Tensor, TextEncoder] | None = None
        self._note()

    def step(self, some: Sequence[Example]) -> int:
        """Learn these in one step; how many of them it has learned: all but those that say nothing, and none where the
        step was not finite."""
        tokens = self.encoder.tokens([one.text for one in some])
        order = sorted((n for n in range(len(some)) if tokens[n]), key=lambda n: len(tokens[n]))
        if not order:
            return 0
        left_out = self._gradient.left_out

        def loss(part: slice) -> Tensor:
            which = order[part]
            return self._loss([tokens[n] for n in which], [some[n] for n in which]) / len(some)

        with one_thread():
            self._gradient.step(len(order), loss)
        self._note()
        return len(order) - (self._gradient.left_out - left_out)

    def _loss(self, tokens: Sequence[Sequence[int]], some: Sequence[Example]) -> Tensor:
        """Moves as the examples' losses do with the vectors."""
        device = self._gradient.generator.device
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self.encoder.tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(tokens), longest)
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1.0
        ids, mask = ids.to(device), mask.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.optimizer.bf16):
            states = self._module(input_ids=ids, attention_mask=mask).last_hidden_state  # (texts, tokens, hidden)
        states = states.float()
        pooled = states[:, 0]
        if self.encoder.pooling == "mean":
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        means = torch.from_numpy(np.stack([one.mean for one in some])).to(device)
        gradients = torch.from_numpy(np.stack([one.gradient for one in some])).to(device)
        read = functional.normalize(functional.normalize(pooled, dim=1) - means, dim=1)
        return (read * gradients).sum()

    # -- encoders ------------------------------------------------------------------------------------------------------

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 `(n, hidden)`, by the adapters of now."""
        return self.encoder_of(self.cut["weights"]).embed(texts)

    def encoder_of(self, adapters: Tensor) -> TextEncoder:
        """By these adapters. Its version is of them: their product with a matrix may differ in a last digit from
        machine to machine."""
        if self._made is None or not torch.equal(self._made[0], adapters):
            told = f"streamrec adapted 1 {self._version} {self.tune.rank} {self.tune.alpha} {self.tune.targets}"
            digest = hashlib.sha256(told.encode() + adapters.numpy().tobytes())
            before = self._flat()
            self._put(adapters)
            try:
                with one_thread():
                    module = _pretrained.merged(self._module).requires_grad_(False).eval()
            finally:
                self._put(before)
            self._made = adapters, self.encoder.twin(module, digest.hexdigest()[:32])
        return self._made[1]

    def _flat(self) -> Tensor:
        return torch.cat([weight.detach().reshape(-1).cpu() for weight in self._gradient.weights.values()])

    def _put(self, adapters: Tensor) -> None:
        if len(adapters) != len(self._start):
            raise ConfigError(
                f"the saved adapters are {len(adapters)} numbers, but those of {self.tune} are {len(self._start)}: "
                "use the tune they were saved with"
            )
        begin = 0
        with torch.no_grad():
            for weight in self._gradient.weights.values():
                weight.copy_(adapters[begin : begin + weight.numel()].view_as(weight))
                begin += weight.numel()

    # -- saving --------------------------------------------------------------------------------------------------------

    def _note(self) -> None:
        self.cut: State = {"weights": self._flat(), "gradient": self._gradient.state_dict()}

    def load(self, adapters: Tensor, state: State | None) -> None:
        """Go on from `state`, or else from these adapters alone; none: as at first."""
        self._gradient.clear()
        if state is None:
            self._put(adapters if len(adapters) else self._start)
        else:
            self._put(torch.as_tensor(state["weights"]))
            self._gradient.load_state_dict(state["gradient"])
        self._note()
