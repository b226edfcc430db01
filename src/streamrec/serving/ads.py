"""A second-price auction for places, by what a click is worth and how likely it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from streamrec.errors import ConfigError
from streamrec.serving.candidates import Ranked

__all__ = ["Ad", "Auction", "auction"]


class Ad(NamedTuple):
    """An ad that has won a place. `value`: expected, score * bid; `price`: what a click on it costs."""

    item: str
    score: float
    bid: float
    value: float
    price: float


class Auction(NamedTuple):
    """Who has won, the first place first, and by item why others could not take part."""

    won: list[Ad]
    refused: dict[str, str]


def auction(ranked: Sequence[Ranked], bids: Mapping[str, float], *, places: int = 1, reserve: float = 0.0) -> Auction:
    """Give `places` by expected value, each at the least price that would still win it.

    Ads are ordered by score * bid: so the score must be a calibrated click probability.
    A click costs the next one's score * bid / the winner's score, and `reserve` at least: the generalized second-price
    auction with quality scores (Edelman, Ostrovsky and Schwarz 2007; Varian 2007). With one place, bidding what a click
    is worth is best for everybody. Bids and prices are a click's, in one currency. Ties in the order of `ranked`.

    An item that has no bid, one that is not a finite number >= 0, one under the reserve, or a score that is no
    probability is refused, as is a bid for an item that is no candidate.

    >>> auction([Ranked("a", 0.5), Ranked("b", 0.25)], {"a": 1.0, "b": 1.5}).won
    [Ad(item='a', score=0.5, bid=1.0, value=0.5, price=0.75)]
    """
    if not isinstance(places, int) or places < 0:
        raise ConfigError(f"places must be a whole number >= 0, got {places!r}")
    if not 0 <= reserve < math.inf:
        raise ConfigError(f"reserve must be a price >= 0, got {reserve!r}")
    refused = dict.fromkeys(bids.keys() - {one.item for one in ranked}, "no candidate")
    running: list[tuple[float, Ranked, float]] = []
    for one in ranked:
        bid = bids.get(one.item)
        if bid is None:
            refused[one.item] = "no bid"
        elif isinstance(bid, bool) or not isinstance(bid, (int, float)) or not 0 <= bid < math.inf:
            refused[one.item] = f"the bid is {bid!r}"
        elif not 0 <= one.score <= 1:
            refused[one.item] = f"the score is {one.score!r}"
        elif bid < reserve:
            refused[one.item] = f"the bid {bid!r} is under the reserve of {reserve!r}"
        else:
            running.append((one.score * bid, one, float(bid)))
    running.sort(key=lambda each: -each[0])
    won = []
    for place, (value, one, bid) in enumerate(running[:places]):
        beaten = running[place + 1][0] if place + 1 < len(running) else 0.0
        price = min(bid, max(reserve, beaten / one.score if one.score > 0 else 0.0))
        won.append(Ad(one.item, one.score, bid, value, price))
    return Auction(won, refused)
