"""FM: a factorization machine over ids that never end, learning event by event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamrec.batch import Batch
from streamrec.errors import ConfigError, SchemaError
from streamrec.models import _kernels
from streamrec.models.id_table import IdTable
from streamrec.models.optimizers import FTRL, Adagrad, Optimizer, optimizer_from_dict
from streamrec.protocols import LEARN, SCORE, State
from streamrec.schema import Number, Schema

__all__ = ["FM"]


LARGEST_CALL = 8192
"""Operations done at once: room is made for every entry of a call, as if all its ids were new."""


class FM(nn.Module):
    """Rendle's factorization machine over a schema: `dim` factors an id; `dim=0` is logistic regression.

    logit = bias + Σ w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j (Rendle 2010, eq. 1; by its lemma 3.1). Every 64-bit id
    has parameters of its own: w_i starts at 0 and v_i at a seeded random vector that depends on the id alone,
    uniform with the standard deviation `init`. Memory is taken when an id is first learned.

    `optimizer` moves the factors and, unless `linear_optimizer` is given, the bias and the linear weights too. With
    neither it is `Adagrad(lr=0.05)` for the factors and `FTRL(lr=0.2)` for the rest; docs/why.md says how they were
    chosen.

    `predict`, `learn` and `step` run in one compiled loop on the CPU, over the memory of `weights`, event by event
    in order: learning 256 rows equals learning one row 256 times, bit for bit. `forward` is the same function for
    autograd, on any device: for hybrids, and for GPUs.

    >>> from streamrec import Id, Impression, Labeled, Schema
    >>> from streamrec.preprocessors import encode
    >>> import numpy as np
    >>> schema = Schema(Id("user"), Id("item"))
    >>> model = FM(schema, dim=4)
    >>> batch = encode(schema, [Impression(id="i1", time=0.0, user="u1", item="p9")]).batch
    >>> before = model.predict(batch)
    >>> model.learn(batch, np.ones(1, dtype=np.float32))
    >>> bool(model.predict(batch) > before)
    True
    """

    def __init__(
        self,
        schema: Schema,
        *,
        dim: int = 16,
        optimizer: Optimizer | None = None,
        linear_optimizer: Optimizer | None = None,
        init: float = 0.03,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dim < 0 or dim > 1024:
            raise ConfigError(f"dim must be from 0 (logistic regression) to 1024, got {dim!r}")
        if not 0 <= init <= 1:
            raise ConfigError(f"init must be from 0 to 1, got {init!r}")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
        self.schema = schema
        self.dim = dim
        self.optimizer: Optimizer = optimizer or Adagrad(lr=0.05)
        self.linear_optimizer: Optimizer = linear_optimizer or optimizer or FTRL(lr=0.2)
        self.init = init
        self.seed = seed
        self.ids = IdTable()
        self.left_out = 0
        """Rows not learned because their logit or gradient was not finite."""
        rule, linear = self.optimizer, self.linear_optimizer
        self._linear_slots = linear.slots + linear.row_slots
        self._state_width = rule.slots * dim + rule.row_slots + self._linear_slots
        self.weights = nn.Parameter(torch.zeros(self.ids.capacity, dim + 1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.optimizer_rows: Tensor
        self.optimizer_bias: Tensor
        self.statistics: Tensor
        self.register_buffer("optimizer_rows", torch.zeros(self.ids.capacity, self._state_width))
        self.register_buffer("optimizer_bias", torch.zeros(max(self._linear_slots, 1)))
        # float64 (fields, 3): count, mean, sum of squared deviations of the standardised numbers
        self.register_buffer("statistics", torch.zeros(len(schema), 3, dtype=torch.float64))
        standardize = [isinstance(f, Number) and f.standardize for f in schema]
        self._standardize = np.array([*standardize, *(False for _ in schema)], dtype=np.uint8)  # unknown: never
        self._kernel = _kernels.step_kernel(dim, rule.kind, linear.kind)
        self._numbers = np.array([init * 3**0.5, *rule.numbers(), *linear.numbers()], dtype=np.float32)
        self._memory: tuple[Any, ...] | None = None

    # -- scoring and learning ------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows,)`: click probabilities, within 3e-7 of 0 and 1 at the most. Changes nothing."""
        rows = np.arange(len(batch), dtype=np.int64)
        nothing = np.zeros(len(batch), dtype=np.float32)
        return self._run(batch, rows, np.full(len(batch), SCORE, dtype=np.int8), nothing, nothing)[0]

    def learn(self, batch: Batch, labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """One gradient step of the log loss per row, in order. `labels`, `weights`: float32 `(rows,)`."""
        rows = np.arange(len(batch), dtype=np.int64)
        labels = np.ascontiguousarray(labels, dtype=np.float32)
        weights = np.ascontiguousarray(np.ones(len(batch)) if weights is None else weights, dtype=np.float32)
        if not len(labels) == len(weights) == len(batch):
            raise ConfigError(
                f"{len(batch)} rows need as many labels and weights, got {len(labels)} and {len(weights)}"
            )
        self.step(batch, rows, np.full(len(batch), LEARN, dtype=np.int8), labels, weights)

    def step(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Carry out an ordered list of operations; see `streamrec.protocols.OrderedModel`."""
        if len(rows) > LARGEST_CALL:
            cuts = [slice(first, first + LARGEST_CALL) for first in range(0, len(rows), LARGEST_CALL)]
            return np.concatenate([self.step(batch, rows[c], ops[c], labels[c], weights[c]) for c in cuts])
        scores, left_out = self._run(batch, rows, ops, labels, weights)
        if left_out:  # nearly never
            if left_out == _kernels.NO_ROOM:
                entries = (batch.ends[rows] - batch.starts[rows])[(ops & LEARN) != 0]
                self.ids.reserve(int(entries.sum()))
                self._grow()
                scores, left_out = self._run(batch, rows, ops, labels, weights)
            self.left_out += left_out
        return scores

    def _run(
        self,
        batch: Batch,
        rows: NDArray[np.int64],
        ops: NDArray[np.int8],
        labels: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], int]:
        scores = np.empty(len(rows), dtype=np.float32)
        columns = (batch.ids, batch.values, batch.fields, batch.starts, batch.ends)
        memory = self._memory or self._map_memory()
        left_out = self._kernel(*columns, rows, ops, labels, weights, *memory, scores)
        if left_out and left_out == _kernels.MISFIT:
            span = f"rows from {np.min(rows, initial=0)} to {np.max(rows, initial=0)}"
            raise ConfigError(
                f"rows must be from 0 to {len(batch) - 1}, and rows, ops, labels and weights equally long, got {span}, "
                f"and {len(rows)}, {len(ops)}, {len(labels)} and {len(weights)} of them"
            )
        return scores, left_out

    def _map_memory(self) -> tuple[Any, ...]:
        """The arguments of the kernel that only change when the table grows: numpy views of the tensors' memory."""
        if self.weights.device.type != "cpu":
            raise ConfigError(
                f"predict, learn and step run on the CPU, but the parameters are on {self.weights.device}; "
                "call model.cpu(), or use forward() there"
            )
        if self.weights.dtype != torch.float32:
            raise ConfigError(
                f"predict, learn and step run in float32, but the parameters are {self.weights.dtype}; "
                "call model.float(), or use forward()"
            )
        tensors = [self.weights, self.optimizer_rows, self.bias, self.optimizer_bias, self.statistics]
        table, state, bias, bias_state, statistics = (tensor.detach().numpy() for tensor in tensors)
        ids = self.ids
        standardize = self._standardize if self._standardize.any() else self._standardize[:0]
        self._memory = (
            *(ids.slots, ids.owners),
            *(table, state, bias, bias_state, standardize, statistics),
            *(self.seed, self._numbers),
        )
        return self._memory

    def _apply(self, fn: Any, recurse: bool = True) -> FM:
        self._memory = None  # .to(), .cuda(), .float(): the tensors move
        statistics = self.statistics
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.statistics.dtype != torch.float64:  # .float(), .half(): means are kept in float64 all the same
            self.statistics = statistics.to(self.statistics.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy, by copy.deepcopy or into a Dask worker, has memory of its own and maps that
        return {name: value for name, value in self.__dict__.items() if name not in ("_memory", "_kernel")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._memory = None
        self._kernel = _kernels.step_kernel(self.dim, self.optimizer.kind, self.linear_optimizer.kind)

    def _grow(self) -> None:
        """Larger tensors, after the table of ids has grown; what they held stays."""
        for tensor in (self.weights, self.optimizer_rows):
            new = tensor.new_zeros(self.ids.capacity, tensor.shape[1])
            kept = min(len(tensor), len(new))
            new[:kept] = tensor.detach()[:kept]
            tensor.data = new
        self._memory = None

    def begin(self, ids: NDArray[np.int64]) -> None:
        """Give these ids rows at their first vectors, as learning them would: what autograd needs to move them."""
        before = len(self.ids)
        if self.ids.reserve(len(ids)):
            self._grow()
        self.ids.insert(np.ascontiguousarray(ids, dtype=np.int64))
        new = self.ids.ids[before:]
        first = torch.from_numpy(_kernels.first_factors(new, self.dim, self.seed, self._numbers[0]))
        with torch.no_grad():
            self.weights[before : len(self.ids), : self.dim] = first
            if isinstance(self.optimizer, FTRL):
                self.optimizer_rows[before : len(self.ids), : self.dim] = self.optimizer.start(first)

    def _begin_optimizers(self) -> None:
        """The optimizers' memory as if every weight had begun where it stands: what a published version goes on
        from."""
        self.optimizer_rows.zero_()
        self.optimizer_bias.zero_()
        if isinstance(self.optimizer, FTRL):
            self.optimizer_rows[:, : self.dim] = self.optimizer.start(self.weights[:, : self.dim])
        if isinstance(self.linear_optimizer, FTRL):
            self.optimizer_rows[:, -self._linear_slots] = self.linear_optimizer.start(self.weights[:, self.dim])
            self.optimizer_bias[0] = self.linear_optimizer.start(self.bias[0])

    # -- for autograd --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Logits, float32 `(rows,)`, on the parameters' device, differentiable in `weights` and `bias`.

        Ids without a row count with their first vectors, as everywhere; `begin` gives them rows beforehand.
        """
        device = self.weights.device
        where = batch.entries
        ids = batch.ids[where]
        statistics = self.statistics.cpu().numpy()
        seen = _kernels.normalized(batch.values[where], batch.fields[where], self._standardize, statistics)
        values = torch.from_numpy(seen).to(device)  # (entries,)
        rows = torch.from_numpy(self.ids.find(ids)).to(device)  # (entries,)
        known = self.weights[rows.clamp(min=0)]  # (entries, dim + 1)
        first = torch.from_numpy(_kernels.first_factors(ids, self.dim, self.seed, self._numbers[0])).to(device)
        start = torch.cat([first, first.new_zeros(len(ids), 1)], dim=1)
        parts = torch.where((rows >= 0)[:, None], known, start) * values[:, None]  # (entries, dim + 1)
        lengths = torch.from_numpy(batch.ends - batch.starts).to(device)
        row_of = torch.repeat_interleave(torch.arange(len(batch), device=device), lengths)  # (entries,)
        sums = parts.new_zeros(len(batch), self.dim + 1).index_add(0, row_of, parts)
        squares = parts.new_zeros(len(batch), self.dim + 1).index_add(0, row_of, parts**2)
        pairs = (sums[:, : self.dim] ** 2 - squares[:, : self.dim]).sum(dim=1) / 2
        return self.bias + sums[:, self.dim] + pairs

    @property
    def factors(self) -> Tensor:
        """float32 `(rows, dim)`: the vectors of `ids.ids`. A view."""
        return self.weights[: len(self.ids), : self.dim]

    @property
    def linear(self) -> Tensor:
        """float32 `(rows,)`: the linear weights of `ids.ids`. A view."""
        return self.weights[: len(self.ids), self.dim]

    # -- saving --------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as what JSON can hold; `from_config` makes the same model, untrained."""
        return {
            "schema": self.schema.to_dict(),
            "dim": self.dim,
            "optimizer": msgspec.to_builtins(self.optimizer),
            "linear_optimizer": msgspec.to_builtins(self.linear_optimizer),
            "init": self.init,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FM:
        """The model that `config` describes. Raises `ConfigError` where it cannot."""
        return cls(
            Schema.from_dict(config["schema"]),
            dim=config["dim"],
            optimizer=optimizer_from_dict(config["optimizer"]),
            linear_optimizer=optimizer_from_dict(config["linear_optimizer"]),
            init=config["init"],
            seed=config["seed"],
        )

    def published(self) -> State:
        """What a scorer needs: `state_dict` without the optimizers' memory."""
        state: dict[str, Any] = dict(self.state_dict())
        return {name: value for name, value in state.items() if not name.startswith("optimizer")}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # torch's own hook: only the rows in use are saved, and the ids with them
        rows = len(self.ids)
        destination[prefix + "ids"] = torch.from_numpy(self.ids.ids.copy())
        destination[prefix + "weights"] = self.weights.detach()[:rows].clone()
        destination[prefix + "bias"] = self.bias.detach().clone()
        destination[prefix + "optimizer_rows"] = self.optimizer_rows[:rows].clone()
        destination[prefix + "optimizer_bias"] = self.optimizer_bias.clone()
        destination[prefix + "statistics"] = self.statistics.clone()
        destination[prefix + "left_out"] = torch.tensor(self.left_out)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        needed = ["ids", "weights", "bias", "statistics"]
        absent = [prefix + name for name in needed if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return
        weights = state_dict[prefix + "weights"]
        if tuple(weights.shape) != (len(state_dict[prefix + "ids"]), self.dim + 1):
            raise SchemaError(
                f"the saved weights are {tuple(weights.shape)} for {len(state_dict[prefix + 'ids'])} ids, "
                f"but dim={self.dim} needs {self.dim + 1} columns; use the dim it was saved with"
            )
        statistics = state_dict[prefix + "statistics"]
        if statistics.shape != self.statistics.shape:
            raise SchemaError(
                f"the saved model has {len(statistics)} fields, but this schema has {len(self.schema)}: "
                f"{', '.join(self.schema.names)}; use the schema it was saved with"
            )
        optimizer_rows = state_dict.get(prefix + "optimizer_rows")
        if optimizer_rows is not None and tuple(optimizer_rows.shape) != (len(weights), self._state_width):
            raise ConfigError(
                f"the saved optimizer memory is {tuple(optimizer_rows.shape)}, but {self.optimizer!r} with "
                f"{self.linear_optimizer!r} needs {self._state_width} columns; use the optimizers it was saved with"
            )
        self.ids.load_state_dict({"ids": state_dict[prefix + "ids"].cpu().numpy()})
        self._grow()
        with torch.no_grad():
            self.weights[: len(weights)] = weights
            self.bias.copy_(state_dict[prefix + "bias"])
            self.statistics.copy_(statistics)
            if optimizer_rows is not None:
                self.optimizer_rows[: len(weights)] = optimizer_rows
                self.optimizer_bias.copy_(state_dict[prefix + "optimizer_bias"])
            else:
                self._begin_optimizers()
        self.left_out = int(state_dict.get(prefix + "left_out", 0))
