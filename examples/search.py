"""Learning rates chosen on a Dask cluster, most of them by a third of the archive, and the stream that goes on.

    python examples/search.py

The cluster here is two processes on this machine; `docs/dask.md` says how to get a larger one.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator

import numpy as np
from distributed import Client, LocalCluster

import streamrec as sr
from streamrec.adapters import dask
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part

schema = sr.Schema(sr.Id("user"), sr.Id("item"))


def shown(start: int, count: int) -> Iterator[sr.Labeled]:
    """Users click on items of their own parity; a second apart."""
    rng = random.Random(start)
    for n in range(start, start + count):
        user, item = rng.randrange(60), rng.randrange(60)
        clicked = rng.random() < (0.6 if (user + item) % 2 else 0.1)
        yield sr.Labeled(sr.Impression(f"i{n}", 1.7e9 + n, f"u{user}", f"p{item}"), float(clicked))


def archive(uri: str) -> sr.EncodedRows:
    """20,000 rows in four files. `dask.prepare` makes such a data set of your log: see archive.py."""
    files = []
    for n in range(4):
        examples = [*shown(5_000 * n, 5_000)]
        labels = np.array([one.label for one in examples], dtype=np.float32)
        rows = LabeledRows(encode(schema, [one.impression for one in examples]).batch, labels, np.ones_like(labels))
        files.append(write_part(uri, f"part-{n}", [rows]))
    commit_rows(uri, schema, files)
    return sr.EncodedRows(uri)


def main(folder: str) -> None:
    rows = archive(folder)
    space = {
        "dim": dask.Choice((4,)),
        "optimizer.lr": dask.Real(0.001, 1.0, log=True),
        "linear_optimizer.lr": dask.Real(0.01, 1.0, log=True),
    }
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        found = dask.search(
            client, space, rows, store=f"{folder}/store", halving=dask.Halving(trials=12, rounds=2), metrics=[sr.AUC()]
        )
    print(found)

    store = sr.Store(f"{folder}/store")
    best = store.versions.latest()
    assert best is not None
    trainer = sr.OnlineTrainer(model=sr.FM.from_config(best.info["model"]["config"]), metrics=[sr.AUC()], store=store)
    report = trainer.run(sr.Memory(shown(20_000, 5_000)))
    print(f"\nin the stream that follows: AUC {report.metrics['AUC']:.4f}")


if __name__ == "__main__":  # workers are processes that import this file
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
