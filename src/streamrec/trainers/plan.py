"""Plan: what a push asks the model to do, and the metrics to judge, in the order of its events."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrec._compile import compiled
from streamrec.preprocessors._join_kernel import AT_ONCE, CORRECTION, LABEL
from streamrec.preprocessors.label_join import CLOSED, PASSED, UNKNOWN
from streamrec.protocols import LEARN, SCORE, WEIGH

__all__ = ["Plan", "plan"]

_SCORE, _LEARN, _BOTH, _WEIGH = np.int8(SCORE), np.int8(LEARN), np.int8(SCORE | LEARN), np.int8(WEIGH)


class Plan(NamedTuple):
    """Columns for one call of the model, one of the metrics, and what is to be freed afterwards.

    `rows`, `ops`, `labels`, `weights`: `(operations,)`, as `OrderedModel.step` takes them; `scored`: int64 `(scores,)`,
    where in them each impression of the push is scored. `judged_rows`, `judged_labels`, `judged_weights`,
    `judged_kinds`: `(judged,)`, the labels to judge served scores by, their kinds as numbers; `judged_after`: how many
    of the scores come before each is known. `freed`: int64, slots that are free when all is done. `learned`,
    `sampled_out`: counts.
    """

    rows: NDArray[np.int64]
    ops: NDArray[np.int8]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]
    scored: NDArray[np.int64]
    judged_rows: NDArray[np.int64]
    judged_labels: NDArray[np.float32]
    judged_weights: NDArray[np.float32]
    judged_kinds: NDArray[np.int64]
    judged_after: NDArray[np.int64]
    freed: NDArray[np.int64]
    learned: int
    sampled_out: int


def plan(
    codes: NDArray[np.int64],
    slots: NDArray[np.int64],
    closed: NDArray[Any] | None,
    kinds: NDArray[np.int64],
    target: int,
    given: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]] | None,
    draws: NDArray[np.float64],
    negatives: float,
    early: bool = False,
) -> Plan:
    """Lay out what events with these `codes` ask for.

    `slots`: of the impressions and labeled examples among them, in order. `closed`: what `LabelJoin.steps` gave for
    them; None where there is no join, and impressions are scored and let go. `kinds`: the number of each kind of the
    join; that at place `target` is learned. `given`: label, weight, number of the kind and whether it is learned, of
    each labeled example; None where there is none. `draws`: by slot, a number in [0, 1): of the non-clicks, those under
    `negatives` are learned, with 1/negatives of their weight. `early`: each impression is learned as a non-click
    when it is scored, and as a click when word of one comes, both weighed; labels are judged when they come.
    """
    if given is None and closed is not None and not len(closed) and not early:  # nothing but impressions to score
        count = len(slots)
        ops, zeros = np.full(count, _SCORE), np.zeros(count, dtype=np.float32)
        ones = np.ones(count, dtype=np.float32)
        return Plan(slots, ops, zeros, ones, np.arange(count), *_NONE_JUDGED, 0, 0)
    here = _NOTHING if closed is None else closed
    most = len(here) + len(slots)
    rows, scored, judged_rows, judged_kinds, judged_after, freed = np.empty((6, most), dtype=np.int64)
    labels, weights, judged_labels, judged_weights = np.empty((4, most), dtype=np.float32)
    ops = np.empty(most, dtype=np.int8)
    lay_out: Any = _lay_out  # mypy cannot follow so many unpacked arguments
    done, judged, free, learned, sampled_out = lay_out(
        *(codes, slots, here, closed is None),
        *(kinds, target, *(given or _NONE_GIVEN), draws, np.float32(negatives), early),
        *(rows, ops, labels, weights, scored, judged_rows, judged_labels, judged_weights, judged_kinds),
        *(judged_after, freed),
    )
    return Plan(
        *(rows[:done], ops[:done], labels[:done], weights[:done], scored[: len(slots)]),
        *(judged_rows[:judged], judged_labels[:judged], judged_weights[:judged], judged_kinds[:judged]),
        judged_after[:judged],
        *(freed[:free], learned, sampled_out),
    )


_NO_FLOATS, _NO_NUMBERS = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
_NONE_GIVEN = _NO_FLOATS, _NO_FLOATS, _NO_NUMBERS, np.empty(0, dtype=np.bool_)
_NONE_JUDGED = _NO_NUMBERS, _NO_FLOATS, _NO_FLOATS, _NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS
_NOTHING = np.empty(0, dtype=CLOSED)


@compiled()
def _lay_out(
    codes: Any,
    slots: Any,
    closed: Any,
    unjoined: bool,
    kinds: Any,
    target: int,
    given_labels: Any,
    given_weights: Any,
    given_kinds: Any,
    given_learned: Any,
    draws: Any,
    negatives: Any,
    early: bool,
    rows: Any,
    ops: Any,
    labels: Any,
    weights: Any,
    scored: Any,
    judged_rows: Any,
    judged_labels: Any,
    judged_weights: Any,
    judged_kinds: Any,
    judged_after: Any,
    freed: Any,
) -> Any:
    done = judged = free = learned = sampled_out = 0
    shown = known = at = 0
    one = np.float32(1.0)
    for n in range(len(codes)):
        refused = False
        # what its time closes came before the event in the stream, and is learned before it is scored
        while at < len(closed) and closed[at].event == n and closed[at].what == LABEL:
            row, kind, label, weight = closed[at].payload, closed[at].kind, closed[at].label, closed[at].weight
            if kind >= 0:
                judged_rows[judged], judged_labels[judged] = row, label
                judged_weights[judged], judged_kinds[judged] = weight, kinds[kind]
                judged_after[judged] = shown
                judged += 1
                if kind == target and not early:
                    learns = True
                    if negatives < one and label == 0:
                        learns = draws[row] < negatives
                        weight = one / negatives
                    if learns:
                        rows[done], ops[done], labels[done], weights[done] = row, _LEARN, label, weight
                        done += 1
                        learned += 1
                    else:
                        sampled_out += 1
            elif codes[n] < UNKNOWN and row == slots[shown]:
                refused = True
            if closed[at].last:
                freed[free] = row
                free += 1
            at += 1
        if codes[n] < UNKNOWN:
            row = slots[shown]
            scored[shown] = done
            shown += 1
            rows[done], ops[done], labels[done], weights[done] = row, _SCORE, np.float32(0.0), one
            if codes[n] == PASSED:  # a labeled example
                label, weight, learns = given_labels[known], given_weights[known], given_learned[known]
                labels[done] = label
                if given_kinds[known]:
                    judged_rows[judged], judged_labels[judged] = row, label
                    judged_weights[judged], judged_kinds[judged] = weight, given_kinds[known]
                    judged_after[judged] = shown
                    judged += 1
                known += 1
                if learns and negatives < one and label == 0:
                    learns = draws[row] < negatives
                    weight = weight / negatives
                    if not learns:
                        sampled_out += 1
                weights[done] = weight
                if learns:
                    ops[done] = _BOTH
                    learned += 1
                freed[free] = row
                free += 1
            elif unjoined:
                freed[free] = row
                free += 1
            elif early and not refused:
                if negatives < one and draws[row] >= negatives:
                    sampled_out += 1
                else:
                    ops[done] = _BOTH | _WEIGH
                    weights[done] = one / negatives
                    learned += 1
            done += 1
        # what it makes known itself: it may be an impression whose click was here before it
        while at < len(closed) and closed[at].event == n:
            row, what = closed[at].payload, closed[at].what
            if closed[at].kind == target and (what == CORRECTION or (early and what == AT_ONCE)):
                rows[done], labels[done], weights[done] = row, closed[at].label, closed[at].weight
                ops[done] = _LEARN | _WEIGH if early else _LEARN
                done += 1
                learned += 1
            if closed[at].last:
                freed[free] = row
                free += 1
            at += 1
    return done, judged, free, learned, sampled_out
