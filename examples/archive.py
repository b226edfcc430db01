"""An archive prepared on a Dask cluster, a model learned from it, and the stream that goes on with it.

    python examples/archive.py

The cluster here is two processes on this machine. Yours is one line: `Client("tcp://scheduler:8786")`; `docs/dask.md`
says how to get one on Kubernetes, YARN or over SSH. Then the folder must be one that all machines see, such as `s3://`.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distributed import Client, LocalCluster

import streamrec as sr
from streamrec.adapters import dask
from streamrec.events import Event, encode_event

schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("tags"), sr.Number("price", log=True))


def events(start: int, count: int) -> Iterator[Event]:
    """Fans of an artist click on her prints, most of all cheap ones."""
    for n in range(start, start + count):
        rng = random.Random(n)
        user, artist, price = rng.randrange(200), rng.choice(["kahlo", "klee"]), rng.uniform(5, 500)
        fan = (user % 2 == 0) == (artist == "kahlo")
        features = {"tags": [artist, "print"], "price": price}
        yield sr.Impression(f"i{n}", 60.0 * n, f"u{user}", f"{artist}-{n % 50}", features)
        if rng.random() < (0.6 if fan else 0.1) * (1.0 if price < 100 else 0.5):
            yield sr.Feedback(f"c{n}", f"i{n}", 60.0 * n + 20.0)


def stages() -> tuple[list[sr.Dedup], sr.LabelJoin]:
    """The same in front of the archive and of the stream."""
    return [sr.Dedup(ttl=3600.0, capacity=1_000_000)], sr.LabelJoin(windows={"click": 1800.0}, lateness=60.0)


def main(folder: str) -> None:
    for day in range(10):
        lines = [encode_event(event) + b"\n" for event in events(2_000 * day, 2_000)]
        Path(folder, f"day-{day}.jsonl").write_bytes(b"".join(lines))

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        preprocessors, join = stages()
        archive = f"{folder}/day-*.jsonl"
        rows = dask.prepare(client, archive, folder, schema=schema, preprocessors=preprocessors, join=join)
        print(f"{rows.counts['events']:,} events made {len(rows):,} rows in {len(rows.parts)} files")

        batch = sr.BatchTrainer(model=sr.FM(schema, dim=8), epochs=5, validation=0.1, store=f"{folder}/store")
        print(dask.fit(client, batch, rows), "\n")  # a copy on each worker, merged as they go

        judged = dask.evaluate(client, f"{folder}/store", rows, metrics=[sr.AUC(), sr.NormalizedEntropy()])
        print(f"over all rows, by the workers: AUC {judged.metrics['AUC']:.4f}")
        prints = [
            sr.Candidate(f"{artist}-{n}", {"tags": [artist, "print"], "price": 40.0})
            for artist in ("kahlo", "klee")
            for n in range(50)
        ]
        files = dask.score(client, f"{folder}/store", [f"u{n}" for n in range(200)], folder, catalogue=prints, k=5)
        print(f"the best five prints of 200 users are in {len(files)} file")

    preprocessors, join = stages()
    trainer = sr.OnlineTrainer(
        model=sr.FM(schema, dim=8), preprocessors=preprocessors, join=join, metrics=[sr.AUC()], store=f"{folder}/store"
    )
    report = trainer.run(sr.Memory(events(20_000, 5_000)))  # goes on from what the batch trainer has left in the store
    print(f"in the stream, from the first event on: AUC {report.metrics['AUC']:.4f}")


if __name__ == "__main__":  # workers are processes that import this file
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
