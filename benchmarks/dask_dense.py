"""A dense model on two Dask workers of one thread beside one process of one thread: what a step and the start cost.

    python -m benchmarks.dask_dense

No speed-up is to be seen on two cores that share their memory: this shows the cost of learning together by gloo, and
that both learn the same.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import streamrec as sr
from benchmarks._measure import clock, one_thread
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part
from streamrec.trainers import Dense

__all__ = ["Net", "main"]

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("genres"))
ROWS, BATCH, BUCKETS = 20_480, 1024, 1 << 15


class Net(nn.Module):
    """Hashed embeddings and three layers: 0.6 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.schema = SCHEMA
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.EmbeddingBag(BUCKETS, 16, mode="sum")
            self.layers = nn.Sequential(
                nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
            )

    def forward(self, batch: sr.Batch) -> torch.Tensor:
        lengths = batch.ends - batch.starts
        where = batch.entries
        ids, offsets = torch.from_numpy(batch.ids[where] % BUCKETS), torch.from_numpy(np.cumsum(lengths) - lengths)
        logits: torch.Tensor = self.layers(self.embed(ids, offsets))[:, 0]
        return logits


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Makes the optimizer."""
    return torch.optim.Adam(parameters, lr=1e-3)


def write_rows(uri: str) -> sr.EncodedRows:
    """Users like items of their own parity."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(3000, size=ROWS), rng.integers(1000, size=ROWS)
    labels = (rng.random(ROWS) < np.where((users + items) % 2, 0.6, 0.1)).astype(np.float32)
    shown = [
        sr.Impression(f"i{n}", 1.7e9 + n, f"u{users[n]}", f"p{items[n]}", {"genres": [f"g{items[n] % 9}"]})
        for n in range(ROWS)
    ]
    rows = LabeledRows(encode(SCHEMA, shown).batch, labels, np.ones_like(labels))
    commit_rows(uri, SCHEMA, [write_part(uri, "part", [rows])])
    return sr.EncodedRows(uri)


def main(repetitions: int = 5, epochs: int = 6) -> None:
    """Print the medians."""
    from distributed import Client, LocalCluster

    from streamrec.adapters.dask._dense import fit_dense

    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory() as name,
        one_thread(),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        rows = write_rows(name)
        places = iter(range(10**6))

        def timed(epochs: int, together: bool) -> tuple[float, sr.BatchTrainer]:
            model = Dense(Net(), optimizer=adam, batch_size=BATCH, accumulate=1 if together else 2)
            trainer = sr.BatchTrainer(model=model, epochs=epochs, store=Path(name, f"{next(places)}"))
            rows.load_state_dict({"row": 0})
            begun = clock()
            if together:
                fit_dense(client, trainer, rows)
            else:
                trainer.run(rows, progress=False)
            return clock() - begun, trainer

        steps = ROWS // BATCH * (epochs - 1)
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        apart = 0.0
        for one in (False, True):
            timed(1, one)  # imports
        for _ in range(repetitions):
            ends = []
            for together in (False, True):
                short, (long, trainer) = timed(1, together)[0], timed(epochs, together)
                step = (long - short) / steps
                found[together].append((step * 1e3, short - ROWS // BATCH * step))
                ends.append(torch.cat([value.reshape(-1) for value in trainer.model.module.state_dict().values()]))  # type: ignore[attr-defined]
            apart = max(apart, float((ends[0] - ends[1]).abs().max()))
        print(f"\nsteps of {BATCH:,} rows, {sum(one.numel() for one in Net().parameters()):,} parameters\n")
        for together, what in ((False, "one process, two parts a step"), (True, "two ranks")):
            step, start = (statistics.median(column) for column in zip(*found[together], strict=True))
            print(f"  {what:<30} {step:6.1f} ms a step, {start:5.2f} s to start and to end")
        print(f"\n  largest difference of a weight after {ROWS // BATCH * epochs} steps: {apart:.1e}\n")


if __name__ == "__main__":
    main()
