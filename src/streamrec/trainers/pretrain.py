"""Pretrain: go on with what an encoder was pretrained for, on a platform's own texts, before it reads clicks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from streamrec.errors import ConfigError, StoreError
from streamrec.evaluators import Report
from streamrec.models import AdamW, _pretrained, _text_files
from streamrec.models._gradient import Gradient, draw
from streamrec.models.text_encoder import CHARACTERS, USUAL_TOKENS, normalised
from streamrec.protocols import State
from streamrec.storage import Store
from streamrec.trainers._bar import Bar
from streamrec.trainers._stop import stop_on_signals

__all__ = ["InBatch", "MaskedLM", "Objective", "SimCSE", "pretrain"]

FORMAT = 1
_STEP = AdamW(lr=5e-5, batch_size=32)


class MaskedLM(msgspec.Struct, frozen=True, tag_field="objective", tag="masked-lm"):
    """Guess the tokens that were masked, the share `mask` of them. Devlin et al. 2019; masked by the
    `DataCollatorForLanguageModeling` of transformers. Of texts. The result has the head that guesses."""

    mask: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.mask < 1:
            raise ConfigError(f"MaskedLM: mask must be a share between 0 and 1, got {self.mask!r}")


class SimCSE(msgspec.Struct, frozen=True, tag_field="objective", tag="simcse"):
    """Know a text again under another dropout among all texts of its batch. Gao et al. 2021, unsupervised. Of texts.

    `temperature` divides the cosines; `pooling`: "mean" or "cls", as the encoder will be used.
    """

    temperature: float = 0.05
    pooling: str = "mean"

    def __post_init__(self) -> None:
        _check_contrast(self)


class InBatch(msgspec.Struct, frozen=True, tag_field="objective", tag="in-batch"):
    """Know the item of a query among all items of its batch: softmax over cosines. Of pairs (query, item).

    What stands in a batch twice is nobody's wrong answer. `temperature`, `pooling`: as of `SimCSE`.
    """

    temperature: float = 0.05
    pooling: str = "mean"

    def __post_init__(self) -> None:
        _check_contrast(self)


Objective = Union[MaskedLM, SimCSE, InBatch]


def _check_contrast(objective: SimCSE | InBatch) -> None:
    name = type(objective).__name__
    if not 1e-4 <= objective.temperature <= 100:
        raise ConfigError(f"{name}: temperature must be from 0.0001 to 100, got {objective.temperature!r}")
    if objective.pooling not in ("mean", "cls"):
        raise ConfigError(f"{name}: pooling must be mean or cls, got {objective.pooling!r}")


def pretrain(
    texts: Sequence[str] | Sequence[tuple[str, str]],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    objective: Objective,
    epochs: int = 1,
    optimizer: AdamW = _STEP,
    schedule: Callable[[float], float] | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    store: Store | str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Adapt the encoder in `checkpoint` to these texts and write it to `output`, both folders or fsspec URIs.

    What is written is a model (safetensors) with its tokenizer, as `save_pretrained` writes it: for
    `transformers.AutoModel`, a `TextEncoder` or a `BertCTR`. `texts`: str, or for `InBatch` pairs of them; they are
    learned in an order drawn by `seed`, `epochs` times, by `optimizer`, whose rate `schedule` multiplies by the share
    that is done (`streamrec.trainers.Linear`). Empty ones are left out, and counted. `max_tokens`: of a text; None:
    128, or what the model has positions for.

    `store`: checkpoints are kept there every `checkpoint_seconds` on `clock` and at the end; a run that is begun again
    goes on from the newest, and ends as if it had not been interrupted, bit for bit. SIGTERM and SIGINT end it between
    two steps, with a checkpoint and without an output. Where memory runs out, half as many texts go through the model
    at once (and those objectives that compare the texts of a batch compare half as many).

    The report has the mean `loss` of the last epoch, and counts. Raises `ConfigError` where the checkpoint cannot be
    had, nothing is left to learn, or a checkpoint in the store is of another run.
    """
    if epochs < 1:
        raise ConfigError(f"epochs must be >= 1, got {epochs!r}")
    if not checkpoint_seconds > 0:
        raise ConfigError(f"checkpoint_seconds must be > 0, got {checkpoint_seconds!r}")
    run = _Run(texts, os.fspath(checkpoint), objective, epochs, optimizer, schedule, max_tokens, seed)
    kept = Store(store) if isinstance(store, (str, os.PathLike)) else store
    found = kept.checkpoints.read() if kept is not None else None
    if found is not None:
        run.load_state_dict(found[1])
    begun = saved = clock()
    with stop_on_signals() as stop, Bar(total=run.total, initial=run.done, unit=" steps", disable=None) as bar:
        while not stop.is_set() and run.done < run.total:
            run.step()
            bar.update(1)
            if kept is not None and clock() - saved >= checkpoint_seconds:
                kept.checkpoints.write(run.state_dict(), {"trainer": "pretrain"})
                saved = clock()
    if kept is not None:
        kept.checkpoints.write(run.state_dict(), {"trainer": "pretrain"})
    ended = run.done == run.total
    if ended:
        _pretrained.write(output, run.module, run.tokenizer)
    return run.report(clock() - begun, interrupted=not ended)


class _Run:
    """One pretraining, resumable between any two steps."""

    def __init__(
        self,
        texts: Sequence[Any],
        checkpoint: str,
        objective: Objective,
        epochs: int,
        optimizer: AdamW,
        schedule: Callable[[float], float] | None,
        max_tokens: int | None,
        seed: int,
    ) -> None:
        self.objective, self.epochs, self.seed, self.schedule = objective, epochs, seed, schedule
        kind = "AutoModelForMaskedLM" if isinstance(objective, MaskedLM) else "AutoModel"
        self.module, self.tokenizer, _ = _pretrained.load(checkpoint, kind, seed)
        if isinstance(objective, MaskedLM) and self.tokenizer.mask_token is None:
            raise ConfigError(f"the tokenizer in {checkpoint} has no mask token, which MaskedLM needs")
        positions = _text_files.most_tokens(self.module.config)
        self.max_tokens = max_tokens or min(USUAL_TOKENS, positions)
        if not 3 <= self.max_tokens <= positions:
            raise ConfigError(f"max_tokens must be from 3 to {positions}, the positions of the model, got {max_tokens}")
        self.texts = self._read(texts)
        self.left_out = len(texts) - len(self.texts)
        size = optimizer.batch_size
        if len(self.texts) < (1 if isinstance(objective, MaskedLM) else 2):
            raise ConfigError(f"{len(texts)} texts of which {len(self.texts)} are not empty are too few to learn from")
        self.per_epoch = -(-len(self.texts) // size)
        self.total = epochs * self.per_epoch
        self.done = 0
        self.loss = self.weighed = 0.0  # of this epoch
        weights = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        self.gradient = Gradient(weights, optimizer, seed)
        self._collate = self._collator()
        described = [msgspec.to_builtins(objective), msgspec.to_builtins(optimizer), epochs, seed, self.max_tokens]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for one in self.texts:
            digest.update(json.dumps(one).encode())
        self.settings = digest.hexdigest()

    def _read(self, texts: Sequence[Any]) -> list[tuple[str, ...]]:
        wide = 2 if isinstance(self.objective, InBatch) else 1
        found = []
        for n, given in enumerate(texts):
            one = given if wide == 2 else (given,)
            if isinstance(one, str) or len(one) != wide or not all(isinstance(text, (str, type(None))) for text in one):
                wanted = "a pair (query, item) of texts" if wide == 2 else "a text"
                raise ConfigError(f"{type(self.objective).__name__} learns from {wanted}, got {given!r} at {n}")
            clean = tuple(normalised((text or "")[: CHARACTERS * self.max_tokens]) for text in one)
            if all(clean):
                found.append(clean)
        return found

    def _collator(self) -> Any:
        from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

        if isinstance(self.objective, MaskedLM):
            return DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=self.objective.mask)
        return DataCollatorWithPadding(self.tokenizer)

    def step(self) -> None:
        """Learn the next batch."""
        size = self.gradient.settings.batch_size
        epoch, place = divmod(self.done, self.per_epoch)
        if place == 0:
            self.loss = self.weighed = 0.0
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.texts))
        batch = [self.texts[n] for n in order[place * size : (place + 1) * size]]
        batch.sort(key=lambda one: len(one[-1]))  # micro-batches of about the same length
        parts: dict[int, float] = {}

        def loss(part: slice) -> Tensor:
            if part.start == 0:
                parts.clear()
            some = batch[part]
            devices = [self.gradient.generator.device] if self.gradient.generator.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # dropout and masks draw from torch's generator; it is put back
                torch.manual_seed(draw(self.seed, self.done, part.start))
                found = self._loss(some) * (len(some) / len(batch))
            parts[part.start] = float(found.detach())
            return found

        self.gradient.rate = 1.0 if self.schedule is None else float(self.schedule(self.done / self.total))
        self.module.train()
        try:
            self.gradient.step(len(batch), loss)
        finally:
            self.module.eval()
        self.loss += sum(parts.values()) * len(batch)
        self.weighed += len(batch)
        self.done += 1

    def _loss(self, some: Sequence[tuple[str, ...]]) -> Tensor:
        bf16 = self.gradient.settings.bf16
        with torch.autocast(self.gradient.generator.device.type, dtype=torch.bfloat16, enabled=bf16):
            if isinstance(self.objective, MaskedLM):
                inputs = self._inputs([one[0] for one in some])
                if not bool((inputs["labels"] != -100).any()):  # short texts, none of their tokens drawn
                    return sum(weight.sum() for weight in self.gradient.weights.values()) * 0.0  # type: ignore[return-value]
                masked: Tensor = self.module(**inputs).loss
                return masked.float()
            first = self._vectors([one[0] for one in some])
            second = self._vectors([one[-1] for one in some])
        logits = first.float() @ second.float().T / self.objective.temperature
        same = torch.tensor([[a[-1] == b[-1] for b in some] for a in some], device=logits.device)
        same &= ~torch.eye(len(some), dtype=torch.bool, device=logits.device)
        wanted = torch.arange(len(some), device=logits.device)
        return functional.cross_entropy(logits.masked_fill(same, float("-inf")), wanted)

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        inputs = self._inputs(texts)
        states = self.module(**inputs).last_hidden_state  # (texts, tokens, hidden)
        if self.objective.pooling == "cls":  # type: ignore[union-attr]
            pooled = states[:, 0]
        else:
            mask = inputs["attention_mask"][:, :, None]
            pooled = (states * mask).sum(1) / mask.sum(1)
        found: Tensor = functional.normalize(pooled.float(), dim=1)
        return found

    def _inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        made = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, return_special_tokens_mask=True)
        kept = [name for name in made if name != "special_tokens_mask" or isinstance(self.objective, MaskedLM)]
        rows = [{name: made[name][n] for name in kept} for n in range(len(texts))]
        collated = self._collate(rows)
        return {name: value.to(self.gradient.generator.device) for name, value in collated.items()}

    def report(self, seconds: float, *, interrupted: bool) -> Report:
        counts = {"events": len(self.texts) + self.left_out, "learned": self._learned(), "pending": 0}
        counts |= {"steps": self.done, "empty": self.left_out, "halved": self.gradient.halved}
        counts["not_finite"] = self.gradient.left_out
        loss = self.loss / self.weighed if self.weighed else float("nan")
        return Report({"loss": loss}, counts, seconds=seconds, interrupted=interrupted)

    def _learned(self) -> int:
        epochs, place = divmod(self.done, self.per_epoch)
        return epochs * len(self.texts) + place * self.gradient.settings.batch_size

    def state_dict(self) -> State:
        """All that a run which goes on needs."""
        weights = {name: weight.detach().cpu().clone() for name, weight in self.gradient.weights.items()}
        return {
            "format": FORMAT,
            "settings": self.settings,
            "weights": weights,
            "gradient": self.gradient.state_dict(),
            "done": self.done,
            "loss": self.loss,
            "weighed": self.weighed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises `ConfigError` where it is of other texts or settings."""
        if state.get("format") != FORMAT or "settings" not in state:
            raise StoreError(f"the checkpoint in the store is not of a pretraining of format {FORMAT}")
        weights = state["weights"]
        if state["settings"] != self.settings or set(weights) != set(self.gradient.weights):
            raise ConfigError(
                "the checkpoint in the store is of a pretraining with other texts or settings: use those, or another "
                "store"
            )
        with torch.no_grad():
            for name, weight in self.gradient.weights.items():
                weight.copy_(weights[name])
        self.gradient.load_state_dict(state["gradient"])
        self.done, self.loss, self.weighed = int(state["done"]), float(state["loss"]), float(state["weighed"])
