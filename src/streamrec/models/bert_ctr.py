"""BertCTR: a cross-encoder that reads a query, or a user's history, and an item together, and learns from clicks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from streamrec.batch import Batch, LabeledRows
from streamrec.errors import ConfigError
from streamrec.models import _pretrained, _text_files
from streamrec.models._activations import Activations
from streamrec.models._gradient import Gradient, Peers, draw
from streamrec.models._packed import FAMILY, Tokens
from streamrec.models._pairs import Example, PairReader, Pending, augmented
from streamrec.models._runners import runner
from streamrec.models.text_encoder import USUAL_TOKENS
from streamrec.models.tuning import AdamW, Full, LoRA, Pair, Top, Tune
from streamrec.protocols import LEARN, SCORE, State
from streamrec.schema import Schema

__all__ = ["BertCTR"]

SETTINGS = "streamrec.json"
KIND = "AutoModelForSequenceClassification"
_FULL, _ADAMW = Full(), AdamW()
_AUGMENT, _SAMPLE = 0x617567, 0x73616D  # so that what is drawn for one purpose is not what is drawn for another


class BertCTR:
    """Click probabilities by a pretrained BERT over (query or history, item), fine-tuned from the stream.

    `checkpoint`: a folder, an fsspec URI of one, or a name on the hub, of anything that
    `transformers.AutoModelForSequenceClassification` loads; a head that it lacks begins with small weights drawn by
    `seed`. `pair`: which `Text` fields are read; None: the schema's only one, or its two. `tune`: what learns:
    `Full()`, `Top(layers)` or `LoRA(rank)`. `optimizer`: how. `labels`: outputs: 1, a logit, or 2, of which the second
    is the click. `class_weights`: what the weights of examples labelled 0 and 1 are multiplied by. `negatives`: the
    share of examples labelled 0 that is learned, each with 1/share of its weight; chance chooses, by `seed`.

    Examples wait until there are `optimizer.batch_size`; then they are learned in one step, by their weighted mean. How
    calls are cut changes no bit, nor does a row's probability depend on the rows it is asked for with; both hold on one
    machine with one number of threads. `flush` learns what waits.

    >>> from streamrec import Schema, Text
    >>> BertCTR(Schema(Text("query"), Text("title")), "no/such/model")
    Traceback (most recent call last):
        ...
    streamrec.errors.ConfigError: no model 'no/such/model': no such folder: ...
    """

    def __init__(
        self,
        schema: Schema,
        checkpoint: str | os.PathLike[str],
        *,
        pair: Pair | None = None,
        tune: Tune = _FULL,
        optimizer: AdamW = _ADAMW,
        labels: int = 1,
        class_weights: tuple[float, float] = (1.0, 1.0),
        negatives: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._configure(schema, checkpoint, pair, tune, optimizer, labels, class_weights, negatives, seed)
        self._adopt(*_pretrained.load(self.checkpoint, KIND, seed, num_labels=labels)[:2])

    def _configure(
        self,
        schema: Schema,
        checkpoint: str | os.PathLike[str],
        pair: Pair | None,
        tune: Tune,
        optimizer: AdamW,
        labels: int,
        class_weights: Sequence[float],
        negatives: float,
        seed: int,
    ) -> None:
        if labels not in (1, 2):
            raise ConfigError(f"labels must be 1 (a logit) or 2 (no click, click), got {labels!r}")
        if len(class_weights) != 2 or not all(0 < weight <= 1e6 for weight in class_weights):
            raise ConfigError(f"class_weights must be two numbers > 0, of labels 0 and 1, got {class_weights!r}")
        if not 0 < negatives <= 1:
            raise ConfigError(f"negatives must be a share in (0, 1], got {negatives!r}")
        if seed < 0:
            raise ConfigError(f"seed must be >= 0, got {seed!r}")
        self.schema = schema
        self.checkpoint = os.fspath(checkpoint)
        self.pair = Pair.of(schema) if pair is None else pair
        self.pair.columns(schema)
        self.tune, self.optimizer, self.labels = tune, optimizer, labels
        self.class_weights = (float(class_weights[0]), float(class_weights[1]))
        self.negatives, self.seed = float(negatives), seed
        self._module: Any = None
        self._pending = Pending()
        self._seen = 0
        self._rate = 1.0

    def _adopt(self, module: Any, tokenizer: Any) -> None:
        """Run this model from now on; it begins to learn."""
        positions = _text_files.most_tokens(module.config)
        most = self.pair.max_tokens or min(USUAL_TOKENS, positions)
        if most > positions:
            raise ConfigError(
                f"max_tokens={most} is more than the {positions} positions of the model in {self.checkpoint}; use "
                f"{positions} at most"
            )
        if isinstance(self.tune, LoRA):
            _pretrained.with_lora(module, self.tune, self.seed)
        learning = _learning(module, self.tune, self.checkpoint)
        for name, weight in module.named_parameters():
            weight.requires_grad_(name in learning)
        self._module = module.eval()
        self.tokenizer = tokenizer
        self.reader = PairReader(self.schema, self.pair, tokenizer, most)
        self._files: Mapping[str, bytes] = _pretrained.files_of(tokenizer)
        self._digest = ""
        self.activations = Activations(self.tune.cache_bytes if isinstance(self.tune, Top) else 0)
        self._begin()

    def _begin(self) -> None:
        """New steps of the weights as they are."""
        weights = {name: weight for name, weight in self._module.named_parameters() if weight.requires_grad}
        self._gradient = Gradient(weights, self.optimizer, self.seed)
        self._runner = runner(
            self._module, self.tune, self._gradient.generator, self.activations, lambda: self.frozen_version
        )

    @property
    def module(self) -> Any:
        """The `transformers` model. Raises `ConfigError` where there is none yet."""
        if self._module is None:
            raise ConfigError("this BertCTR is empty: load what was published into it before it is used")
        return self._module

    def to(self, device: torch.device | str) -> Self:
        """Compute on this device from now on; what was learned, and the optimizer's memory, move there."""
        memory = self._gradient.state_dict()
        self.module.to(device)
        self.activations.clear()
        self._begin()
        self._gradient.load_state_dict(memory)
        return self

    def share(self, peers: Peers | None, parts: int = 1) -> None:
        """From now on learn and predict together with others, which are called with the same rows in the same order:
        see `streamrec.trainers.Dense.share`. None: alone again."""
        self._gradient.peers, self._gradient.parts = peers, parts

    def __getstate__(self) -> dict[str, Any]:
        # a copy, by copy.deepcopy or into another process, which reads the checkpoint there
        return {"config": self.config(), "state": self.state_dict(), "rate": self.rate}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        BertCTR.__init__(self, **_arguments(state["config"]))
        self.load_state_dict(state["state"])
        self.rate = state["rate"]

    @property
    def rate(self) -> float:
        """What multiplies the learning rate; 1 at first. A schedule sets it. No part of the state."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        if not 0 <= rate <= 1000:
            raise ConfigError(f"rate must be from 0 to 1000, got {rate!r}")
        self._rate = float(rate)

    @property
    def left_out(self) -> int:
        """Examples of steps that moved nothing, for their gradient was not finite."""
        return self._gradient.left_out

    @property
    def halved(self) -> int:
        """How often memory ran out, so that fewer examples go through the model at once."""
        return self._gradient.halved

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return self._gradient.steps

    @property
    def pending(self) -> int:
        """Examples that wait for a step to be full."""
        return len(self._pending.held)

    @property
    def frozen_version(self) -> str:
        """A digest of the tokenizer and of all weights that do not learn: what is kept of lower layers belongs to."""
        if not self._digest:
            digest = hashlib.sha256(json.dumps(msgspec.to_builtins(self.tune), sort_keys=True).encode())
            for name, content in self._files.items():
                digest.update(f"{name} {len(content)} ".encode() + content)
            for name, weight in self._frozen():
                digest.update(f"{name} {tuple(weight.shape)}".encode())
                digest.update(weight.detach().cpu().contiguous().view(-1).numpy().data)
            self._digest = digest.hexdigest()[:32]
        return self._digest

    def _frozen(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self._module.named_parameters() if not weight.requires_grad]

    # -- scoring -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows,)`: each row's click probability. Equal texts are computed once. Changes nothing."""
        _ = self.module
        return self._scores(self.reader(batch))

    def _scores(self, rows: Sequence[Tokens]) -> NDArray[np.float32]:
        distinct = {row.key: row for row in rows}
        if not distinct:
            return np.zeros(0, dtype=np.float32)
        in_order = sorted(distinct, key=lambda key: len(distinct[key].ids))
        peers = self._gradient.peers
        mine = slice(None) if peers is None else slice(peers.rank, None, peers.size)
        here = self._runner.infer([distinct[key] for key in in_order[mine]]).cpu() if in_order[mine] else None
        if peers is not None:  # a row's logits do not depend on the others
            whole = torch.zeros(len(in_order), self.labels)
            if here is not None:
                whole[mine] = here
            peers.add(whole)
            here = whole
        assert here is not None
        logits = here.numpy().astype(np.float64)
        clicks = logits[:, 0] if self.labels == 1 else logits[:, 1] - logits[:, 0]
        found = 1.0 / (1.0 + np.exp(-np.clip(clicks, -500.0, 500.0)))
        places = {key: place for place, key in enumerate(in_order)}
        return found[[places[row.key] for row in rows]].astype(np.float32)

    # -- learning ------------------------------------------------------------------------------------------------------

    def learn(self, batch: Batch, labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """Learn these rows after those that wait, as many as fill steps. `labels`, `weights`: float32 `(rows,)`."""
        given = LabeledRows.of(batch, labels, weights)
        rows, ops = np.arange(len(batch), dtype=np.int64), np.full(len(batch), LEARN, dtype=np.int8)
        self.step(batch, rows, ops, given.labels, given.weights)

    def step(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """See `streamrec.protocols.OrderedModel`. Rows scored between two steps are computed together."""
        _ = self.module
        if not len(rows) == len(ops) == len(labels) == len(weights):
            raise ConfigError(f"{len(rows)} rows need as many labels and weights, got {len(labels)} and {len(weights)}")
        tokens = self.reader(batch.take(rows))
        scores = np.full(len(rows), np.nan, dtype=np.float32)
        asked: list[int] = []
        for k, (op, label, weight) in enumerate(zip(ops.tolist(), labels.tolist(), weights.tolist(), strict=True)):
            if op & SCORE:
                asked.append(k)
            if op & LEARN and self._held(tokens[k], label, weight):
                scores[asked] = self._scores([tokens[place] for place in asked])
                asked.clear()
                self.flush()
        scores[asked] = self._scores([tokens[place] for place in asked])
        return scores

    def _held(self, row: Tokens, label: float, weight: float) -> bool:
        """Let the row wait; true where there are now as many as a step takes."""
        self._seen += 1
        if self.negatives < 1 and label == 0:
            if draw(self.seed, _SAMPLE, self._seen) >= self.negatives * 2.0**63:
                return False
            weight /= self.negatives
        self._pending.held.append(Example(row, label, weight))
        return len(self._pending.held) >= self.optimizer.batch_size

    def flush(self) -> None:
        """Learn the examples that wait, in a step of their own."""
        _ = self.module
        examples = self._pending.held
        if not examples:
            return
        if self.pair.augments:
            rng = np.random.default_rng([self.seed, _AUGMENT, self._gradient.steps])
            examples = [one._replace(tokens=augmented(one.tokens, self.reader, rng)) for one in examples]
        examples = sorted(examples, key=lambda one: len(one.tokens.ids))
        no, yes = self.class_weights
        weights = [one.weight * (yes * one.label + no * (1.0 - one.label)) for one in examples]
        total = sum(weights)
        device = self._gradient.generator.device

        def loss(part: slice) -> Tensor:
            logits = self._runner.learn([one.tokens for one in examples[part]], bf16=self.optimizer.bf16)
            wanted = torch.tensor([one.label for one in examples[part]], dtype=torch.float32, device=device)
            shares = torch.tensor([weight / total for weight in weights[part]], dtype=torch.float32, device=device)
            return (shares * _losses(logits, wanted)).sum()

        if total > 0:
            self._gradient.rate = self._rate
            self._gradient.step(len(examples), loss)
        self._pending.held = []

    # -- saving --------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as what JSON can hold; `from_config` makes the same model, untrained."""
        return {"schema": self.schema.to_dict(), "checkpoint": self.checkpoint, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        settings = {"pair": self.pair, "tune": self.tune, "optimizer": self.optimizer}
        return {
            **{name: msgspec.to_builtins(value) for name, value in settings.items()},
            "labels": self.labels,
            "class_weights": list(self.class_weights),
            "negatives": self.negatives,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The model that `config` describes, from the checkpoint it names. Raises `ConfigError` where it cannot."""
        return cls(**_arguments(config))

    @classmethod
    def empty(cls, config: Mapping[str, Any]) -> Self:
        """As `from_config`, without a model: what was published brings one. So a scorer needs no checkpoint."""
        made = cls.__new__(cls)
        made._configure(**_arguments(config))
        return made

    def save_pretrained(self, uri: str | os.PathLike[str]) -> None:
        """Write the model (safetensors) and the tokenizer into a folder or under an fsspec URI, as transformers does.

        What LoRA has learned is added to the matrices, so that
        `AutoModelForSequenceClassification.from_pretrained(folder)` gives the same probabilities. The settings are
        written beside it. The optimizer and what waits are not: a `Store` keeps those.
        """
        settings = json.dumps({"schema": self.schema.to_dict(), **self._settings()}, indent=2)
        _pretrained.write(uri, _pretrained.merged(self.module), self.tokenizer, {SETTINGS: settings + "\n"})

    @classmethod
    def from_pretrained(cls, uri: str | os.PathLike[str]) -> Self:
        """The model that `save_pretrained` wrote, to go on with. `BertCTR(schema, uri)` takes any other checkpoint."""
        with _text_files.local(uri) as folder:
            try:
                with open(os.path.join(folder, SETTINGS), encoding="utf-8") as file:
                    settings = json.load(file)
                arguments = _arguments({**settings, "checkpoint": folder})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"no BertCTR of streamrec in {os.fspath(uri)}: {error!r}. BertCTR(schema, folder) takes any model."
                ) from error
            made = cls(**arguments)
        made.checkpoint = os.fspath(uri)
        return made

    def published(self) -> State:
        """What a scorer needs, all of it: architecture, weights and tokenizer."""
        weights = {name: weight.detach().cpu().clone() for name, weight in self.module.state_dict().items()}
        return {"architecture": _architecture(self.module), "tokenizer": dict(self._files), "weights": weights}

    def state_dict(self) -> State:
        """What learning goes on from: the weights that learn, the optimizer, what waits, counts. What does not learn is
        named by its version alone: it is in the checkpoint that the model is made of."""
        learning = {name: weight.detach().cpu().clone() for name, weight in self._gradient.weights.items()}
        return {
            "weights": learning,
            "frozen": self.frozen_version,
            "gradient": self._gradient.state_dict(),
            "pending": self._pending.state_dict(),
            "seen": self._seen,
        }

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from; of a state that was published, with an optimizer that is new.

        Raises `ConfigError` where it is of another model.
        """
        if "architecture" in state:
            self._load_published(state)
            return
        if state["frozen"] != self.frozen_version:
            raise ConfigError(
                f"the state belongs to another model than that in {self.checkpoint}: its tokenizer or the weights that "
                "do not learn differ. Use the checkpoint that the training began with."
            )
        self._load_weights(state["weights"], self._gradient.weights)
        self._gradient.load_state_dict(state["gradient"])
        self._pending.load_state_dict(state["pending"])
        self._seen = int(state["seen"])

    def _load_published(self, state: State) -> None:
        if self._module is None:
            module = _pretrained.built(state["architecture"], KIND)
            self._adopt(module, _pretrained.tokenizer_of(state["tokenizer"]))
        elif dict(state["tokenizer"]) != dict(self._files):
            raise ConfigError(f"what was published has another tokenizer than the model in {self.checkpoint}")
        self._load_weights(state["weights"], self._module.state_dict())
        self._digest = ""
        self.activations.clear()
        self._gradient.clear()
        self._pending = Pending()
        self._seen = 0

    def _load_weights(self, saved: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
        differ = sorted(set(saved) ^ set(mine))
        differ += [name for name in saved if name in mine and saved[name].shape != mine[name].shape]
        if differ:
            raise ConfigError(
                f"the saved weights are of another model than that in {self.checkpoint}: they differ in "
                f"{_text_files.some(differ)}"
            )
        with torch.no_grad():
            for name, weight in saved.items():
                mine[name].copy_(weight)


def _losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """`(rows,)` from logits `(rows, labels)`; `wanted` may be any probability."""
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], wanted, reduction="none")
    return functional.cross_entropy(logits, torch.stack([1 - wanted, wanted], dim=1), reduction="none")


def _learning(module: Any, tune: Tune, named: str) -> set[str]:
    """The names of the weights that learn. Raises `ConfigError` where the model has no such layers."""
    names = [name for name, _ in module.named_parameters()]
    if isinstance(tune, Full):
        return set(names)
    learning = set(_pretrained.head_of(module))
    if isinstance(tune, LoRA):
        return learning | {name for name in names if ".lora_" in name}
    if module.config.model_type not in FAMILY:
        raise ConfigError(
            f"Top is for the layers of {', '.join(sorted(FAMILY))}; the model in {named} is of the type "
            f"{module.config.model_type!r}: use Full() or LoRA(targets=[...])"
        )
    layers = len(module.base_model.encoder.layer)
    if tune.layers > layers:
        raise ConfigError(f"Top(layers={tune.layers}) of a model of {layers} layers; use {layers} at most, or Full()")
    tops = tuple(f"{module.base_model_prefix}.encoder.layer.{n}." for n in range(layers - tune.layers, layers))
    return learning | {name for name in names if tops and name.startswith(tops)}


def _architecture(module: Any) -> str:
    """The configuration by which transformers builds the model, as JSON."""
    described = json.loads(module.config.to_json_string())
    return json.dumps({name: value for name, value in described.items() if not name.startswith("_")}, sort_keys=True)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {
            "schema": Schema.from_dict(config["schema"]),
            "checkpoint": config["checkpoint"],
            "pair": msgspec.convert(config["pair"], Pair),
            "tune": msgspec.convert(config["tune"], Tune),
            "optimizer": msgspec.convert(config["optimizer"], AdamW),
            "labels": config["labels"],
            "class_weights": tuple(config["class_weights"]),
            "negatives": config["negatives"],
            "seed": config["seed"],
        }
    except msgspec.ValidationError as error:
        raise ConfigError(f"not the config of a BertCTR: {error}") from error
