"""How one gradient moves the parameters of one id: the optimizers' formulas, compiled.

The numbers of a rule are four settings, the learning rate first, and the rate of the moment, by which FTRL multiplies
the step: in the others it is in the learning rate already. For FTRL it cannot be, since its weights are all of its
gradients times the learning rate, and one that changed would move them back and forth.

A row of the FM's memory holds `dim` factors, the linear weight, and then what the optimizers remember of them: the
factors' slots (each `dim` wide), the factors' row slot, the linear slots.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from streamrec._compile import compiled
from streamrec.models._sums import dot

__all__ = ["LARGEST", "Updates", "bounded", "first_factor", "updates_of"]

SGD, ADAGRAD, FTRL, ADAM, ROW_ADAGRAD = 0, 1, 2, 3, 4
LARGEST = np.float32(1e9)  # of a gradient: nothing sensible comes near, and float32 holds the square, many times

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S40 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(40)


@compiled(inline=True)
def first_factor(key: Any, factor: int, seed: Any, scale: float) -> Any:
    """Where factor number `factor` of an id starts: uniform in ±scale, a function of the id and the seed alone."""
    # SplitMix64 (Steele et al. 2014), so that an id's first vector does not depend on when it came
    mixed = np.uint64(key) ^ seed
    mixed += _GOLDEN * np.uint64(factor + 1)
    mixed = (mixed ^ (mixed >> _S30)) * _MIX_1
    mixed = (mixed ^ (mixed >> _S27)) * _MIX_2
    mixed ^= mixed >> _S31
    return np.float32((np.float32(mixed >> _S40) * np.float32(2.0**-23) - np.float32(1.0)) * scale)


@compiled(inline=True)
def bounded(g: Any, most: Any) -> Any:
    return min(max(g, -most), most)


@compiled(inline=True)
def _sgd(w: Any, g: Any, numbers: Any) -> Any:
    # the one rule by which a weight can run away: lr l2 > 2
    return min(max(w - numbers[0] * (g + numbers[1] * w), -LARGEST), LARGEST)


@compiled(inline=True)
def _adagrad(w: Any, g: Any, n: Any, numbers: Any) -> Any:
    return w - numbers[0] * g / (math.sqrt(n) + numbers[2])


@compiled(inline=True)
def _ftrl_weight(z: Any, root: Any, inverse: Any, beta: Any, l1: Any, l2: Any) -> Any:
    """The weight at z and √n = root; `inverse`: 1 / lr."""
    return (bounded(z, l1) - z) / ((beta + root) * inverse + l2)


@compiled(inline=True)
def _ftrl_start(w: Any, numbers: Any) -> Any:
    """The z at which a weight that has seen no gradient is w."""
    return -w * (numbers[1] * numbers[0] + numbers[3]) - (numbers[2] if w > 0 else -numbers[2])


class Updates(NamedTuple):
    """The compiled functions for one number of factors and one pair of optimizers."""

    begin_memory: Any
    """(row, factors' numbers, linear numbers): the optimizers' memory of a row whose weights have seen no gradient."""
    move_linear: Any
    """(weights, place, gradient, memory, place of the memory, numbers)."""
    move_factors: Any
    """(row, sums, g x, x, numbers, scratch): by the gradients g x (sum - w x) of all factors."""
    linear_at: int
    """Where the linear slots begin in a row."""
    end: int
    """How many numbers a row has."""


@cache
def updates_of(dim: int, factor_rule: int, linear_rule: int) -> Updates:
    """The updates for a row of `dim` factors, which the compiler then knows."""
    if linear_rule == ROW_ADAGRAD:  # a linear weight is a part of one
        linear_rule = ADAGRAD
    factor_slots = (0, 1, 2, 2, 0)[factor_rule]
    a = dim + 1  # the first slot of the factors
    b = a + dim
    c = a + factor_slots * dim  # the row slot
    linear_at = c + (1 if factor_rule in (ADAM, ROW_ADAGRAD) else 0)
    end = linear_at + (0, 1, 2, 3)[linear_rule]
    share = np.float32(1.0 / max(dim, 1))
    one, zero = np.float32(1.0), np.float32(0.0)

    @compiled(inline=True)
    def begin_memory(row: Any, fnum: Any, lnum: Any) -> None:
        for f in range(a, end):
            row[f] = zero
        if factor_rule == FTRL:
            for f in range(dim):
                row[a + f] = _ftrl_start(row[f], fnum)
        if linear_rule == FTRL and row[dim] != zero:  # z = 0 is where a linear weight of 0 starts
            row[linear_at] = _ftrl_start(row[dim], lnum)

    @compiled(inline=True)
    def move_linear(w: Any, at: int, g: Any, s: Any, base: int, numbers: Any) -> None:
        if linear_rule == SGD:
            w[at] = _sgd(w[at], g, numbers)
        elif linear_rule == ADAGRAD:
            g += numbers[1] * w[at]
            s[base] += g * g
            w[at] = _adagrad(w[at], g, s[base], numbers)
        elif linear_rule == FTRL:
            n = s[base + 1]
            grown = n + g * g
            root = math.sqrt(grown)
            z = s[base] + g * numbers[4] - (root - math.sqrt(n)) * numbers[0] * w[at]
            s[base] = z
            s[base + 1] = grown
            w[at] = _ftrl_weight(z, root, numbers[0], numbers[1], numbers[2], numbers[3])
        else:
            s[base + 2] += one
            s[base] = numbers[1] * s[base] + (one - numbers[1]) * g
            s[base + 1] = numbers[2] * s[base + 1] + (one - numbers[2]) * g * g
            rate = numbers[0] / (one - numbers[1] ** s[base + 2])
            root = math.sqrt(one - numbers[2] ** s[base + 2])
            w[at] -= rate * s[base] / (math.sqrt(s[base + 1]) / root + numbers[3])

    @compiled(inline=True)
    def move_factors(w: Any, sums: Any, gx: Any, x: Any, numbers: Any, kept: Any) -> None:
        if factor_rule == SGD:
            for f in range(dim):
                w[f] = _sgd(w[f], gx * (sums[f] - w[f] * x), numbers)
        elif factor_rule == ADAGRAD:
            for f in range(dim):
                g = gx * (sums[f] - w[f] * x) + numbers[1] * w[f]
                n = w[a + f] + g * g
                w[a + f] = n
                w[f] = _adagrad(w[f], g, n, numbers)
        elif factor_rule == ROW_ADAGRAD:
            for f in range(dim):
                kept[f] = gx * (sums[f] - w[f] * x) + numbers[1] * w[f]
            n = w[c] + dot(kept, kept, dim) * share
            w[c] = n
            rate = numbers[0] / (math.sqrt(n) + numbers[2])
            for f in range(dim):
                w[f] -= rate * kept[f]
        elif factor_rule == FTRL:
            # read once: for all the compiler knows, the row is where they are, and then the loop is not made of vectors
            inverse, beta, l1, l2, rate = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
            for f in range(dim):
                g = gx * (sums[f] - w[f] * x)
                n = w[b + f]
                grown = n + g * g
                root = math.sqrt(grown)
                z = w[a + f] + g * rate - (root - math.sqrt(n)) * inverse * w[f]
                w[a + f] = z
                w[b + f] = grown
                w[f] = _ftrl_weight(z, root, inverse, beta, l1, l2)
        else:
            w[c] += one
            rate = numbers[0] / (one - numbers[1] ** w[c])
            root = math.sqrt(one - numbers[2] ** w[c])
            for f in range(dim):
                g = gx * (sums[f] - w[f] * x)
                m = numbers[1] * w[a + f] + (one - numbers[1]) * g
                v = numbers[2] * w[b + f] + (one - numbers[2]) * g * g
                w[a + f] = m
                w[b + f] = v
                w[f] -= rate * m / (math.sqrt(v) / root + numbers[3])

    return Updates(begin_memory, move_linear, move_factors, linear_at, end)
