"""Bloom filters in generations of event time: what `Dedup` remembers ids by that its exact memory has no room for.

A generation takes ids until it is full or a quarter of `ttl` is between its first and its latest; then the next begins,
in the place of the oldest. It is forgotten as a whole when its latest is older than `ttl`. So an id is remembered for
`ttl` at least and a quarter more at most, and a new one is taken for an old one with a chance of at most `error`: a
sixteenth of it in each of sixteen generations (Bloom 1970; probes by enhanced double hashing, Dillinger and Manolios
2004).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.errors import ConfigError
from streamrec.protocols import State

__all__ = ["Generations", "known_by", "remember_in"]

GENERATIONS = 16
_FULL = (
    10  # generations that hold all ids together; the others are for those that time has closed before they were full
)
_SPAN = 0.25  # of ttl, from the first of a generation to its latest
_FIRST, _LATEST = range(2)  # columns of `times`
_CURRENT, _MOST, _BITS, _PROBES, _FORGOTTEN, _COUNTS = range(6)  # in `numbers`; from `_COUNTS` the ids in each


class Generations:
    """Room for `beyond` ids in the last `ttl` seconds, at `error`. Takes some 7 bytes an id at an error of 1e-6."""

    def __init__(self, beyond: int, error: float) -> None:
        most = -(-beyond // _FULL)
        probes = math.ceil(math.log2(GENERATIONS / error))
        bits = math.ceil(most * probes / math.log(2))
        if bits >= 2**32:
            raise ConfigError(f"beyond={beyond!r} ids at error={error!r} are too many: at most {2**32 * 10 // 50:,}")
        self.bits: NDArray[np.uint64] = np.zeros((GENERATIONS if beyond else 0, bits // 64 + 1), dtype=np.uint64)
        self.times: NDArray[np.float64] = np.full((GENERATIONS, 2), -np.inf)
        self.numbers: NDArray[np.int64] = np.zeros(_COUNTS + GENERATIONS, dtype=np.int64)
        self.numbers[[_MOST, _BITS, _PROBES]] = most, bits, probes

    def __len__(self) -> int:
        """How many ids are in them."""
        return int(self.numbers[_COUNTS:].sum())

    @property
    def forgotten(self) -> int:
        """How many ids went before their time."""
        return int(self.numbers[_FORGOTTEN])

    def state_dict(self) -> State:
        """Those that hold anything: `bits`, uint64 `(generations, words)`."""
        used = np.flatnonzero(self.numbers[_COUNTS:])
        return {
            "bits": self.bits[used],
            "used": used,
            "times": self.times.copy(),
            "numbers": self.numbers.copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where it was cut with other settings."""
        numbers = np.asarray(state["numbers"])
        settings = [_MOST, _BITS, _PROBES]
        if not np.array_equal(numbers[settings], self.numbers[settings]):
            raise ConfigError("the state was cut with another beyond or error: give the Dedup those of the state")
        self.bits = np.zeros_like(self.bits)
        self.bits[np.asarray(state["used"])] = state["bits"]
        self.times[:] = state["times"]
        self.numbers[:] = numbers


@compiled()
def known_by(high: Any, low: Any, oldest: float, bits: Any, times: Any, numbers: Any) -> bool:
    """Whether one whose latest is not before `oldest` has the key, or seems to."""
    for generation in range(len(bits)):
        if numbers[_COUNTS + generation] == 0 or times[generation, _LATEST] < oldest:
            continue
        at, step, known = high, low, True
        for probe in range(numbers[_PROBES]):
            bit = np.int64(((at >> np.uint64(32)) * np.uint64(numbers[_BITS])) >> np.uint64(32))
            if not (bits[generation, bit >> 6] >> np.uint64(bit & 63)) & np.uint64(1):
                known = False
                break
            at += step
            step += np.uint64(probe)
        if known:
            return True
    return False


@compiled()
def remember_in(
    high: Any, low: Any, time: float, newest: float, ttl: float, bits: Any, times: Any, numbers: Any
) -> None:
    """Put a key into the generation of now."""
    now = numbers[_CURRENT]
    count = numbers[_COUNTS + now]
    if count and (count >= numbers[_MOST] or time - times[now, _FIRST] > ttl * _SPAN):
        now = (now + 1) % len(bits)
        numbers[_CURRENT] = now
        if newest - times[now, _LATEST] <= ttl:
            numbers[_FORGOTTEN] += numbers[_COUNTS + now]
        bits[now, :] = np.uint64(0)
        numbers[_COUNTS + now] = count = 0
    at, step = high, low
    for probe in range(numbers[_PROBES]):
        bit = np.int64(((at >> np.uint64(32)) * np.uint64(numbers[_BITS])) >> np.uint64(32))
        bits[now, bit >> 6] |= np.uint64(1) << np.uint64(bit & 63)
        at += step
        step += np.uint64(probe)
    times[now, _FIRST] = time if count == 0 else min(times[now, _FIRST], time)
    times[now, _LATEST] = time if count == 0 else max(times[now, _LATEST], time)
    numbers[_COUNTS + now] += 1
