"""A copy of an FM that goes on with other settings: what it has learned stays, as far as it fits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from streamrec._compile import compiled
from streamrec.errors import ConfigError
from streamrec.models import _kernels
from streamrec.models.fm import FM
from streamrec.models.optimizers import FTRL

__all__ = ["variant"]


def variant(model: FM, settings: dict[str, Any]) -> FM:
    """An FM of these settings (see `models.space.with_settings`) that has learned what `model` has.

    Weights stay what they are. With another `dim`, as many factors of each id stay as both have, and the others begin
    where they would have. What an optimizer remembers of a weight stays with it where the optimizer is of the same
    kind; FTRL's z is set anew, so that the weight stays under another rate. Where it is of another kind, it begins at
    the weights as they are.

    >>> from streamrec import FTRL, Id, Schema
    >>> from streamrec.models.space import with_settings
    >>> model = FM(Schema(Id("item")), dim=4, optimizer=FTRL(lr=0.1))
    >>> variant(model, with_settings(model, {"optimizer.lr": 0.2, "dim": 8})).optimizer.lr
    0.2
    """
    if type(model) is not FM:
        raise ConfigError(f"only an FM can go on with other settings, got a {type(model).__name__}")
    made = FM(model.schema, **settings)
    made.train(model.training)
    alike = made.optimizer.kind == model.optimizer.kind, type(made.linear_optimizer) is type(model.linear_optimizer)
    if made.dim == model.dim and all(alike):
        made._copy_from(model)
    else:
        _load(made, model, *alike)
    for of_factors, one, other in (
        (True, made.optimizer, model.optimizer),
        (False, made.linear_optimizer, model.linear_optimizer),
    ):
        if isinstance(one, FTRL) and type(one) is type(other) and one != other:
            _set_z(made, one, of_factors)
    return made


def _load(made: FM, model: FM, same_optimizer: bool, same_linear: bool) -> None:
    """What `model` has learned, into rows of other numbers."""
    state: dict[str, Any] = dict(model.state_dict())
    memory, of_bias = state.pop("optimizer_rows"), state.pop("optimizer_bias")
    shared = min(model.dim, made.dim)
    if made.dim != model.dim:
        weights, ids = state["weights"], state["ids"].numpy()
        factors = torch.from_numpy(_kernels.first_factors(ids, made.dim, made.seed, made._numbers[0]))
        factors[:, :shared] = weights[:, :shared]
        state["weights"] = torch.cat([factors, weights[:, model.dim :]], dim=1)
    made.load_state_dict(state)
    before, after = (one.optimizer.slots * one.dim for one in (model, made))
    mine = made.optimizer_rows[: len(memory)]
    if same_optimizer:
        for slot in range(made.optimizer.slots):
            mine[:, slot * made.dim :][:, :shared] = memory[:, slot * model.dim :][:, :shared]
        rows = made.optimizer.row_slots
        mine[:, after : after + rows] = memory[:, before : before + rows]
    if same_linear:
        mine[:, made._state_width - made._linear_slots :] = memory[:, model._state_width - model._linear_slots :]
        made.optimizer_bias.copy_(of_bias)


def _set_z(made: FM, rule: FTRL, of_factors: bool) -> None:
    """Let the weights be what they are under this rule, whose z was another's."""
    rows, dim = made._table.array[: made.ids.used], made.dim
    numbers = rule.lr, rule.beta, rule.l1, rule.l2
    if of_factors:
        for factor in range(dim):
            _move_z(rows, factor, dim + 1 + factor, 2 * dim + 1 + factor, *numbers)
    else:
        z = dim + 1 + made._state_width - made._linear_slots
        _move_z(rows, dim, z, z + 1, *numbers)
        bias = np.array([[made.bias.item(), *made.optimizer_bias.tolist()]], dtype=np.float32)
        _move_z(bias, 0, 1, 2, *numbers)
        made.optimizer_bias[0] = float(bias[0, 1])


@compiled()
def _move_z(rows: Any, weight: int, z: int, sum_: int, lr: float, beta: float, l1: float, l2: float) -> None:
    """Write the z under which these weights are what they are. A weight of 0 stays so while |z| <= l1."""
    for row in rows:
        w = row[weight]
        if w == 0:
            row[z] = min(max(row[z], -l1), l1)
        else:
            row[z] = -w * ((beta + math.sqrt(row[sum_])) / lr + l2) - (l1 if w > 0 else -l1)
