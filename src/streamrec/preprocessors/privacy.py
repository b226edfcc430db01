"""Privacy at the door: what nobody needs to know never gets past it."""

from __future__ import annotations

import ipaddress
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from streamrec.errors import ConfigError
from streamrec.events import Event, Feedback, Impression, Labeled
from streamrec.protocols import State

__all__ = ["Pseudonymize", "Redact", "network", "prefix", "steps"]


class Pseudonymize:
    """Put pseudonyms in the place of users: keyed hashes, which nobody can turn back, or try names on, without the key.

    `keys`: at least 16 secret bytes; or by event time, POSIX seconds, from which on each is used, so that keys can be
    rotated: from then on a user is another one, to the model as to everybody. `fields`: what to replace: `"user"`, and
    names of features; of a list each value. A pseudonym is BLAKE2b of the value, keyed, 128 bits in hexadecimal,
    another one in each field. Keys are in no state and no file; of each, 64 bits of a hash are, so that a run cannot go
    on with others by mistake. `capacity`: pseudonyms kept at hand.

    A service must ask for the same: `scorer.rank(user=stage.pseudonym("u1", time=now), ...)`.

    >>> stage = Pseudonymize(b"sixteen bytes or more")
    >>> [one] = stage.push([Impression("i1", 0.0, "u1", "p9")])
    >>> one.user == stage.pseudonym("u1", time=0.0), len(one.user)
    (True, 32)
    """

    def __init__(
        self, keys: bytes | Mapping[float, bytes], *, fields: Collection[str] = ("user",), capacity: int = 100_000
    ) -> None:
        given = {0.0: keys} if isinstance(keys, (bytes, bytearray)) else keys
        if not isinstance(given, Mapping) or not given:
            raise ConfigError("keys must be secret bytes, or map the event times from which they are used to them")
        if any(not isinstance(key, (bytes, bytearray)) or not 16 <= len(key) <= 64 for key in given.values()):
            raise ConfigError("a key must have 16 to 64 bytes: secrets.token_bytes(32) makes one")
        if isinstance(fields, str) or not fields or "item" in fields:
            raise ConfigError(f'fields must list "user" or names of features, got {fields!r}')
        if capacity < 1:
            raise ConfigError(f"capacity must be >= 1 pseudonym, got {capacity!r}")
        self.fields = tuple(fields)
        self._starts = sorted(float(start) for start in given)
        self._keys = [bytes(key) for _, key in sorted((float(start), key) for start, key in given.items())]
        self._features = [name for name in self.fields if name != "user"]
        self._hashed = lru_cache(maxsize=capacity)(self._hash)

    def __repr__(self) -> str:  # no key in a log
        return f"Pseudonymize(<{len(self._keys)} keys>, fields={self.fields!r})"

    @property
    def counts(self) -> Mapping[str, int]:
        """Empty: nothing is dropped."""
        return {}

    def pseudonym(self, value: str, *, time: float, field: str = "user") -> str:
        """What stands in the place of this value at a time."""
        return self._hashed(value, max(bisect_right(self._starts, time) - 1, 0), field)

    def pseudonyms(self, user: str) -> list[str]:
        """What stood in the place of this user at any time: one for each key."""
        return [self._hashed(user, number, "user") for number in range(len(self._keys))]

    def _hash(self, value: str, number: int, field: str) -> str:
        data, person = value.encode("utf-8", "surrogatepass"), field.encode("utf-8", "surrogatepass")[:16]
        return blake2b(data, digest_size=16, key=self._keys[number], person=person).hexdigest()

    def push(self, events: Sequence[Event]) -> list[Event]:
        """All events, in order, those of users with pseudonyms."""
        return [one if isinstance(one, Feedback) else _with(one, self._replaced(_shown(one))) for one in events]

    def _replaced(self, shown: Impression) -> Impression:
        number = max(bisect_right(self._starts, shown.time) - 1, 0)
        user = self._hashed(shown.user, number, "user") if "user" in self.fields else shown.user
        features = shown.features
        for name in self._features:
            if features.get(name) is not None:
                features = {**features, name: self._value(features[name], number, name)}
        return Impression(shown.id, shown.time, user, shown.item, features, shown.score)

    def _value(self, value: Any, number: int, field: str) -> Any:
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._value(one, number, field) for one in value]
        if isinstance(value, Mapping):
            return {self._value(one, number, field): weight for one, weight in value.items()}
        return self._hashed(str(value), number, field)

    def state_dict(self) -> State:
        """Of each key 64 bits of a hash, which do not give it away."""
        return {"keys": [self._fingerprint(key) for key in self._keys], "fields": list(self.fields)}

    def load_state_dict(self, state: State) -> None:
        """Nothing is remembered. Raises `ConfigError` where the state is of one with a key that this one has not."""
        mine = {self._fingerprint(key) for key in self._keys}
        if not {*state["keys"]} <= mine or list(state["fields"]) != list(self.fields):
            raise ConfigError(
                "the state is of other keys or fields: with them every user would be a new one. Give the keys that "
                "were used, and a new one with the time from which it is to be used"
            )

    @staticmethod
    def _fingerprint(key: bytes) -> str:
        return blake2b(b"fingerprint", digest_size=8, key=key).hexdigest()


class Redact:
    """Take features out of impressions, or make them coarse, before anything is stored or learned.

    `drop`: names of features that go. `only`: the names that stay; all others go. `coarsen`: by name, a function of the
    value, such as `prefix(3)`, `steps(10)` or `network(24)`. Where it raises, the feature goes, and is counted.

    >>> redact = Redact(drop=["email"], coarsen={"zip": prefix(2), "age": steps(10)})
    >>> [one] = redact.push([Impression("i1", 0.0, "u", "p", {"email": "a@b", "zip": "10115", "age": 37})])
    >>> one.features
    {'zip': '10', 'age': 30}
    """

    def __init__(
        self,
        *,
        drop: Collection[str] = (),
        only: Collection[str] | None = None,
        coarsen: Mapping[str, Callable[[Any], Any]] = {},
    ) -> None:
        if isinstance(drop, str) or isinstance(only, str):
            raise ConfigError("drop and only take several names: pass a list, not one text")
        if any(not callable(rule) for rule in coarsen.values()):
            raise ConfigError(f"coarsen maps names to functions of a value, such as prefix(3), got {coarsen!r}")
        if {"user", "item"} & {*drop, *coarsen}:
            raise ConfigError("users and items are no features: Pseudonymize replaces users")
        self.drop = frozenset(drop)
        self.only = None if only is None else frozenset(only)
        self.coarsen = dict(coarsen)
        self._errors = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """`redact_error`: values that could not be made coarse, and went."""
        return {"redact_error": self._errors}

    def push(self, events: Sequence[Event]) -> list[Event]:
        """All events, in order, with what is left of their features."""
        return [one if isinstance(one, Feedback) else _with(one, self._redacted(_shown(one))) for one in events]

    def _redacted(self, shown: Impression) -> Impression:
        left: dict[str, Any] = {}
        for name, value in shown.features.items():
            if name in self.drop or (self.only is not None and name not in self.only):
                continue
            rule = self.coarsen.get(name)
            if rule is not None and value is not None:
                try:
                    value = rule(value)
                except Exception:  # broad on purpose: the rule is the user's, and the value must not get past it
                    self._errors += 1
                    continue
            left[name] = value
        return Impression(shown.id, shown.time, shown.user, shown.item, left, shown.score)

    def state_dict(self) -> State:
        """The count."""
        return {"errors": self._errors}

    def load_state_dict(self, state: State) -> None:
        """Become what `state` was cut from."""
        self._errors = state["errors"]


def prefix(length: int) -> Callable[[Any], str]:
    """The first characters of a text: of a postcode its region."""
    if not length >= 0:
        raise ConfigError(f"length must be >= 0 characters, got {length!r}")
    return lambda value: str(value)[:length]


def steps(width: float) -> Callable[[Any], Any]:
    """The largest multiple of `width` that is no larger: of an age its decade."""
    if not width > 0:
        raise ConfigError(f"width must be > 0, got {width!r}")
    return lambda value: value // width * width


def network(bits: int) -> Callable[[Any], str]:
    """The network of an IP address, of so many bits; of one of version 6, of twice as many.

    >>> network(24)("192.0.2.77")
    '192.0.2.0/24'
    """
    if not 0 <= bits <= 32:
        raise ConfigError(f"bits must be from 0 to 32, got {bits!r}")

    def coarse(value: Any) -> str:
        address = ipaddress.ip_address(value)
        many = bits if address.version == 4 else 2 * bits
        return str(ipaddress.ip_network((address, many), strict=False))

    return coarse


def _shown(event: Impression | Labeled) -> Impression:
    return event.impression if isinstance(event, Labeled) else event


def _with(event: Impression | Labeled, shown: Impression) -> Event:
    return Labeled(shown, event.label, event.kind, event.weight) if isinstance(event, Labeled) else shown
