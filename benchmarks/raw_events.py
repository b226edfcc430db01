"""One raw event at a time, as a service has it: a dict goes in, a click probability comes out, the label is learned.

    python -m benchmarks.raw_events [--repetitions N]

Everybody is given the same dict of strings and does within the timing whatever it needs: streamrec makes an
`Impression` of it and encodes that, River's models are given the one-hot names they want. Labels without delay; CPU
seconds of one thread; medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import process_time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import Scores, auc, environment, log_loss, one_thread
from benchmarks.peers import SINGLE, RiverFM, RiverLR
from benchmarks.streams import SCHEMA, movielens
from streamrec.preprocessors import Encoder

Raw = Mapping[str, Any]
Events = Sequence[tuple[Raw, float]]  # what was known when it was shown, and the label
Step = Callable[[Raw, float], float]  # the score before learning


class Way(NamedTuple):
    """`start` gives a step that knows nothing yet; `timed` is how many events a timed run takes."""

    start: Callable[[], Step]
    timed: int


def raw(examples: Sequence[sr.Labeled]) -> Events:
    """`{"user": "259", "item": "255", "age": "4", ..., "genres": ["Comedy", "Romance"]}` each."""
    kept = (*SINGLE, "genres")
    events = []
    for shown, label in ((example.impression, example.label) for example in examples):
        known = {"time": shown.time, "user": shown.user, "item": shown.item}
        events.append(({**known, **{name: shown.features[name] for name in kept}}, label))
    return events


def our_one() -> Step:
    """`Encoder.one`, then `FM.one`: score and learn in one call."""
    model = sr.FM(SCHEMA, dim=16, seed=0)
    encoder = Encoder(SCHEMA)

    def step(event: Raw, label: float) -> float:
        shown = sr.Impression("", event["time"], event["user"], event["item"], event)
        return model.one(encoder.one(shown).batch, label)

    return step


def our_two() -> Step:
    """A call that scores and one that learns: what has no label yet is scored like this."""
    model = sr.FM(SCHEMA, dim=16, seed=0)
    encoder = Encoder(SCHEMA)

    def step(event: Raw, label: float) -> float:
        batch = encoder.one(sr.Impression("", event["time"], event["user"], event["item"], event)).batch
        score = model.one(batch)
        model.one(batch, label)
        return score

    return step


def our_push() -> Step:
    """`OnlineTrainer.push` of one `Labeled`: validated, encoded, scored and learned, without metrics or a store."""
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=16, seed=0))

    def step(event: Raw, label: float) -> float:
        shown = sr.Impression("i", event["time"], event["user"], event["item"], event)
        return trainer.push([sr.Labeled(shown, label)])[0]

    return step


def one_hot(event: Raw) -> dict[str, float]:
    """`{"user_259": 1.0, ..., "genres_Comedy": 0.5, "genres_Romance": 0.5}`: what River's linear models take."""
    row = {f"{name}_{event[name]}": 1.0 for name in ("user", "item", *SINGLE)}
    genres = event["genres"]
    for genre in genres:
        row[f"genres_{genre}"] = 1.0 / len(genres)
    return row


def rivers(make: Callable[[], Any]) -> Callable[[], Step]:
    def start() -> Step:
        model = make()

        def step(event: Raw, label: float) -> float:
            row = one_hot(event)
            score: float = model.predict_proba_one(row)[True]
            model.learn_one(row, label > 0)
            return score

        return step

    return start


LR, FM = "River LR, FTRL", "River FM, AdaGrad"


def ways() -> dict[str, Way]:
    """By name; the slow ones are timed over fewer events."""
    return {
        "streamrec FM.one, scored and learned": Way(our_one, 20_000),
        "streamrec FM.one, scored, then learned": Way(our_two, 20_000),
        "streamrec OnlineTrainer.push": Way(our_push, 20_000),
        LR: Way(rivers(RiverLR().model), 10_000),
        FM: Way(rivers(RiverFM().model), 2_000),
    }


def run(way: Way, events: Events) -> tuple[float, Scores]:
    """CPU seconds, and float32 `(events,)`."""
    step = way.start()
    scores = []
    start = process_time()
    for event, label in events:
        scores.append(step(event, label))
    return process_time() - start, np.array(scores, dtype=np.float32)


def main(repetitions: int = 5, quality: int = 100_000) -> None:
    """Print a table. `quality`: events each is given once more, untimed, for its AUC; River's FM takes a minute for
    all."""
    dataset = movielens.load()
    events = raw(dataset.labeled)
    labels: NDArray[np.float32] = np.array([label for _, label in events[:quality]], dtype=np.float32)
    found = ways()
    speeds: dict[str, list[float]] = {name: [] for name in found}
    with one_thread():
        for way in found.values():
            run(way, events[:1000])  # compiled
        for repetition in range(repetitions):
            for name in found if repetition % 2 == 0 else reversed(found):
                way = found[name]
                seconds, scores = run(way, events[: way.timed])
                speeds[name].append(len(scores) / seconds)
        judged = {name: run(way, events[: len(labels)])[1] for name, way in found.items()}
    medians = {name: statistics.median(taken) for name, taken in speeds.items()}
    print(f"One raw dict at a time, {dataset.name}, score and learn, labels without delay, events per CPU second:\n")
    print(f"| | events/s | min to max | timed | AUC of {len(labels):,} | log loss | times River LR | times River FM |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, speed in medians.items():
        spread = f"{min(speeds[name]):,.0f} to {max(speeds[name]):,.0f}"
        print(
            f"| {name} | {speed:,.0f} | {spread} | {found[name].timed:,} "
            f"| {auc(labels, judged[name]):.4f} | {log_loss(labels, judged[name]):.4f} "
            f"| {speed / medians[LR]:.2f} | {speed / medians[FM]:,.1f} |"
        )
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quality", type=int, default=100_000, help="events for the AUC")
    options = parser.parse_args()
    print(f"{environment()}\n")
    main(options.repetitions, options.quality)
