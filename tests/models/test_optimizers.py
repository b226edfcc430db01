from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import torch

from streamrec.errors import ConfigError
from streamrec.models.optimizers import FTRL, SGD, Adagrad, Adam, optimizer_from_dict


@pytest.mark.parametrize(
    "rule", [SGD(lr=0.3, l2=0.1), Adagrad(eps=1e-4), Adagrad(row_wise=True), FTRL(lr=0.2, l1=1.0), Adam(beta2=0.9)]
)
def test_they_are_plain_and_read_back(rule: Any) -> None:
    saved = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(rule)))
    assert optimizer_from_dict(saved) == rule
    assert len(rule.numbers()) == 5
    with pytest.raises(AttributeError):
        rule.lr = 1.0


@pytest.mark.parametrize("saved", [{}, {"optimizer": "lion"}, {"optimizer": "sgd", "lr": "fast"}, 3, None])
def test_what_is_no_optimizer_is_refused(saved: Any) -> None:
    with pytest.raises(ConfigError, match="not a saved optimizer"):
        optimizer_from_dict(saved)


@pytest.mark.parametrize("rule", [SGD, Adagrad, FTRL, Adam])
@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf"), 1e-40, 1e7])
def test_a_learning_rate_is_a_positive_number(rule: Any, lr: float) -> None:
    with pytest.raises(ConfigError, match=rf"{rule.__name__}: lr must be .*got {re.escape(repr(lr))}"):
        rule(lr=lr)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SGD(l2=-1.0), "SGD: l2 .*-1.0"),
        (lambda: Adagrad(eps=0.0), "Adagrad: eps must be > 0, got 0.0"),
        (lambda: Adagrad(row_wise=1), "Adagrad: row_wise must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: FTRL(l1=float("nan")), "FTRL: l1 .*nan"),
        (lambda: FTRL(beta=0.0), r"beta \+ l2 .*0.0 and 0.0"),
        (lambda: Adam(beta1=1.0), "beta1 and beta2 .*1.0 and 0.999"),
        (lambda: Adam(beta2=0.99999999), "beta1 and beta2 .*0.99999999"),
    ],
)
def test_other_settings_are_checked(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()


def test_ftrl_starts_where_the_weights_stand() -> None:
    rule = FTRL(lr=0.1, beta=1.0, l1=0.5, l2=2.0)
    weights = torch.tensor([0.0, 0.3, -0.2])
    z = rule.start(weights)
    shrunk = torch.where(z.abs() <= rule.l1, torch.zeros(()), z - z.sign() * rule.l1)
    torch.testing.assert_close(-shrunk / (rule.beta / rule.lr + rule.l2), weights)
