"""What is put aside of a push: dead letters, and which events are left."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from streamrec.events import DeadLetter, Feedback, Impression, Item, Labeled, place_of
from streamrec.preprocessors import Problem

__all__ = ["letters_of", "places_of"]


def letters_of(
    events: Sequence[Item],
    checked: Sequence[Item],
    shown: Sequence[Impression],
    problems: Sequence[Problem],
    places: Sequence[int],
    before: int,
) -> list[DeadLetter]:
    """The dead letters among the `checked` events, and one for each unusable value, whose event goes on without it.

    In the order of the stream, so that the same letters are kept however it is cut. Letters without a position stand
    where the source says, or else where they were pushed: after so many events `before`. `places`: where the
    impressions `shown` to the model, which have `problems`, stand among those checked.
    """
    letters: list[tuple[int, DeadLetter]] = []
    for place, item in enumerate(checked):
        if isinstance(item, DeadLetter):
            position = item.position or place_of(events, place) or {"event": before + place}
            letters.append((place, DeadLetter(position, item.reason, item.raw)))
    for problem in problems:
        place = places[problem.row] if problem.row < len(places) else len(checked)
        reason = f"unusable value: {problem.field}: {problem.reason}"
        letters.append((place, DeadLetter({"impression_id": shown[problem.row].id}, reason)))
    return [letter for _, letter in sorted(letters, key=itemgetter(0))]


def places_of(checked: Sequence[Item], kept: Sequence[Any]) -> list[int]:
    """Where the impressions that were kept stand among those checked. Preprocessors keep the order."""
    left = iter([e for e in kept if not isinstance(e, Feedback)])
    given = set(map(id, checked))
    places = []
    waiting = next(left, None)
    for place, event in enumerate(checked):
        if waiting is None:
            break
        # by id only where a preprocessor has put another object in its place: one dropped may share the id
        if isinstance(event, (Impression, Labeled)) and (
            waiting is event or (id(waiting) not in given and _id(waiting) == _id(event))
        ):
            places.append(place)
            waiting = next(left, None)
    return places


def _id(event: Any) -> Any:
    return (event.impression.id, event.kind) if isinstance(event, Labeled) else event.id
