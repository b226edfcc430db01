"""A copy of an FM that goes on with other settings: what it has learned stays, as far as it fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
    if of_factors:
        for factor in range(dim):
            _move_z(rows[:, factor], rows[:, dim + 1 + factor], rows[:, 2 * dim + 1 + factor], rule)
    else:
        z = dim + 1 + made._state_width - made._linear_slots
        _move_z(rows[:, dim], rows[:, z], rows[:, z + 1], rule)
        bias = np.array([made.bias.item(), *made.optimizer_bias.tolist()], dtype=np.float32)
        _move_z(bias[:1], bias[1:2], bias[2:3], rule)
        made.optimizer_bias[0] = float(bias[1])


def _move_z(weights: NDArray[np.float32], z: NDArray[np.float32], sums: NDArray[np.float32], rule: FTRL) -> None:
    """Write the z under which these weights are what they are, all `(rows,)`: that at which they would begin, and what
    the gradients so far hold them back by. A weight of 0 stays so while |z| <= l1."""
    exact = weights.astype(np.float64)
    found = rule.start(torch.from_numpy(exact)).numpy() - exact * np.sqrt(sums) / rule.lr
    z[...] = np.where(exact == 0, np.clip(z, -rule.l1, rule.l1), found)
