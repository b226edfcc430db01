"""How the benchmarks measure: repeated runs, interleaved, medians; exact AUC and log loss; ratios within one run.

A peer is any object with the three members of `Peer`. Absolute figures move with the machine and with what else it
does; ratios of medians from one run move far less, so those are what we state.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamrec.events import Labeled

clock = perf_counter  # wall time; `time.process_time` where others load the machine: all run on one thread, without I/O

Seconds = float
Scores = NDArray[np.float32]


class Peer(Protocol):
    """Something that predicts clicks and learns from them.

    `timed_events`: how many events a timed run takes; None: all of them, and their scores give the quality too.
    A slow peer bounds it, and is then given one whole untimed pass for its quality.
    """

    name: str
    timed_events: int | None

    def prepare(self, labeled: Sequence[Labeled]) -> Any:
        """The events in the peer's own form. Not timed."""
        ...

    def run(self, data: Any, limit: int | None = None) -> tuple[Seconds, Scores]:
        """Start anew; predict, then learn, the first `limit` events in order, on one thread.

        Returns the seconds that took and float32 `(events,)`, the click probabilities before learning.
        """
        ...


@dataclass(frozen=True)
class Result:
    """One peer: its events per second in each repetition, and its quality over the whole stream."""

    name: str
    speeds: tuple[float, ...]
    auc: float
    log_loss: float

    @property
    def speed(self) -> float:
        """Median events per second."""
        return statistics.median(self.speeds)


def compare(
    peers: Sequence[Peer],
    labeled: Sequence[Labeled],
    *,
    repetitions: int = 5,
    warm_up: int = 1_000,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> list[Result]:
    """Run every peer `repetitions` times, in turn, after a short run each that compiles what there is to compile."""
    names = [peer.name for peer in peers]
    if len(set(names)) < len(names):
        raise ValueError(f"each peer needs a name of its own, got {names!r}")
    labels = np.fromiter((example.label for example in labeled), dtype=np.float32, count=len(labeled))
    data: dict[str, Any] = {}
    scores: dict[str, Scores] = {}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for peer in peers:
        say(f"prepare {peer.name}")
        data[peer.name] = peer.prepare(labeled)
        peer.run(data[peer.name], warm_up)
        if peer.timed_events is not None:
            _, scores[peer.name] = peer.run(data[peer.name])
    for repetition in range(repetitions):
        # every other time in reverse: nobody always runs after the same neighbour
        for peer in peers if repetition % 2 == 0 else reversed(peers):
            seconds, timed = peer.run(data[peer.name], peer.timed_events)
            scores.setdefault(peer.name, timed)
            speeds[peer.name].append(len(timed) / seconds)
            say(f"{repetition + 1}/{repetitions} {peer.name}: {len(timed) / seconds:,.0f} events/s")
    return [
        Result(name, tuple(speeds[name]), auc(labels, scores[name]), log_loss(labels, scores[name])) for name in names
    ]


def table(results: Sequence[Result], *, against: Sequence[str] = ()) -> str:
    """The results as a Markdown table, with one column of speed ratios for each peer named in `against`."""
    by_name: Mapping[str, Result] = {result.name: result for result in results}
    head = ["", "events/s", "min to max", "AUC", "log loss", *(f"times {name}" for name in against)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for result in results:
        ratios = [_ratio(result.speed / by_name[name].speed) for name in against]
        spread = f"{min(result.speeds):,.0f} to {max(result.speeds):,.0f}"
        lines.append(
            [result.name, f"{result.speed:,.0f}", spread, f"{result.auc:.4f}", f"{result.log_loss:.4f}", *ratios]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def environment() -> str:
    """The machine and the versions, in one line."""
    told = []
    for name in ("numpy", "numba", "torch", "river"):
        with suppress(PackageNotFoundError):  # not every benchmark has River as a peer
            told.append(f"{name} {version(name)}")
    packages = ", ".join(told)
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {packages}; "
        "one thread"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, inside; as before, after."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def auc(labels: NDArray[np.float32], scores: Scores) -> float:
    """Exact area under the ROC curve, ties counted half (Mann and Whitney 1947)."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, from 1: the mean rank of its ties
    clicked = labels > 0
    positives = int(clicked.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[place][clicked].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(labels: NDArray[np.float32], scores: Scores) -> float:
    """Mean negative log-likelihood in nats, with the scores kept 1e-7 away from 0 and 1."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    y = labels.astype(np.float64)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))
