"""Where the time of an event goes, from a line on disk to learned: `python -m benchmarks.stages`.

Each stage is timed where the trainer calls it, in one run over the whole log; what is left is the trainer's own loop.
It is CPU time of the loop's own thread, so that other work on the machine does not count. Checkpoints are written in
another thread: what stands here is the cut.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import streamrec as sr
from benchmarks._measure import environment, one_thread
from benchmarks.streams import SCHEMA, movielens

STAGES = {
    "read and decode": lambda trainer, source: (source, "read"),
    "validate": lambda trainer, source: (trainer._validate, "push"),
    "dedup": lambda trainer, source: (trainer.preprocessors[0], "push"),
    "encode": lambda trainer, source: (trainer, "_encoder"),
    "hold the rows": lambda trainer, source: (trainer._rows, "add"),
    "join and plan": lambda trainer, source: (trainer, "_plan"),
    "score and learn": lambda trainer, source: (trainer, "_step"),
    "metrics": lambda trainer, source: (trainer.validation, "update"),
    "checkpoint and publish": lambda trainer, source: (trainer, "_cut"),
}
"""By stage: the object and the method that does it. "join and plan" also lays out what the model does."""


def timed(call: Callable[..., Any], seconds: dict[str, float], stage: str) -> Callable[..., Any]:
    """The same call, its seconds added up."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        start = time.thread_time()
        result = call(*arguments, **named)
        seconds[stage] += time.thread_time() - start
        return result

    return wrapped


def once(log: str) -> tuple[dict[str, float], float, int]:
    """Seconds by stage, of the whole, and events."""
    seconds = dict.fromkeys(STAGES, 0.0)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        trainer = sr.OnlineTrainer(
            model=sr.FM(SCHEMA, dim=16, seed=0),
            preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)],
            join=sr.LabelJoin(windows={"click": 600.0}),
            metrics=[sr.AUC(), sr.LogLoss(), sr.NormalizedEntropy(), sr.Calibration(), sr.CTR()],
            store=folder,
        )
        source = sr.JsonLines(log)
        for stage, place in STAGES.items():
            owner, name = place(trainer, source)
            setattr(owner, name, timed(getattr(owner, name), seconds, stage))
        start = time.thread_time()
        report = trainer.run(source)
        return seconds, time.thread_time() - start, report.counts["events"]


def main(repetitions: int = 5) -> None:
    """Print a table of medians."""
    dataset = movielens.load()
    log = str(movielens.event_log(dataset))
    once(log)
    runs = [once(log) for _ in range(repetitions)]
    events = runs[0][2]

    def microseconds(values: list[float]) -> float:
        return statistics.median(values) / events * 1e6

    whole = microseconds([total for _, total, _ in runs])
    stages = {stage: microseconds([seconds[stage] for seconds, _, _ in runs]) for stage in STAGES}
    stages["the rest of the loop"] = whole - sum(stages.values())
    print(f"{environment()}\n\n{dataset.name}, {events:,} events, 256 a push:\n")
    print("| stage | us/event | share |\n|---|---:|---:|")
    for stage, value in stages.items():
        print(f"| {stage} | {value:.2f} | {value / whole:.0%} |")
    print(f"| all | {whole:.2f} | {1e6 / whole:,.0f} events/s |")


if __name__ == "__main__":
    main()
