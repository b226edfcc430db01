"""History: what was known of a user, an item or a pair when an impression happened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression, Labeled
from streamrec.hashing import packed
from streamrec.preprocessors import _history_kernel
from streamrec.preprocessors._keyed_rows import keys_of
from streamrec.preprocessors._recency import Recent
from streamrec.preprocessors.encode import texts_of
from streamrec.preprocessors.label_join import event_codes
from streamrec.protocols import State
from streamrec.schema import Number, seconds_of

__all__ = ["History"]

kernel: Any = _history_kernel  # its loops take more arguments than mypy can follow

_USUAL = {Impression, Feedback}
_NO_LABELS, _NO_KINDS = np.empty(0), np.empty(0, dtype=np.int64)

_EVER = "ever"
_MOST_KINDS = 62  # bits of a row's marks
_COUNTS = ("duplicate_impression", "unmatched", "repeated", "evicted", "evicted_impression")


class History:
    """Add to each impression what the stream has told of its user, its item and the two together until then.

    Nothing of what comes after an impression, or belongs to it, is in its features: feedback counts from its own place
    in the stream on. A labeled example counts at once, when it has been described, as a model learns it at once.

    `by`: groups of impressions, each a name or several: `"user"`, `"item"`, or a feature. `kinds`: of feedback.
    `half_lives`: seconds, or text such as `"1d"`, in which a count halves; `"ever"`: it does not. For the group
    `("user", "item")` and the kind "click" the features are `user_item_since`, the seconds since it was last shown,
    None before; for the half-life "1d" `user_item_shown_1d` and `user_item_click_1d`, counts; and
    `user_item_click_rate_1d`, clicks over impressions, as if there had been `prior` more impressions with the rate of
    the whole stream. Those of "ever" have no such end. `names` lists them all, `fields` are ready for a `Schema`. A
    feature that an impression brings already is left as it is: so a service that has logged what it served is believed.

    `window`: seconds of event time for which an impression is remembered, so that feedback counts for its keys.
    `ttl`: a key not heard of for so long is new again; None: ten of the longest half-lives, or a year.
    `capacity`: keys remembered, and impressions, at most; past that what was heard of longest ago goes.
    `counts` has what was evicted, and feedback that could not be counted. A key takes some 100 bytes.

    >>> shown = [Impression(id=f"i{n}", time=60.0 * n, user="u1", item=f"p{n}") for n in range(3)]
    >>> history = History(by=["user"], half_lives=["ever"])
    >>> stream = [shown[0], Feedback(id="f1", impression_id="i0", time=5.0), *shown[1:]]
    >>> seen = [one.features for one in history.push(stream) if isinstance(one, Impression)]
    >>> seen[0]["user_shown"], seen[1]["user_shown"], seen[1]["user_click"], seen[2]["user_since"]
    (0.0, 1.0, 1.0, 60.0)
    """

    def __init__(
        self,
        *,
        by: Sequence[str | Sequence[str]] = ("user", "item", ("user", "item")),
        kinds: Sequence[str] = ("click",),
        half_lives: Sequence[float | str] = ("1d",),
        prior: float = 20.0,
        window: float | str = "1h",
        ttl: float | str | None = None,
        capacity: int = 1_000_000,
    ) -> None:
        if isinstance(by, str) or not by:
            raise ConfigError(f'by must list groups, such as ["user", ("user", "item")], got {by!r}')
        self.by = tuple((group,) if isinstance(group, str) else tuple(group) for group in by)
        for group in self.by:
            if not group or not all(isinstance(name, str) and name for name in group):
                raise ConfigError(f"a group of `by` is a name or several, got {group!r}")
        if isinstance(kinds, str) or len(kinds) > _MOST_KINDS or len({*kinds}) < len(kinds):
            raise ConfigError(f"kinds must list {_MOST_KINDS} distinct kinds of feedback at most, got {kinds!r}")
        if isinstance(half_lives, str) or not half_lives:
            raise ConfigError(f'half_lives must list seconds or texts such as "1d" or "ever", got {half_lives!r}')
        if not 0 < prior < math.inf:
            raise ConfigError(f"prior must be > 0 impressions and finite, got {prior!r}")
        if not capacity >= len(self.by):
            raise ConfigError(f"capacity must be >= {len(self.by)}, one key a group, got {capacity!r}")
        self.kinds = tuple(kinds)
        self.half_lives = tuple(half_lives)
        self.prior = float(prior)
        self.window = seconds_of(window, "window")
        self.capacity = capacity
        lives = [math.inf if one == _EVER else seconds_of(one, "a half-life") for one in self.half_lives]
        finite = [life for life in lives if life < math.inf]
        self.ttl = seconds_of(ttl, "ttl") if ttl is not None else 10 * max(finite) if finite else 365 * 86_400.0
        ends = ["" if one == _EVER else f"_{one}" if isinstance(one, str) else f"_{one:g}s" for one in half_lives]
        self.names: Sequence[str] = [
            f"{'_'.join(group)}_{what}"
            for group in self.by
            for what in ("since", *(f"{each}{end}" for end in ends for each in self._per_half_life()))
        ]
        if len({*self.names}) < len(self.names):
            raise ConfigError(f"two features would share a name: by={by!r}, kinds={kinds!r}, half_lives={half_lives!r}")
        self._read = list(dict.fromkeys(["user", *(name for group in self.by for name in group)]))
        longest = max(map(len, self.by))
        self._groups = np.full((len(self.by), longest), -1, dtype=np.int64)
        for place, group in enumerate(self.by):
            self._groups[place, : len(group)] = [self._read.index(name) for name in group]
        self._owned = np.array(["user" in group for group in self.by])
        self._code = {kind: code for code, kind in enumerate(self.kinds)}
        self._settings = (np.array(lives), len(self.kinds), self.ttl, self.prior, self.window)
        width = kernel.COUNTS + len(lives) * (1 + len(self.kinds))
        self._counted = Recent(width, capacity)
        self._impressions = Recent(2 * len(self.by), capacity, np.uint64)
        self._totals = np.zeros(width)
        self._newest = np.full(1, -math.inf)
        self._numbers = np.zeros(len(_COUNTS), dtype=np.int64)

    def _per_half_life(self) -> list[str]:
        return ["shown", *(f"{kind}{end}" for kind in self.kinds for end in ("", "_rate"))]

    @property
    def fields(self) -> list[Number]:
        """A field for each of `names`: `Schema(Id("user"), *history.fields)`."""
        return [Number(name, log="_rate" not in name, standardize=True) for name in self.names]

    def __len__(self) -> int:
        """How many keys are remembered, at most `capacity`."""
        return len(self._counted)

    @property
    def counts(self) -> Mapping[str, int]:
        """Nothing is dropped; this is what was not counted, or was forgotten before its time.

        `history_duplicate_impression`: its id is remembered; `history_unmatched`: feedback whose impression is not;
        `history_repeated`: a second of its kind on one impression; `history_evicted`, `history_evicted_impression`.
        """
        return {f"history_{name}": int(count) for name, count in zip(_COUNTS, self._numbers, strict=True)}

    def push(self, events: Sequence[Event]) -> list[Event]:
        """All events, in order; the impressions with their history."""
        if not events:
            return []
        codes = event_codes(events, self._code)
        labels, given = _NO_LABELS, _NO_KINDS
        some: Any = events
        plain = {*map(type, events)} <= _USUAL
        if plain:
            shown = [one for one in some if type(one) is Impression]
            ids = [one.id if type(one) is Impression else one.impression_id for one in some]
            times = np.array([one.time for one in some], dtype=np.float64)
        else:
            shown = [_shown(one) for one in some if not isinstance(one, Feedback)]
            ids = [one.impression_id if isinstance(one, Feedback) else _shown(one).id for one in some]
            times = np.array([one.time if isinstance(one, Feedback) else _shown(one).time for one in some])
            labels = np.array([one.label if isinstance(one, Labeled) else 0.0 for one in some])
            codes_of = self._code
            given = np.array([codes_of.get(one.kind, -1) if isinstance(one, Labeled) else -1 for one in some])
        keys, owners, found = self._keys(shown)
        self._counted.make_room(len(events) * len(self.by))
        self._impressions.make_room(len(shown))
        kernel.take(
            *(codes, times, labels, given, keys_of(*packed(ids), len(ids)), keys, owners, self._owned),
            *(self._counted.parts, self._impressions.parts, self._totals, self._newest, self._numbers),
            *(self._settings, found),
        )
        described = self._described(shown, found)
        if len(described) == len(events) and plain:
            return [*described]
        following = iter(described).__next__
        if plain:
            return [following() if type(one) is Impression else one for one in some]
        return [
            one
            if isinstance(one, Feedback)
            else Labeled(following(), one.label, one.kind, one.weight)
            if isinstance(one, Labeled)
            else following()
            for one in some
        ]

    def describe(self, impressions: Sequence[Impression]) -> list[Impression]:
        """These impressions, each as if it were the next event, with its history. Remembers nothing: for a service."""
        if not impressions:
            return []
        times = np.array([one.time for one in impressions], dtype=np.float64)
        keys, _, found = self._keys(impressions)
        kernel.look(times, keys, self._counted.parts, self._totals, self._newest[0], self._settings, found)
        return self._described(impressions, found)

    @property
    def newest(self) -> float:
        """The newest event time seen, -inf before the first."""
        return float(self._newest[0])

    def _keys(self, shown: Sequence[Impression]) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float64]]:
        """The keys of these impressions and of their users, and room for what is known of them."""
        texts = [text for name in self._read for text in texts_of(name, shown)]
        keys = keys_of(*packed(texts), len(texts))
        owners = keys[: len(shown), 0].copy()  # the first name is "user"
        return kernel.group_keys(keys, len(shown), self._groups), owners, np.empty((len(shown), len(self.names)))

    def _described(self, shown: Sequence[Impression], found: NDArray[np.float64]) -> list[Impression]:
        rows = found.tolist()
        for row, column in np.argwhere(np.isnan(found)).tolist():
            rows[row][column] = None
        names, described = self.names, []
        for one, row in zip(shown, rows, strict=True):
            features = dict(zip(names, row, strict=True))
            features.update(one.features)
            described.append(Impression(one.id, one.time, one.user, one.item, features, one.score))
        return described

    def forget(self, user: str) -> int:
        """Let go of all that is kept of this user; return how many rows that were."""
        owner = int(keys_of(*packed([user]), 1)[0, 0])
        return self._counted.forget(owner) + self._impressions.forget(owner)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON has them."""
        return {
            "by": [list(group) for group in self.by],
            **{name: list(getattr(self, name)) for name in ("kinds", "half_lives")},
            **{name: getattr(self, name) for name in ("prior", "window", "ttl", "capacity")},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> History:
        """A new one with these arguments."""
        return cls(**config)

    def state_dict(self) -> State:
        """The counts by key, the impressions that wait for feedback, and what was counted over all."""
        return {**self.published(), "impressions": self._impressions.state_dict()}

    def published(self) -> State:
        """The part of the state that `describe` needs."""
        return {
            "names": list(self.names),
            "counted": self._counted.state_dict(),
            "totals": self._totals.copy(),
            "newest": None if self._newest[0] == -math.inf else self.newest,
            "numbers": self._numbers.copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from, or can `describe` as it could where that was only `published`.

        What is over this one's `capacity` is evicted. Raises `ConfigError` where it was cut with other features.
        """
        if list(state["names"]) != list(self.names):
            raise ConfigError(
                f"the state is of a history with the features {', '.join(state['names'])}, this one has "
                f"{', '.join(self.names)}: build it as it was, or start it without a state"
            )
        self._numbers = np.array(state["numbers"], dtype=np.int64)
        self._numbers[kernel.EVICTED] += self._counted.load_state_dict(state["counted"])
        if "impressions" in state:
            self._numbers[kernel.EVICTED_IMPRESSIONS] += self._impressions.load_state_dict(state["impressions"])
        self._totals = np.array(state["totals"], dtype=np.float64)
        self._newest[0] = -math.inf if state["newest"] is None else state["newest"]


def _shown(event: Impression | Labeled) -> Impression:
    return event.impression if isinstance(event, Labeled) else event
