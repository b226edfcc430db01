"""FM: a factorization machine over ids that never end, learning event by event."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamrec._pointers import pointers_to
from streamrec.batch import Batch, LabeledRows
from streamrec.errors import ConfigError, SchemaError
from streamrec.hashing import id_of
from streamrec.models import _kernels
from streamrec.models._hash_table import HAND, SIGHTED
from streamrec.models._memory import Rows
from streamrec.models._numbers import MARKERS, MOMENTS, QUANTILE, STANDARDIZE, normalized
from streamrec.models.id_table import IdTable
from streamrec.models.optimizers import FTRL, Adagrad, Optimizer, optimizer_from_dict
from streamrec.protocols import LEARN, SCORE, Changed, State
from streamrec.schema import Id, Ids, Number, Schema

__all__ = ["FM"]

SKETCH = 1 << 22
"""Bytes in which ids without a row are counted. Halved after every 2^19 sightings, so that at most some 5 % of the ids
seen are taken for seen once more than they were."""
_NO_TEXTS = np.zeros(0, dtype=np.int64)
_ROW, _OPS = np.zeros(1, dtype=np.int64), np.array([SCORE, SCORE | LEARN], dtype=np.int8)
CHECKPOINT, PUBLISHED = 1, 2  # bits of a touched row: not in the last checkpoint, not in the last version


class FM(nn.Module):
    """Rendle's factorization machine over a schema: `dim` factors an id; `dim=0` is logistic regression.

    logit = bias + Σ w_i x_i + Σ_{i<j} <v_i, v_j> x_i x_j (Rendle 2010, eq. 1; by its lemma 3.1). Every 64-bit id
    has parameters of its own: w_i starts at 0 and v_i at a seeded random vector that depends on the id alone,
    uniform with the standard deviation `init`. Memory is taken when an id is first learned.

    `optimizer` moves the factors and, unless `linear_optimizer` is given, the bias and the linear weights too. With
    neither it is `Adagrad(lr=0.05, eps=0.1)` for the factors and `FTRL(lr=0.2)` for the rest; docs/why.md says how they
    were chosen.

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

    # addresses are good in this process alone, and some copiers, such as Dask's of modules, take all of __dict__ along
    __slots__ = ("_pointers",)

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
        self.optimizer: Optimizer = optimizer or Adagrad(lr=0.05, eps=0.1)
        self.linear_optimizer: Optimizer = linear_optimizer or optimizer or FTRL(lr=0.2)
        self.init = init
        self.seed = seed
        self.ids = IdTable()
        self.weighs = True
        self.left_out = 0
        """Rows not learned because their logit or gradient was not finite."""
        rule, linear = self.optimizer, self.linear_optimizer
        self._linear_slots = linear.slots + linear.row_slots
        self._state_width = rule.slots * dim + rule.row_slots + self._linear_slots
        self._columns = dim + 1 + self._state_width  # of a row that mean anything
        values = [field if isinstance(field, (Id, Ids)) else None for field in schema] + [None] * len(schema)
        admits = any(field is not None and field.admit > 1 for field in values)
        self._expires = any(field is not None and field.ttl is not None for field in values)
        # by the fields of a batch, the unknown numbers among them
        self._admit = np.array([1 if f is None else f.admit for f in values] if admits else [], dtype=np.int64)
        self._ttl = np.array([math.inf if f is None or f.ttl is None else f.ttl for f in values], dtype=np.float64)
        self._new_ids = np.array([0 if f is None else _id_of_new(f.name, schema.seed) for f in values], dtype=np.int64)
        self._sketch = np.zeros(SKETCH if admits else 0, dtype=np.uint8)
        self._clock = np.array([-math.inf])  # the latest event time learned
        self.weights = nn.Parameter(torch.empty(0, dim + 1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.optimizer_rows: Tensor
        self.optimizer_bias: Tensor
        self.statistics: Tensor
        self.register_buffer("optimizer_rows", torch.empty(0, self._state_width))
        self.register_buffer("optimizer_bias", torch.zeros(max(self._linear_slots, 1)))
        # float64 (fields, columns): see `_numbers`
        how = [_how(f) if isinstance(f, Number) else 0 for f in schema]
        columns = MOMENTS + (2 * MARKERS if QUANTILE in how else 0)
        self.register_buffer("statistics", torch.zeros(len(schema), columns, dtype=torch.float64))
        self._standardize = np.array([*how, *(0 for _ in schema)], dtype=np.uint8)  # unknown: never
        self._rate = 1.0
        self._numbers = np.array([init * 3**0.5, *rule.numbers(), *linear.numbers()], dtype=np.float32)
        kinds = (rule.kind, linear.kind)
        self._row: tuple[Batch | None, NDArray[np.int64], Any] = None, np.zeros(0, dtype=np.int64), ()
        self._kernels = _kernels.kernels_of(dim, *kinds, admits, self._expires)
        # both keep Σ g² of the linear weight last in a row; `_precision`: what a version has told of it
        self._precise = isinstance(self.linear_optimizer, (Adagrad, FTRL))
        self._precision: Tensor | None = None
        self._new_rows(self.ids.capacity)

    @property
    def rate(self) -> float:
        """What multiplies the steps of both optimizers, from 0 to 1000; 1 at first. A learning-rate schedule sets it.

        No part of the state: what is loaded goes on at the rate of the model that loads it. Raises `ConfigError`.
        """
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        if not 0 <= rate <= 1000:
            raise ConfigError(f"rate must be from 0 to 1000, got {rate!r}")
        self._rate = float(rate)
        self._write_rates()

    def _write_rates(self) -> None:
        # in place: the compiled loops hold its address
        self._numbers[1:] = [*self.optimizer.numbers(self._rate), *self.linear_optimizer.numbers(self._rate)]

    # -- the rows ------------------------------------------------------------------------------------------------------

    def _new_rows(self, rows: int) -> None:
        """Memory for so many rows, all zero."""
        width = _kernels.width_of(self.dim, self.optimizer.kind, self.linear_optimizer.kind)
        self._table = Rows((width,), np.float32, rows)
        self._touched = Rows((), np.uint8, rows)
        self._expiry = Rows((), np.float64, rows if self._expires else 0)
        self._take_views()

    def _take_views(self) -> None:
        """Make the tensors views of the table: an id's weights and its optimizers' memory lie side by side."""
        table = torch.from_numpy(self._table.array)
        self.weights.data = table[:, : self.dim + 1]
        self.optimizer_rows = table[:, self.dim + 1 : self._columns]
        self._pointers: NDArray[np.int64] | None = None

    def _is_table(self) -> bool:
        """Whether the tensors are views of the table still."""
        return bool(self.weights.data_ptr() == self._table.array.__array_interface__["data"][0])

    def _gather(self) -> None:
        """Make a table of tensors that are none, after they were moved or copied."""
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
        if not self._is_table():
            weights, memory = self.weights.detach(), self.optimizer_rows
            self._table = Rows(self._table.array.shape[1:], np.float32, len(weights))
            self._take_views()
            with torch.no_grad():
                self.weights.copy_(weights)
                self.optimizer_rows.copy_(memory)

    def _map(self) -> NDArray[np.int64]:
        """What the loops need to know of this model's memory; good until that moves."""
        if self._pointers is not None:
            return self._pointers
        self._gather()
        bias, memory, statistics = (t.detach().numpy() for t in (self.bias, self.optimizer_bias, self.statistics))
        standardize = self._standardize if self._standardize.any() else self._standardize[:0]
        ids = self.ids
        arrays = (
            *(ids.slots, ids.old, ids.owners, ids.header, self._table.array, self._touched.array, self._expiry.array),
            *(bias, memory, standardize, statistics, self._clock),
            *(self._admit, self._ttl, self._new_ids, self._sketch, self._numbers),
        )
        self._pointers = pointers_to(arrays, self.seed, statistics.shape[1])
        return self._pointers

    def _make_room(self, more: int) -> None:
        """Room for so many new ids; what there is stays, and mostly where it is."""
        used = self.ids.used
        self.ids.reserve(more)
        self._fit(used)

    def _fit(self, used: int) -> None:
        """As many rows as the table of ids has room for; the first `used` are in use."""
        rows = self.ids.capacity
        if rows > len(self.weights):
            if self.weights.device.type == "cpu" and self.weights.dtype == torch.float32:
                self._gather()
                self._table.grow(used, rows)
                self._take_views()
            else:
                weights, memory = (t.new_zeros(rows, t.shape[1]) for t in (self.weights, self.optimizer_rows))
                weights[:used], memory[:used] = self.weights.detach()[:used], self.optimizer_rows[:used]
                self.weights.data, self.optimizer_rows = weights, memory
            self._touched.grow(used, rows)
            if self._expires:
                self._expiry.grow(used, rows)
        self._pointers = None

    def _apply(self, fn: Any, recurse: bool = True) -> FM:
        self._pointers = None  # .to(), .cuda(), .float(): the tensors move
        statistics = self.statistics
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.statistics.dtype != torch.float64:  # .float(), .half(): means are kept in float64 all the same
            self.statistics = statistics.to(self.statistics.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy, by copy.deepcopy or into a Dask worker: settings and state, memory of its own
        return {"config": self.config(), "state": self.state_dict(), "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FM.__init__(self, **_arguments(state["config"]))
        self.load_state_dict(state["state"])
        self.train(state["training"])

    # -- scoring and learning ------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows,)`: click probabilities, within 3e-7 of 0 and 1 at the most. Changes nothing."""
        rows = np.arange(len(batch), dtype=np.int64)
        nothing = np.zeros(len(batch), dtype=np.float32)
        scores = np.empty(len(batch), dtype=np.float32)
        columns = (batch.ids, batch.values, batch.fields, batch.starts, batch.ends, batch.times)
        ops, pointers = np.full(len(batch), SCORE, np.int8), self._map()
        texts, _kept = self._read_texts(batch, rows)
        self._kernels.step(*columns, rows, ops, nothing, nothing, pointers, texts, 0, scores)
        return scores

    def _read_texts(self, batch: Batch, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
        """What the loops need to know of the texts of these rows, and what must stay alive for it; here, nothing."""
        return _NO_TEXTS, ()

    def learn(self, batch: Batch, labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """One gradient step of the log loss per row, in order. `labels`, `weights`: float32 `(rows,)`."""
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
        """Carry out an ordered list of operations; see `streamrec.protocols.OrderedModel`."""
        scores = np.empty(len(rows), dtype=np.float32)
        columns = (batch.ids, batch.values, batch.fields, batch.starts, batch.ends, batch.times)
        if self._expires and len(batch.times) != len(batch):
            raise ConfigError(
                "a field of this schema has a ttl, so that rows need their event times: make the batch by encode(), or "
                "give it times"
            )
        done = 0
        texts, _kept = self._read_texts(batch, rows)
        while True:
            pointers = self._map()
            done, left_out = self._kernels.step(*columns, rows, ops, labels, weights, pointers, texts, done, scores)
            if left_out:  # a module takes long to set an attribute
                self.left_out += left_out
            if done == len(rows):
                break
            if done == _kernels.MISFIT:
                span = f"rows from {np.min(rows, initial=0)} to {np.max(rows, initial=0)}"
                raise ConfigError(
                    f"rows must be from 0 to {len(batch) - 1}, and rows, ops, labels and weights equally long, got "
                    f"{span}, and {len(rows)}, {len(ops)}, {len(labels)} and {len(weights)} of them"
                )
            self._make_room(int(batch.ends[rows[done]] - batch.starts[rows[done]]))
        if self.ids.behind and self.ids.keep_up(int((batch.ends[rows] - batch.starts[rows]).sum())):
            self._pointers = None
        return scores

    def one(self, batch: Batch, label: float | None = None, weight: float = 1.0) -> float:
        """The click probability of the one row of `batch`; where there is a `label`, that row is learned then.

        As `step`, bit for bit, for a stream that comes one event at a time: fastest where the batch is the same each
        time, as is that of `Encoder.one`.

        >>> from streamrec import Id, Impression, Schema
        >>> from streamrec.preprocessors import Encoder
        >>> model = FM(Schema(Id("user"), Id("item")), dim=4)
        >>> encoder = Encoder(model.schema)
        >>> shown = Impression(id="i1", time=0.0, user="u1", item="p9")
        >>> before = model.one(encoder.one(shown).batch, label=1.0)
        >>> model.one(encoder.one(shown).batch) > before
        True
        """
        known, columns, _ = self._row
        if known is not batch:
            columns = self._take_row(batch)
        learns = label is not None
        pointers = self._pointers if self._pointers is not None else self._map()
        score = self._kernels.one(columns, pointers, learns, label if learns else 0.0, weight)
        if score < 0:
            if score == _kernels.NO_ROOM:
                self._make_room(int(batch.ends[0] - batch.starts[0]))
                return self.one(batch, label, weight)
            self.left_out += 1
            return -1 - score
        if learns and self.ids.behind and self.ids.keep_up(int(batch.ends[0] - batch.starts[0])):
            self._pointers = None
        return score

    def _take_row(self, batch: Batch) -> NDArray[np.int64]:
        """Remember where the columns of a batch of one row are."""
        if len(batch) != 1 or (self._expires and len(batch.times) != 1):
            raise ConfigError(
                f"one() takes a batch of one row, with its time where a field has a ttl; got {len(batch)} rows and "
                f"{len(batch.times)} times"
            )
        arrays = tuple(
            np.ascontiguousarray(column)
            for column in (batch.ids, batch.values, batch.fields, batch.starts, batch.ends, batch.times)
        )
        columns = pointers_to((*arrays, _ROW, _OPS))
        self._row = batch, columns, arrays
        return columns

    def parts(self, batch: Batch) -> NDArray[np.float32]:
        """float32 `(rows, dim + 1)`: of the entries of each row Σ v_i x_i, and last, Σ w_i x_i and the pairs among
        them. The bias is not in it.

        A row in two parts, a and b, has the logit bias + a[dim] + b[dim] + <a[:dim], b[:dim]>: see `models.ranking`.
        Ids without a row count with their first vectors, numbers that are standardised by the running statistics, as in
        `predict`. Changes nothing.

        >>> from streamrec import Id, Impression, Schema
        >>> from streamrec.preprocessors import encode
        >>> schema = Schema(Id("user"), Id("item"))
        >>> FM(schema, dim=4).parts(encode(schema, [Impression("i1", 0.0, "u1", "p9")]).batch).shape
        (1, 5)
        """
        pointers = self._map()
        columns = (batch.ids, batch.values, batch.fields, batch.starts, batch.ends)
        texts, _kept = self._read_texts(batch, np.arange(len(batch), dtype=np.int64))
        found: NDArray[np.float32] = self._kernels.parts(*columns, pointers, texts)
        return found

    def deviation(self, batch: Batch, prior: float = 1.0) -> NDArray[np.float32]:
        """float32 `(rows,)`: how unsure the logit of each row is, as a standard deviation; of a value never learned,
        `prior` times its number. Changes nothing.

        The Laplace approximation with independent weights of Chapelle and Li 2011 (algorithm 3), of the linear weights:
        √Σ x_i² / (1 / prior² + n_i), where their Σ x² p (1 - p) is n_i, the sum of squared gradients that Adagrad and
        FTRL keep of a weight: by Fisher's identity both are the same on average. The factors are taken as known.
        Raises `ConfigError` where the optimizer keeps no such sum.
        """
        if not prior > 0:
            raise ConfigError(f"prior must be a standard deviation > 0, got {prior!r}")
        if not self._precise:
            raise ConfigError(
                f"{self.linear_optimizer!r} keeps no sum of squared gradients: use Adagrad or FTRL as linear_optimizer"
            )
        where = batch.entries
        seen = normalized(batch.values[where], batch.fields[where], self._standardize, self.statistics.cpu().numpy())
        rows = self.ids.find(batch.ids[where])
        known = np.zeros(len(rows))
        for sums in (self.optimizer_rows[:, -1], self._precision):  # of what it has learned itself, and before it
            if sums is not None:
                there = (rows >= 0) & (rows < len(sums))
                known[there] = np.maximum(known[there], sums[torch.from_numpy(rows[there])].cpu().numpy())
        variance = seen.astype(np.float64) ** 2 / (1.0 / prior**2 + known)
        row_of = np.repeat(np.arange(len(batch)), batch.ends - batch.starts)
        return np.sqrt(np.bincount(row_of, weights=variance, minlength=len(batch))).astype(np.float32)

    # -- for autograd --------------------------------------------------------------------------------------------------

    def begin(self, ids: NDArray[np.int64]) -> None:
        """Give these ids rows at their first vectors, as learning them would: what autograd needs to move them."""
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        ids = ids[np.sort(np.unique(ids, return_index=True)[1])]
        ids = ids[self.ids.find(ids) < 0]
        self._make_room(len(ids))
        rows = self.ids.insert(ids)
        first = torch.from_numpy(_kernels.first_factors(ids, self.dim, self.seed, self._numbers[0]))
        where = torch.from_numpy(rows)
        with torch.no_grad():
            self.weights[where] = torch.cat([first, first.new_zeros(len(ids), 1)], dim=1).to(self.weights)
            self._begin_optimizers(where)
        self._touched.array[rows] = CHECKPOINT | PUBLISHED
        if self._expires:
            self._expiry.array[rows] = math.inf

    def _copy_from(self, other: FM) -> None:
        """Become what `other` is, in memory of its own, but for the settings; its rows must be of the same numbers."""
        other._gather()
        self.ids.copy_from(other.ids)
        used = self.ids.used
        self._new_rows(self.ids.capacity)
        self._table.array[:used] = other._table.array[:used]
        self._touched.array[:used] = CHECKPOINT | PUBLISHED
        self._expiry.array[:used] = other._expiry.array[:used]
        self._clock[:] = other._clock
        self._sketch[:] = other._sketch
        with torch.no_grad():
            self.bias.copy_(other.bias)
            self.statistics.copy_(other.statistics)
            self.optimizer_bias.copy_(other.optimizer_bias)
        self._precision = other._precision
        self.left_out = other.left_out
        self._pointers = None

    def _begin_optimizers(self, rows: Tensor) -> None:
        """The optimizers' memory of these rows as if every weight had begun where it stands."""
        memory = self.optimizer_rows.new_zeros(len(rows), self._state_width)
        weights = self.weights.detach()[rows]
        if isinstance(self.optimizer, FTRL):
            memory[:, : self.dim] = self.optimizer.start(weights[:, : self.dim])
        if isinstance(self.linear_optimizer, FTRL):
            linear = weights[:, self.dim]
            memory[:, -self._linear_slots] = torch.where(linear == 0, 0.0, self.linear_optimizer.start(linear))
        self.optimizer_rows[rows] = memory

    def _begin_bias(self) -> None:
        """The same of the bias."""
        self.optimizer_bias.zero_()
        if isinstance(self.linear_optimizer, FTRL):
            self.optimizer_bias[0] = self.linear_optimizer.start(self.bias[0])

    def forget(self, field: str, value: str) -> int:
        """Take back the row of a value, as of a user who wants to be forgotten; return how many there were, 0 or 1.

        It counts as new from now on. What others have learned from it stays, as does the field's mean.
        """
        known = np.array([id_of(field, value, self.schema.seed)], dtype=np.int64)
        rows = self.ids.find(known)
        if rows[0] < 0:
            return 0
        self._gather()
        self.ids.release(known)
        self._table.array[rows] = 0
        self._touched.array[rows] = CHECKPOINT | PUBLISHED
        if self._expires:
            self._expiry.array[rows] = _kernels.FREE_ROW
        self._pointers = None
        return 1

    def forward(self, batch: Batch) -> Tensor:
        """Logits, float32 `(rows,)`, on the parameters' device, differentiable in `weights` and `bias`.

        Ids without a row count with their first vectors, as everywhere; `begin` gives them rows beforehand.
        """
        device = self.weights.device
        where = batch.entries
        ids = batch.ids[where]
        statistics = self.statistics.cpu().numpy()
        seen = normalized(batch.values[where], batch.fields[where], self._standardize, statistics)
        values = torch.from_numpy(seen).to(device)  # (entries,)
        tables = (self.ids.slots, self.ids.old, self._expiry.array, self._clock[0], self._admit, self._new_ids)
        located, ids = _kernels.located(ids, batch.fields[where], *tables)
        rows = torch.from_numpy(located).to(device)  # (entries,)
        known = self.weights[rows.clamp(min=0)]  # (entries, dim + 1)
        first = torch.from_numpy(_kernels.first_factors(ids, self.dim, self.seed, self._numbers[0])).to(device)
        start = torch.cat([first, first.new_zeros(len(ids), 1)], dim=1)
        parts = torch.where((rows >= 0)[:, None], known, start) * values[:, None]  # (entries, dim + 1)
        lengths = torch.from_numpy(batch.ends - batch.starts).to(device)
        row_of = torch.repeat_interleave(torch.arange(len(batch), device=device), lengths)  # (entries,)
        sums = parts.new_zeros(len(batch), self.dim + 1).index_add(0, row_of, parts)
        squares = parts.new_zeros(len(batch), self.dim + 1).index_add(0, row_of, parts**2)
        for more in self._text_parts(batch):
            sums, squares = sums + more, squares + more**2
        pairs = (sums[:, : self.dim] ** 2 - squares[:, : self.dim]).sum(dim=1) / 2
        return self.bias + sums[:, self.dim] + pairs

    def _text_parts(self, batch: Batch) -> Sequence[Tensor]:
        """Of each text, float32 `(rows, dim + 1)`: its vectors and what is linear; here, of none."""
        return ()

    @property
    def factors(self) -> Tensor:
        """float32 `(rows, dim)`: the vectors of `ids.ids`. A view."""
        return self.weights[: self.ids.used, : self.dim]

    @property
    def linear(self) -> Tensor:
        """float32 `(rows,)`: the linear weights of `ids.ids`. A view."""
        return self.weights[: self.ids.used, self.dim]

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
        return cls(**_arguments(config))

    def published(self) -> State:
        """What a scorer needs: `state_dict` without what only learning does."""
        return self._state(published=True)

    def live(self, published: bool = False) -> State:
        """What `state_dict()`, or `published()`, would hold, the rows as views of this model's memory: they go on
        changing. See `streamrec.protocols.Model`."""
        return self._state(published=published, live=True)

    def changes(self, published: bool = False) -> State:
        """What `state_dict()`, or `published()`, would hold, of the rows only those that changed since the last `mark`
        of that kind. See `streamrec.protocols.Model`."""
        return self._state(published=published, changes=True)

    def mark(self, published: bool = False) -> None:
        """From now on `changes(published)` is about what changes after this."""
        self._touched.array[: self.ids.used] &= ~np.uint8(PUBLISHED if published else CHECKPOINT)

    def load_changes(self, changes: State) -> None:
        """Become, in place, the model whose `changes` these are, having been what it was at its last `mark`.

        Raises `StoreError` or `ConfigError` where they belong to another state.
        """
        ids = changes["ids"]
        used, rows = self.ids.used, ids.rows
        self.ids.change(rows, np.asarray(ids.values), ids.length, np.asarray(changes["free"]))
        self._fit(used)
        self._gather()
        table = self._table.array
        table[rows, : self.dim + 1] = changes["weights"].values.numpy()
        with torch.no_grad():
            self.bias.copy_(changes["bias"])
            self.statistics.copy_(changes["statistics"])
            if "optimizer_rows" in changes:
                table[rows, self.dim + 1 : self._columns] = changes["optimizer_rows"].values.numpy()
                self.optimizer_bias.copy_(changes["optimizer_bias"])
            else:
                self._begin_optimizers(torch.from_numpy(rows))
                self._begin_bias()
        if "precision" in changes and self._precision is not None:
            self._precision = changes["precision"].applied_to(self._precision)
        expiry = changes["expiry"].values.numpy() if "expiry" in changes else math.inf
        self._load_policies(changes, rows, expiry)
        self._touched.array[rows] = CHECKPOINT | PUBLISHED

    def _state(self, *, published: bool, changes: bool = False, live: bool = False) -> dict[str, Any]:
        used = self.ids.used
        mark = PUBLISHED if published else CHECKPOINT
        rows = np.flatnonzero(self._touched.array[:used] & mark) if changes else np.arange(0)
        tensors = [self.weights.detach()] if published else [self.weights.detach(), self.optimizer_rows]
        if changes:  # by numpy, which wakes no threads: on a busy machine they would be waited for
            if self._is_table():
                block = torch.from_numpy(self._table.array.take(rows, axis=0))
                cuts = torch.split(block, [self.dim + 1, self._state_width, block.shape[1] - self._columns], dim=1)
            else:
                cuts = tuple(tensor.index_select(0, torch.from_numpy(rows)) for tensor in tensors)
            leaves: list[Any] = [Changed(rows, part, used) for part in cuts[: len(tensors)]]
        else:
            leaves = [tensor[:used] if live else tensor[:used].clone() for tensor in tensors]
        free = self.ids.free
        ids = self.ids.ids[rows] if changes else self.ids.ids.copy()
        if self._expires:
            now = self._expiry.array[:used]
            ids[(now[rows] if changes else now) == _kernels.FREE_ROW] = 0
            if published:
                free = np.concatenate([free, np.flatnonzero((now < self._clock) & (now > _kernels.FREE_ROW))])
        state: dict[str, Any] = {
            "ids": Changed(rows, torch.from_numpy(ids), used) if changes else torch.from_numpy(ids),
            "free": torch.from_numpy(free),
            "weights": leaves[0],
            "bias": self.bias.detach().clone(),
            "statistics": self.statistics.clone(),
        }
        if published:
            if self._precise:
                if self._precision is not None:  # it goes on from a version, and tells what that knew
                    known = self.optimizer_rows[:used, -1].clone()
                    before = self._precision[:used]
                    known[: len(before)] = torch.maximum(known[: len(before)], before)
                    sums: Any = Changed(rows, known[torch.from_numpy(rows)], used) if changes else known
                elif not changes:
                    sums = self.optimizer_rows[:used, -1] if live else self.optimizer_rows[:used, -1].clone()
                elif self._is_table():
                    sums = Changed(rows, cuts[1][:, -1].contiguous(), used)
                else:
                    sums = Changed(rows, self.optimizer_rows[torch.from_numpy(rows), -1], used)
                state["precision"] = sums
            return state
        state["optimizer_rows"] = leaves[1]
        state["optimizer_bias"] = self.optimizer_bias.clone()
        state["left_out"] = torch.tensor(self.left_out)
        if self._expires:
            expiry = torch.from_numpy(self._expiry.array[rows] if changes else self._expiry.array[:used].copy())
            state["expiry"] = Changed(rows, expiry, used) if changes else expiry
            state["clock"] = torch.from_numpy(self._clock.copy())
            state["hand"] = torch.tensor(int(self.ids.header[HAND]))
        if len(self._admit):
            state["sketch"] = torch.from_numpy(self._sketch.copy())
            state["sighted"] = torch.tensor(int(self.ids.header[SIGHTED]))
        return state

    def _load_policies(self, state: Mapping[str, Any], rows: Any, expiry: Any, prefix: str = "") -> None:
        """What admission and expiry remember; of a state that was published, nothing."""
        if self._expires:
            self._expiry.array[rows] = expiry
            self._expiry.array[self.ids.free] = _kernels.FREE_ROW
            self._clock[:] = np.asarray(state.get(prefix + "clock", -math.inf))
        self.ids.header[HAND] = int(state.get(prefix + "hand", 0))
        self.ids.header[SIGHTED] = int(state.get(prefix + "sighted", 0))
        if prefix + "sketch" in state and len(self._sketch):
            self._sketch[:] = np.asarray(state[prefix + "sketch"])
        self.left_out = int(state.get(prefix + "left_out", self.left_out))
        self._pointers = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # torch's own hook: only the rows in use are saved, and the ids with them
        for name, value in self._state(published=False).items():
            destination[prefix + name] = value

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
                f"the saved model has {len(statistics)} fields with {statistics.shape[1]} statistics each, but this "
                f"schema has {len(self.schema)} with {self.statistics.shape[1]}: {', '.join(self.schema.names)}; use "
                "the schema it was saved with"
            )
        optimizer_rows = state_dict.get(prefix + "optimizer_rows")
        if optimizer_rows is not None and tuple(optimizer_rows.shape) != (len(weights), self._state_width):
            raise ConfigError(
                f"the saved optimizer memory is {tuple(optimizer_rows.shape)}, but {self.optimizer!r} with "
                f"{self.linear_optimizer!r} needs {self._state_width} columns; use the optimizers it was saved with"
            )
        table = {"ids": state_dict[prefix + "ids"].cpu().numpy()}
        if prefix + "free" in state_dict:
            table["free"] = state_dict[prefix + "free"].cpu().numpy()
        self.ids.load_state_dict(table)
        used, kind = len(weights), (self.weights.device, self.weights.dtype)
        self._new_rows(self.ids.capacity)
        self.weights.data, self.optimizer_rows = self.weights.data.to(*kind), self.optimizer_rows.to(*kind)
        with torch.no_grad():
            self.weights[:used] = weights
            self.bias.copy_(state_dict[prefix + "bias"])
            self.statistics.copy_(statistics)
            if optimizer_rows is not None:
                self.optimizer_rows[:used] = optimizer_rows
                self.optimizer_bias.copy_(state_dict[prefix + "optimizer_bias"])
            else:
                self._begin_optimizers(torch.arange(used))
                self._begin_bias()
        self._precision = None if optimizer_rows is not None else state_dict.get(prefix + "precision")
        self._touched.array[:used] = CHECKPOINT | PUBLISHED
        expiry = state_dict.get(prefix + "expiry")
        self._load_policies(state_dict, slice(used), math.inf if expiry is None else expiry.numpy(), prefix)


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments that `config()` wrote."""
    return {
        "schema": Schema.from_dict(config["schema"]),
        "dim": config["dim"],
        "optimizer": optimizer_from_dict(config["optimizer"]),
        "linear_optimizer": optimizer_from_dict(config["linear_optimizer"]),
        "init": config["init"],
        "seed": config["seed"],
    }


def _how(number: Number) -> int:
    """What is done with the values of a field, before they are multiplied with weights."""
    return QUANTILE if number.quantile else STANDARDIZE if number.standardize else 0


@lru_cache(4096)
def _id_of_new(name: str, seed: int) -> int:
    """The id of the row that new values of a field share until they are admitted."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little", signed=True)
