"""A Criteo-like stream, predict then learn: streamrec's FM beside PyTorch's and River's.

    python -m benchmarks.criteo_like [--repetitions N]

39 Zipf fields, 10^6 ids, labels without delay. Every peer gets the same rows in the same order; the slow ones get the
first part only, and quality is stated over as many events as each was given. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import auc, environment, log_loss, one_thread
from benchmarks.peers import RiverFM, TorchFM, _Tensors
from benchmarks.streams import Stream, zipf
from streamrec.protocols import LEARN, SCORE

Run = Callable[[], tuple[float, NDArray[np.float32]]]
DIM = 16


def ours(stream: Stream, rule: sr.Adagrad, linear: sr.FTRL | None = None, size: int = 256) -> Run:
    def run() -> tuple[float, NDArray[np.float32]]:
        model = sr.FM(stream.schema, dim=DIM, optimizer=rule, linear_optimizer=linear or sr.FTRL(lr=0.2))
        labels, calls = stream.labels, []
        for begin in range(0, len(labels), size):
            part = labels[begin : begin + size]
            rows = np.arange(begin, begin + len(part), dtype=np.int64)
            calls.append((rows, np.full(len(part), SCORE | LEARN, dtype=np.int8), part, np.ones_like(part)))
        start = process_time()
        found = [model.step(stream.batch, *call) for call in calls]
        return process_time() - start, np.concatenate(found)

    return run


def torch_fm(stream: Stream, events: int, size: int, lr: float) -> Run:
    width = stream.batch.ends[0]
    rows = np.unique(stream.batch.ids, return_inverse=True)[1].reshape(-1, width)
    labels = torch.from_numpy(stream.labels[:events])
    data = _Tensors(torch.from_numpy(rows[:events]), torch.ones(events, width), labels, int(rows.max()) + 1)
    peer = TorchFM(batch_size=size, lr=lr)

    def run() -> tuple[float, NDArray[np.float32]]:
        start = process_time()  # the embeddings are drawn before the peer's own clock starts: taken off again
        torch.nn.init.normal_(torch.empty(data.rows, 1 + DIM))
        drawn = process_time() - start
        start = process_time()
        scores = peer.run(data)[1]
        return process_time() - start - drawn, scores

    return run


def river_fm(stream: Stream, events: int) -> Run:
    ids = stream.batch.ids.reshape(len(stream.labels), -1)[:events]
    data: Any = [
        ({str(key): 1.0 for key in row}, bool(label)) for row, label in zip(ids, stream.labels[:events], strict=True)
    ]

    def run() -> tuple[float, NDArray[np.float32]]:
        start = process_time()
        scores = RiverFM(lr=0.05, latent_lr=0.05).run(data)[1]
        return process_time() - start, scores

    return run


def bandwidth(repetitions: int = 5) -> float:
    """Bytes per second that a large copy reads and writes, both counted."""
    source = np.ones(1 << 26, dtype=np.float32)
    target = np.empty_like(source)
    seconds = []
    for _ in range(repetitions):
        start = process_time()
        np.copyto(target, source)
        seconds.append(process_time() - start)
    return 2 * source.nbytes / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    repetitions = parser.parse_args().repetitions
    stream = zipf()
    row_wise = sr.Adagrad(lr=0.05, row_wise=True)
    runs: dict[str, Run] = {
        "streamrec FM, default": ours(stream, sr.Adagrad(lr=0.05)),
        "streamrec FM, row-wise Adagrad": ours(stream, row_wise),
        "streamrec FM, Adagrad(0.02) + FTRL(0.05)": ours(stream, sr.Adagrad(lr=0.02), sr.FTRL(lr=0.05)),
        "PyTorch FM, sparse Adagrad, batch 256": torch_fm(stream, 50_000, 256, 0.02),
        "PyTorch FM, sparse Adagrad, batch 1024": torch_fm(stream, 50_000, 1024, 0.02),
        "River FM": river_fm(stream, 300),
    }
    floats = {"streamrec FM, row-wise Adagrad": DIM + 1 + 1 + 2}  # a row's weights and what its optimizers remember
    copied = bandwidth()
    found: dict[str, list[tuple[float, NDArray[np.float32]]]] = {name: [] for name in runs}
    with one_thread():
        ours(zipf(2_000), sr.Adagrad(lr=0.05))(), ours(zipf(2_000), row_wise)()  # compiled
        for repetition in range(repetitions):
            for name in runs if repetition % 2 == 0 else reversed(runs):
                found[name].append(runs[name]())
    speeds = {name: statistics.median(len(p) / s for s, p in got) for name, got in found.items()}
    best_torch = max(speed for name, speed in speeds.items() if name.startswith("PyTorch"))
    print(f"{environment()}; a copy moves {copied / 2**30:.1f} GiB/s\n")
    print("| | events/s | events | AUC | log loss | times PyTorch | times River | of the copy's bandwidth |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, speed in speeds.items():
        scores = found[name][0][1]
        labels = stream.labels[: len(scores)]
        moved = 39 * 4 * 2 * floats.get(name, 2 * DIM + 3) * speed / copied
        share = f"{moved:.0%}" if name.startswith("streamrec") else ""
        print(
            f"| {name} | {speed:,.0f} | {len(scores):,} | {auc(labels, scores):.4f} | {log_loss(labels, scores):.4f} "
            f"| {speed / best_torch:.2f} | {speed / speeds['River FM']:,.0f} | {share} |"
        )


if __name__ == "__main__":
    main()
