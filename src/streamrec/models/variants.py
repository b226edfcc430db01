"""A copy of an FM that goes on with other settings: what it has learned stays, as far as it fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    state: dict[str, Any] = dict(model.state_dict())
    memory, of_bias = state.pop("optimizer_rows"), state.pop("optimizer_bias")
    shared = min(model.dim, made.dim)
    if made.dim != model.dim:
        weights, ids = state["weights"], state["ids"].numpy()
        factors = torch.from_numpy(_kernels.first_factors(ids, made.dim, made.seed, made._numbers[0]))
        factors[:, :shared] = weights[:, :shared]
        state["weights"] = torch.cat([factors, weights[:, model.dim :]], dim=1)
    made.load_state_dict(state)
    made.train(model.training)
    before, after = (one.optimizer.slots * one.dim for one in (model, made))
    mine, bias = made.optimizer_rows[: len(memory)], made.optimizer_bias
    with torch.no_grad():
        if made.optimizer.kind == model.optimizer.kind:
            for slot in range(made.optimizer.slots):
                mine[:, slot * made.dim :][:, :shared] = memory[:, slot * model.dim :][:, :shared]
            rows = made.optimizer.row_slots
            mine[:, after : after + rows] = memory[:, before : before + rows]
            if isinstance(made.optimizer, FTRL):
                factors = made.weights.detach()[: len(memory), :shared]
                sums = mine[:, made.dim :][:, :shared]
                mine[:, :shared] = _z(made.optimizer, factors, sums, mine[:, :shared])
        one, other = made.linear_optimizer, model.linear_optimizer
        if type(one) is type(other):
            first = made._state_width - made._linear_slots
            mine[:, first:] = memory[:, model._state_width - model._linear_slots :]
            bias.copy_(of_bias)
            if isinstance(one, FTRL):
                linear = made.weights.detach()[: len(memory), made.dim]
                mine[:, first] = _z(one, linear, mine[:, first + 1], mine[:, first])
                bias[0] = _z(one, made.bias.detach()[0], bias[1], bias[0])
    return made


def _z(rule: FTRL, weights: Tensor, sums: Tensor, before: Tensor) -> Tensor:
    """The z under which these weights are what they are. A weight of 0 stays so while |z| <= l1."""
    z = -weights * ((rule.beta + sums.sqrt()) / rule.lr + rule.l2) - rule.l1 * weights.sign()
    return torch.where(weights == 0, before.clamp(-rule.l1, rule.l1), z)
