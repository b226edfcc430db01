"""By: what an impression is grouped by, a field's name or a rule, as text or as a 64-bit key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from streamrec.errors import ConfigError
from streamrec.events import Impression
from streamrec.hashing import hashes

__all__ = ["NO_KEY", "By", "Rule"]

Rule = Union[str, Callable[[Impression], Any]]
NO_KEY = 0
"""The key of an impression that has no group."""


class By:
    """`"user"` and `"item"` are the impression's own, any other name is a feature; a function gives the value.

    Text, numbers and booleans are values; anything else, absence too, is none.
    """

    def __init__(self, by: Rule) -> None:
        if not (callable(by) or (isinstance(by, str) and by)):
            raise ConfigError(f'by must be a name such as "user" or a function of the impression, got {by!r}')
        self.rule = by
        self.name: str = by if isinstance(by, str) else getattr(by, "__name__", type(by).__name__)

    def text(self, impression: Impression) -> str | None:
        """The value as text; None where there is none."""
        rule = self.rule
        value: Any
        if not isinstance(rule, str):
            value = rule(impression)
        elif rule == "user" or rule == "item":
            value = impression.user if rule == "user" else impression.item
        else:
            value = impression.features.get(rule)
        return str(value) if isinstance(value, (str, int, float)) else None

    def keys(self, impressions: Sequence[Impression]) -> NDArray[np.int64]:
        """int64 `(n,)`: a hash of the value of each, `NO_KEY` where there is none."""
        texts = [self.text(impression) for impression in impressions]
        keys = hashes([text or "" for text in texts])
        keys[keys == NO_KEY] = 1
        keys[[text is None for text in texts]] = NO_KEY
        return keys
