"""When learning a non-click before its click has come pays: `python -m benchmarks.delays`.

A stream whose truth is known: items with click rates that drift or do not, and clicks that come after an exponential
delay, cut at the attribution window. Five ways to learn from it, judged by the same thing: the log loss of the score
that was served against the true probability, over that of the best score there is (0 is perfect), and predicted clicks
over true ones.

- *no delay*: labels at once, which nobody can have; the floor.
- *wait*: `LabelJoin`, a label when its window closes.
- *wait, short*: a window of the median delay; what comes later is lost.
- *short, corrected*: the same with `late="correct"`: late clicks are learned as well, their non-clicks stay learned.
- *early negatives*: `OnlineTrainer(early_negatives=True)`.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

import streamrec as sr
from benchmarks._measure import one_thread

WINDOW = 7200.0  # seconds in which a click counts
EVERY = 1.0  # seconds from one impression to the next
ITEMS = 200
SCHEMA = sr.Schema(sr.Id("item"), sr.Id("segment"))


def truth(count: int, drift: float, seed: int = 0) -> tuple[Any, Any, Any]:
    """Items, segments and click probabilities of so many impressions; an item's rate is another one every `drift`
    seconds, smoothly; 0: it stays."""
    rng = np.random.default_rng(seed)
    items, segments = rng.integers(0, ITEMS, count), rng.integers(0, 5, count)
    level, phase = rng.normal(-2.5, 0.7, ITEMS), rng.uniform(0, 2 * math.pi, ITEMS)
    logits = level[items] + np.linspace(-0.5, 0.5, 5)[segments]
    if drift:
        logits = logits + np.sin(2 * math.pi * EVERY * np.arange(count) / drift + phase[items])
    return items, segments, 1 / (1 + np.exp(-logits))


def stream(count: int, delay: float, drift: float) -> tuple[list[Any], Any]:
    """Impressions and clicks in order, and the probabilities of the impressions' clicks within the window."""
    items, segments, p = truth(count, drift)
    rng = np.random.default_rng(1)
    waits = rng.exponential(delay, count)
    clicked = (rng.random(count) < p) & (waits <= WINDOW)
    within = p * -math.expm1(-WINDOW / delay)
    events: list[tuple[float, int, Any]] = []
    for n in range(count):
        shown = sr.Impression(f"i{n}", EVERY * n, "u", f"p{items[n]}", {"segment": int(segments[n])})
        events.append((EVERY * n, n, shown))
        if clicked[n]:
            at = EVERY * n + float(waits[n])
            events.append((at, n, sr.Feedback(f"f{n}", f"i{n}", at)))
    return [event for _, _, event in sorted(events, key=lambda one: one[:2])], within


def scores_of(way: str, events: list[Any], delay: float) -> Any:
    """The score that each impression was served with."""
    settings: dict[str, Any] = {"model": sr.FM(SCHEMA, dim=0, linear_optimizer=sr.Adagrad(lr=0.1))}
    if way == "no delay":
        clicked = {event.impression_id for event in events if isinstance(event, sr.Feedback)}
        events = [sr.Labeled(e, float(e.id in clicked)) for e in events if isinstance(e, sr.Impression)]
    else:
        short = delay * math.log(2)  # the median
        settings["early_negatives"] = way == "early negatives"
        if way == "wait, short":
            settings["join"] = sr.LabelJoin(windows={"click": short})
        elif way == "short, corrected":
            settings["join"] = sr.LabelJoin(windows={"click": short}, late="correct", keep=WINDOW - short)
        else:
            settings["join"] = sr.LabelJoin(windows={"click": WINDOW})
    trainer = sr.OnlineTrainer(**settings)
    found: list[float] = []
    for begin in range(0, len(events), 256):
        found += trainer.push(events[begin : begin + 256])
    return np.clip(np.array(found), 1e-6, 1 - 1e-6)


WAYS = ("no delay", "wait", "wait, short", "short, corrected", "early negatives")


def excess(scores: Any, p: Any) -> float:
    """Percent by which the expected log loss of these scores is above that of the probabilities themselves."""
    best = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum()
    return float(100 * (-(p * np.log(scores) + (1 - p) * np.log(1 - scores)).sum() / best - 1))


def main(count: int = 60_000) -> None:
    """Print a table: a row for each delay and drift, a column for each way."""
    print(
        f"{count:,} impressions, one a second, {ITEMS} items; a click counts for {WINDOW:.0f} s. Expected log loss over"
    )
    print("that of the true probabilities, in percent (predicted clicks over true ones), in the second half:\n")
    print("| mean delay, s | rates change in, s | " + " | ".join(WAYS) + " |")
    print("|---:|---:|" + "---:|" * len(WAYS))
    with one_thread():
        for delay in (60.0, 600.0, 3600.0):
            for drift in (0.0, 100_000.0, 20_000.0, 5_000.0):
                events, p = stream(count, delay, drift)
                told = []
                for way in WAYS:
                    scores = scores_of(way, events, delay)[count // 2 :]
                    late = p[count // 2 :]
                    told.append(f"{excess(scores, late):.2f} ({scores.sum() / late.sum():.2f})")
                changes = f"{drift:.0f}" if drift else "never"
                print(f"| {delay:.0f} | {changes} | " + " | ".join(told) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
