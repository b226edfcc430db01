"""A Criteo-like stream, predict then learn: streamrec's FM beside PyTorch's, fbgemm's, TorchRec's, VW and River's.

    python -m benchmarks.criteo_like [--repetitions N] [--uneven] [--vw-python PATH] [--torchrec-python PATH]

39 Zipf fields, 10^6 ids, labels without delay. Every peer gets the same rows in the same order; the slow ones get the
first part only, and quality is stated over as many events as each was given, beside that of our tuned model over the
same events. Times are CPU seconds, of one thread but for VW, which has one more to parse with. Ours starts from an
empty table and pays for its growth; the tables of PyTorch, fbgemm and TorchRec are made beforehand at their full size.

`--vw-python`, `--torchrec-python`: interpreters that have `vowpalwabbit`, and `torchrec` with `fbgemm-gpu-cpu`. Where
neither is given nor here, the row is left out. `--uneven`: fields of 4 to 250,000 ids each; see `streams.zipf`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import streamrec as sr
from benchmarks import _elsewhere
from benchmarks._measure import Scores, auc, environment, log_loss, one_thread
from benchmarks.peers import FusedFM, RiverFM, TorchFM, VowpalWabbit, _Tensors
from benchmarks.streams import Stream, zipf
from streamrec.models.optimizers import Optimizer
from streamrec.protocols import LEARN, SCORE

Run = Callable[[], tuple[float, Scores]]
DIM = 16


class Settings(NamedTuple):
    """Of an FM."""

    optimizer: Optimizer
    linear_optimizer: Optimizer
    init: float = 0.03

    @property
    def floats(self) -> int:
        """What an id's row holds: its weights, and what the optimizers remember of them."""
        rule, linear = self.optimizer, self.linear_optimizer
        return DIM + 1 + rule.slots * DIM + rule.row_slots + linear.slots + linear.row_slots


DEFAULT = "streamrec FM, default"
TUNED = "streamrec FM, tuned, FTRL"
OURS = {
    DEFAULT: Settings(sr.Adagrad(lr=0.05, eps=0.1), sr.FTRL(lr=0.2)),
    "streamrec FM, row-wise Adagrad": Settings(sr.Adagrad(lr=0.05, row_wise=True), sr.FTRL(lr=0.2)),
    TUNED: Settings(sr.FTRL(lr=0.1, beta=0.1, l2=60.0), sr.FTRL(lr=0.05, l2=10.0), init=0.007),
    "streamrec FM, tuned, row-wise Adagrad": Settings(
        sr.Adagrad(lr=0.05, eps=1.0, row_wise=True), sr.FTRL(lr=0.05, l2=10.0), init=0.01
    ),
}
"""The tuned ones are the best of some 120 settings on this very stream, as the peers' are.

What mattered, in this order. Factors that start slowly: an Adagrad without `eps` moves each by a whole `lr` at its
first gradient, however small that is, and most ids are seen few times; FTRL's `beta` and `l2`, or `eps=1`, give 0.02 of
AUC over the best Adagrad without. Small first vectors: 741 pairs of random ones are noise in every logit, so `init`
0.007 for 0.03 is worth 0.01. Then the rates, within 0.01.
"""


def ours(stream: Stream, settings: Settings, size: int = 256) -> Run:
    def run() -> tuple[float, Scores]:
        model = sr.FM(
            stream.schema,
            dim=DIM,
            optimizer=settings.optimizer,
            linear_optimizer=settings.linear_optimizer,
            init=settings.init,
        )
        labels, calls = stream.labels, []
        for begin in range(0, len(labels), size):
            part = labels[begin : begin + size]
            rows = np.arange(begin, begin + len(part), dtype=np.int64)
            calls.append((rows, np.full(len(part), SCORE | LEARN, dtype=np.int8), part, np.ones_like(part)))
        start = process_time()
        found = [model.step(stream.batch, *call) for call in calls]
        return process_time() - start, np.concatenate(found)

    return run


def torch_fm(rows: NDArray[np.int64], labels: NDArray[np.float32], size: int, lr: float) -> Run:
    ones = torch.ones(rows.shape)
    data = _Tensors(torch.from_numpy(rows), ones, torch.from_numpy(labels), int(rows.max()) + 1)
    peer = TorchFM(batch_size=size, lr=lr)

    def run() -> tuple[float, Scores]:
        start = process_time()  # the embeddings are drawn before the peer's own clock starts: taken off again
        torch.nn.init.normal_(torch.empty(data.rows, 1 + DIM))
        drawn = process_time() - start
        start = process_time()
        scores = peer.run(data)[1]
        return process_time() - start - drawn, scores

    return run


def river_fm(rows: NDArray[np.int64], labels: NDArray[np.float32]) -> Run:
    data: Any = [({str(key): 1.0 for key in row}, bool(label)) for row, label in zip(rows, labels, strict=True)]

    def run() -> tuple[float, Scores]:
        start = process_time()
        scores = RiverFM(lr=0.05, latent_lr=0.05).run(data)[1]
        return process_time() - start, scores

    return run


def elsewhere(peer: VowpalWabbit | FusedFM, rows: NDArray[np.int64], labels: NDArray[np.float32], folder: Path) -> Run:
    data = peer.prepare(rows, labels, folder)
    return lambda: peer.run(data)


def peers(stream: Stream, folder: Path, vw: str | None, torchrec: str | None) -> Iterator[tuple[str, Run]]:
    """Each by its name, at the best settings found for it."""
    rows = np.unique(stream.batch.ids, return_inverse=True)[1].reshape(len(stream.labels), -1)
    labels = stream.labels
    few, some, many = slice(300), slice(50_000), slice(100_000)
    for size in (256, 1024):
        yield f"PyTorch FM, sparse Adagrad, batch {size}", torch_fm(rows[some], labels[some], size, 0.02)
    if torchrec is not None:
        for name, library in (("fbgemm", "fbgemm"), ("TorchRec", "torchrec")):
            for size in (256, 1024):
                fused = FusedFM(python=torchrec, library=library, batch_size=size)
                yield f"{name} FM, fused Adagrad, batch {size}", elsewhere(fused, rows[some], labels[some], folder)
    if vw is not None:
        linear, pairs = VowpalWabbit(python=vw), VowpalWabbit(python=vw, options=VowpalWabbit.PAIRS)
        yield "VW, linear, FTRL, text file", elsewhere(linear, rows[many], labels[many], folder)
        yield "VW, a weight a pair (-q), FTRL, text file", elsewhere(pairs, rows[:20_000], labels[:20_000], folder)
    yield "River FM", river_fm(rows[few], labels[few])


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


def speed_and_quality(stream: Stream, repetitions: int, vw_python: str | None, torchrec_python: str | None) -> None:
    """Print the table of all peers."""
    vw = _elsewhere.interpreter(vw_python, "vowpalwabbit")
    torchrec = _elsewhere.interpreter(torchrec_python, "torchrec")
    copied = bandwidth()
    with tempfile.TemporaryDirectory() as folder, one_thread():
        runs = {name: ours(stream, settings) for name, settings in OURS.items()}
        runs[f"{DEFAULT}, 1,024 a call"] = ours(stream, OURS[DEFAULT], 1024)
        runs |= dict(peers(stream, Path(folder), vw, torchrec))
        found: dict[str, list[tuple[float, Scores]]] = {name: [] for name in runs}
        for settings in OURS.values():
            ours(zipf(2_000), settings)()  # compiled
        for repetition in range(repetitions):
            for name in runs if repetition % 2 == 0 else reversed(runs):
                found[name].append(runs[name]())
    speeds = {name: statistics.median(len(p) / s for s, p in got) for name, got in found.items()}
    best = found[TUNED][0][1]
    against = [
        name for name in speeds if name.startswith(("PyTorch FM, sparse Adagrad, batch 256", "TorchRec", "VW, l"))
    ]
    against = [*dict.fromkeys(name for name in against if "1024" not in name), "River FM"]
    print(f"A copy moves {copied / 2**30:.1f} GiB/s. {stream.name}, {len(stream.labels):,} rows:\n")
    head = ["", "events/s", "events", "AUC", "log loss", "ours, tuned, on the same", "of the copy's bandwidth"]
    head += [f"times {name.split(',')[0]}{name[name.find(', batch') :] if 'batch' in name else ''}" for name in against]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for name, speed in speeds.items():
        scores = found[name][0][1]
        n = len(scores)
        labels = stream.labels[:n]
        known = OURS.get(name.removesuffix(", 1,024 a call"))
        share = "" if known is None else f"{39 * 4 * 2 * known.floats * speed / copied:.0%}"
        cells = [name, f"{speed:,.0f}", f"{n:,}", f"{auc(labels, scores):.4f}", f"{log_loss(labels, scores):.4f}"]
        cells += [f"{auc(labels, best[:n]):.4f} / {log_loss(labels, best[:n]):.4f}", share]
        cells += [f"{speed / speeds[other]:,.2f}" for other in against]
        print(f"| {' | '.join(cells)} |")
    absent = [(vw, "VW", "--vw-python"), (torchrec, "fbgemm and TorchRec", "--torchrec-python")]
    for python, names, option in absent:
        if python is None:
            print(f"\n{names}: not here; {option} PATH")
    print()


def quality() -> None:
    """Print what our settings reach on the stream with even fields and on the one with uneven ones."""
    print("| | | AUC | log loss | AUC of the last fifth | log loss of the last fifth |\n|---|---|---:|---:|---:|---:|")
    for stream in (zipf(), zipf(even=False)):
        last = slice(len(stream.labels) * 4 // 5, None)
        for name, settings in OURS.items():
            scores, labels = ours(stream, settings)()[1], stream.labels
            cells = [stream.name, name, *(f"{f(labels, scores):.4f}" for f in (auc, log_loss))]
            cells += [f"{f(labels[last], scores[last]):.4f}" for f in (auc, log_loss)]
            print(f"| {' | '.join(cells)} |")
    print()


def main(
    repetitions: int = 3, *, uneven: bool = False, vw_python: str | None = None, torchrec_python: str | None = None
) -> None:
    speed_and_quality(zipf(even=not uneven), repetitions, vw_python, torchrec_python)
    quality()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--uneven", action="store_true", help="fields of unequal numbers of ids")
    parser.add_argument("--vw-python", help="an interpreter that has vowpalwabbit")
    parser.add_argument("--torchrec-python", help="an interpreter that has torchrec and fbgemm-gpu-cpu")
    options = parser.parse_args()
    print(f"{environment()}\n")
    main(
        options.repetitions,
        uneven=options.uneven,
        vw_python=options.vw_python,
        torchrec_python=options.torchrec_python,
    )
