"""PSI: has what is shown changed? The population stability index of each field of a schema. Its state can be saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from streamrec.batch import Batch
from streamrec.errors import ConfigError
from streamrec.schema import Field, Hour, Number, Schema, Text, Weekday

__all__ = ["PSI", "Shift", "psi"]

_PARTS = 64  # batches that are kept before they are made one


def psi(expected: ArrayLike, actual: ArrayLike) -> float:
    """Population stability index of two histograms over the same bins: Σ (a - e) log(a / e) of their shares.

    By custom, under 0.1 is no change, over 0.25 a large one. Half a count is added to each bin, so that none is empty.
    nan where one of them has seen nothing. Raises `ConfigError` where they have different bins.

    >>> round(psi([50, 50], [50, 50]), 3), round(psi([500, 500], [800, 200]), 2)
    (0.0, 0.41)
    """
    both = [np.asarray(one, dtype=np.float64) for one in (expected, actual)]
    if both[0].shape != both[1].shape or both[0].ndim != 1:
        raise ConfigError(f"the histograms must have the same bins, got {both[0].shape} and {both[1].shape}")
    if not all(one.sum() > 0 for one in both):
        return math.nan
    e, a = ((one + 0.5) / (one + 0.5).sum() for one in both)
    return float(np.sum((a - e) * np.log(a / e)))


class Shift(NamedTuple):
    """A field whose values are distributed otherwise than they were: by how much (`psi`), and after how many
    impressions and at which event time the window ended that showed it."""

    field: str
    psi: float
    impressions: int
    time: float


class _Bins(NamedTuple):
    """Of one field: where its bins lie, and how many values the reference had in each. `marks`: the edges between
    quantiles of numbers, or the commonest ids; ascending."""

    marks: NDArray[Any]
    counts: NDArray[np.int64]


class PSI:
    """Compares the values of each field, window by window of impressions, to those of a window before.

    The first `window` impressions are the reference; each later window is compared to it, field by field, by `psi`
    over bins that the reference sets. A field over `threshold` has shifted, and its next window is a new reference. The
    bins of a `Number`: between `bins` quantiles, one for each number that is a quantile (so 0, 1 and a price of always
    9.99 have one of their own), and one for unknown. Of `Id` and `Ids`: the `bins` commonest ids, as many for all
    others by hash, and one for none. Of a `Text`: as of a number, its length in characters. `Hour` and `Weekday` are
    left out: time passes.

    Values are those that the model is given, before it standardises them. Memory: `window` encoded impressions. Two
    windows of one distribution differ by 4 bins / window on average, and more where impressions come in bursts. Raises
    `ConfigError` for arguments that cannot work.

    >>> from streamrec import Impression
    >>> from streamrec.preprocessors import encode
    >>> schema = Schema(Number("price"))
    >>> shown = [Impression(f"i{n}", float(n), "u", "p", {"price": n % 9 + n // 200}) for n in range(300)]
    >>> [found] = PSI(schema, window=100).update(encode(schema, shown).batch)
    >>> found.field, found.psi > 0.25, found.impressions, found.time
    ('price', True, 300, 299.0)
    """

    def __init__(self, schema: Schema, *, window: int = 10_000, threshold: float = 0.25, bins: int = 10) -> None:
        if not isinstance(window, int) or window < 2:
            raise ConfigError(f"window must be a number of impressions >= 2, got {window!r}")
        if not 0 < threshold < math.inf:
            raise ConfigError(f"threshold must be > 0, got {threshold!r}")
        if not isinstance(bins, int) or bins < 2:
            raise ConfigError(f"bins must be a whole number >= 2, got {bins!r}")
        self.schema, self.window, self.threshold, self.bins = schema, window, threshold, bins
        self._watched = [(place, field) for place, field in enumerate(schema) if not isinstance(field, (Hour, Weekday))]
        self._parts: list[Batch] = []
        self._held = 0  # impressions in them
        self._windows = 0
        self._bins: dict[str, _Bins] = {}
        self._values: dict[str, float] = {}
        self.forget()

    @property
    def values(self) -> dict[str, float]:
        """Of each field that is watched: its index in the last whole window; nan where that was a reference, or there
        is none yet."""
        return dict(self._values)

    def update(self, batch: Batch) -> list[Shift]:
        """Look at these impressions, in order, of the schema; what their windows show. Cutting a call in two changes
        no bit."""
        found = []
        begin = 0
        while begin < len(batch):
            rows = slice(begin, begin + self.window - self._held)
            part = batch.take(rows)
            self._parts.append(part)
            self._held += len(part)
            begin = rows.stop
            if self._held == self.window:
                found += self._look(Batch.concatenated(self._parts))
                self._parts, self._held = [], 0
        if len(self._parts) > _PARTS:
            self._parts = [Batch.concatenated(self._parts)]
        return found

    def _look(self, whole: Batch) -> list[Shift]:
        self._windows += 1
        entries = whole.entries
        columns = whole.fields[entries], whole.values[entries], whole.ids[entries]
        rows = np.repeat(np.arange(len(whole)), whole.ends - whole.starts)
        found = []
        for place, field in self._watched:
            values, missing = self._of(place, field, whole, columns, rows)
            bins = self._bins.get(field.name)
            if bins is None:
                marks = _commonest(values, self.bins) if values.dtype == np.int64 else _quantiles(values, self.bins)
                self._bins[field.name] = _Bins(marks, _counts(values, missing, marks, self.bins))
                self._values[field.name] = math.nan
                continue
            value = psi(bins.counts, _counts(values, missing, bins.marks, self.bins))
            self._values[field.name] = value
            if value > self.threshold:
                del self._bins[field.name]
                time = float(whole.times[-1]) if len(whole.times) else math.nan
                found.append(Shift(field.name, value, self._windows * self.window, time))
        return found

    def _of(
        self, place: int, field: Field, whole: Batch, columns: tuple[Any, Any, Any], rows: NDArray[np.int64]
    ) -> tuple[NDArray[Any], int]:
        """The values of a field, ids as int64 and numbers as float64, and how many impressions have none."""
        if isinstance(field, Text):
            texts = [one.name for one in self.schema if isinstance(one, Text)]
            refs = whole.text_refs[:, texts.index(field.name)]
            lengths = np.array([*map(len, whole.texts), 0], dtype=np.float64)
            return lengths[refs[refs >= 0]], int(np.count_nonzero(refs < 0))
        fields, values, ids = columns
        here = fields == place
        if isinstance(field, Number):
            known = values[here & np.isfinite(values)].astype(np.float64)
            return known, len(whole) - len(known)
        return ids[here], len(whole) - len(np.unique(rows[here]))

    def fresh(self) -> Self:
        """Another of the same settings that has seen nothing."""
        return type(self)(self.schema, window=self.window, threshold=self.threshold, bins=self.bins)

    def forget(self) -> None:
        """Begin anew, with the next impression: nothing that was shown is remembered."""
        self._parts, self._bins = [], {}
        self._held = self._windows = 0
        self._values = {field.name: math.nan for _, field in self._watched}

    def state_dict(self) -> dict[str, Any]:
        """The reference, and the impressions of the window that is open; cut now."""
        self._parts = [Batch.concatenated(self._parts)] if self._parts else []
        return {
            "windows": self._windows,
            "rows": self._parts[0].to_dict() if self._parts else None,
            "bins": {
                name: {"marks": bins.marks.copy(), "counts": bins.counts.copy()} for name, bins in self._bins.items()
            },
            "values": dict(self._values),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was cut from. Raises `ConfigError` where that watched other fields."""
        if {*state["values"]} != {*self._values}:
            raise ConfigError(
                f"the saved PSI watches {', '.join(state['values'])}, this one {', '.join(self._values)}: "
                "build it with the schema it had"
            )
        self._parts = [] if state["rows"] is None else [Batch.from_dict(state["rows"])]
        self._held = sum(map(len, self._parts))
        self._windows = int(state["windows"])
        self._bins = {
            name: _Bins(np.array(bins["marks"]), np.array(bins["counts"])) for name, bins in state["bins"].items()
        }
        self._values = {name: float(state["values"][name]) for name in self._values}

    def __repr__(self) -> str:
        return f"PSI(window={self.window}, threshold={self.threshold}, bins={self.bins})"


def _quantiles(values: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    parts = np.arange(1, bins) / bins
    return np.unique(np.quantile(values, parts, method="inverted_cdf")) if len(values) else np.empty(0)


def _commonest(ids: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    found, counts = np.unique(ids, return_counts=True)
    return np.sort(found[np.argsort(-counts, kind="stable")[:bins]])


def _counts(values: NDArray[Any], missing: int, marks: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """How many of the values lie in each bin; the last is of those that are missing."""
    left = np.searchsorted(marks, values, side="left")
    if values.dtype != np.int64:  # between two marks, or at one
        places = left + np.searchsorted(marks, values, side="right")
        return np.append(np.bincount(places, minlength=2 * len(marks) + 1), missing)
    others = len(marks) + (values.view(np.uint64) % np.uint64(bins)).astype(np.int64)
    marked = np.isin(values, marks)
    return np.append(np.bincount(np.where(marked, left, others), minlength=len(marks) + bins), missing)
