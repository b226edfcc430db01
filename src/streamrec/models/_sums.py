"""Sums over the factors, in an order that is written down.

A compiler may add floats in another order only where it is told that this is no matter, and then the order differs
from process to process: it once made `FM.one` and `FM.step`, compiled by two, differ in a bit. So no loop here is
compiled with fastmath. What that brought, sums that need not wait for each other, stands here by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamrec._compile import compiled

__all__ = ["dot", "total"]


@compiled(inline=True)
def dot(these: Any, those: Any, count: int) -> Any:
    """The inner product of the first `count` numbers of two float32 arrays."""
    a = b = c = d = np.float32(0.0)
    for n in range(0, count - 3, 4):
        a += these[n] * those[n]
        b += these[n + 1] * those[n + 1]
        c += these[n + 2] * those[n + 2]
        d += these[n + 3] * those[n + 3]
    for n in range(count // 4 * 4, count):
        a += these[n] * those[n]
    return (a + b) + (c + d)


@compiled(inline=True)
def total(these: Any, count: int) -> Any:
    """The sum of the first `count` numbers of a float32 array."""
    a = b = c = d = np.float32(0.0)
    for n in range(0, count - 3, 4):
        a += these[n]
        b += these[n + 1]
        c += these[n + 2]
        d += these[n + 3]
    for n in range(count // 4 * 4, count):
        a += these[n]
    return (a + b) + (c + d)
