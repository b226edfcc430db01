"""Two Dask workers of one thread each beside one process of one thread: the same data, the same rows, start-up apart.

    python -m benchmarks.dask [events] [rows] [what ...]

`events`: of the archive that is prepared; `rows`: of the encoded one of ten fields and 200,000 ids that is fitted,
besides a tenth more that both results are judged by (one of 39 fields, as Criteo's has, holds as many entries; another
has 20,000 ids); `what`: prepare, fit, score, one or more of them. Needs two free cores: beside the ratio of the seconds
by the clock stands that of the CPU seconds of the one process to those of the busier worker, which is what the clock
would show on cores that nobody else uses, if nobody waited for anybody; and what it could show at most on two cores,
which the client and the scheduler use, too: the CPU seconds of the one process by half of those of all three. Last,
what the cores themselves give: how much more two processes do in the same time that each do the whole work of the one
and have nothing to do with each other; two cores that are threads of one, or whose cache is too small for both, give
less than 2. Every worker compiles what it runs before it is measured, as the one process does.
"""

from __future__ import annotations

import copy
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import streamrec as sr
from benchmarks._measure import auc, clock, one_thread
from benchmarks.streams import zipf
from streamrec.adapters.dask._share import Cuts, Share
from streamrec.batch import LabeledRows
from streamrec.events import encode_event
from streamrec.storage.encoded import Part, commit_rows, write_part

__all__ = ["main"]

SCHEMA = sr.Schema(
    *(sr.Id(name) for name in ("user", "item", "country", "device", "page")),
    sr.Ids("genres"),
    sr.Number("price", log=True),
)
START = 1_700_000_000.0
EPOCHS = 3
USERS = 80_000


def parts() -> dict[str, Any]:
    """What stands between the events and the rows."""
    return {
        "preprocessors": [sr.Dedup(ttl=600.0, capacity=1_000_000)],
        "join": sr.LabelJoin(windows={"click": 1800.0}, lateness=60.0),
    }


def write_archive(folder: Path, shown: int, seed: int = 0) -> int:
    """`shown` impressions over ten days, a tenth of them clicked, in ten files; returns how many events."""
    rng = np.random.default_rng(seed)
    step = 10 * 86_400.0 / shown
    users = (20_000 * rng.random(shown) ** 2).astype(int)
    items = (5_000 * rng.random(shown) ** 2).astype(int)
    clicked = rng.random(shown) < 0.02 + 0.16 * ((users + items) % 2)
    waits = rng.uniform(1.0, 900.0, shown)
    lines: list[tuple[float, bytes]] = []
    for n in range(shown):
        user, item = int(users[n]), int(items[n])
        features = {
            "country": f"c{user % 30}",
            "device": f"d{user % 4}",
            "page": f"page{item % 12}",
            "genres": [f"g{item % 7}", f"g{item % 11}"],
            "price": float(item % 90),
        }
        time = START + step * n
        lines.append((time, encode_event(sr.Impression(f"i{n}", time, f"u{user}", f"p{item}", features))))
        if clicked[n]:
            lines.append((time + waits[n], encode_event(sr.Feedback(f"c{n}", f"i{n}", float(time + waits[n])))))
    lines.sort(key=lambda one: one[0])
    for number in range(10):
        some = lines[len(lines) * number // 10 : len(lines) * (number + 1) // 10]
        (folder / f"{number}.jsonl").write_bytes(b"".join(line + b"\n" for _, line in some))
    return len(lines)


def prepared_alone(archive: str, folder: str) -> sr.EncodedRows:
    """What `prepare` does, in one process and one pass. Each process has its own place in the folder."""
    out = f"{folder}/alone-{os.getpid()}"
    rows = sr.JoinedEvents(sr.JsonLines(archive), schema=SCHEMA, **parts())
    held, files, many = [], list[Part](), 0
    while (part := rows.read(4096)) is not None:
        held.append(part)
        many += len(part.labels)
        if many >= 500_000:
            files.append(write_part(out, f"part-{len(files):05d}", held))
            held, many = [], 0
    files.append(write_part(out, f"part-{len(files):05d}", held))
    commit_rows(out, SCHEMA, files, rows.counts)
    return sr.EncodedRows(out)


def scored_alone(model: sr.FM, users: list[str], folder: str, catalogue: list[str]) -> None:
    """What `score` does, in one process: the same code over the same groups of users."""
    from streamrec.adapters.dask._models import Reference
    from streamrec.adapters.dask._score import _best, _Items

    where = Reference(secrets.token_hex(4), "", 0)  # another each time, so that the catalogue is made again, as there
    for number, at in enumerate(range(0, len(users), 1000)):
        _best(where, model, _Items(catalogue), users[at : at + 1000], 100, f"{folder}/alone-{os.getpid()}", number)


def write_rows(out: str, rows: int, fields: int, ids: int) -> tuple[sr.EncodedRows, LabeledRows]:
    """Rows of so many ids, encoded, in files as `prepare` makes them; and a tenth more, to judge by."""
    stream = zipf(rows + rows // 10, fields=fields, ids=ids, even=False)
    schema, batch, labels = stream.schema, stream.batch, stream.labels
    times = START + np.arange(len(labels), dtype=np.float64)
    whole = LabeledRows(replace(batch, times=times), labels, np.ones(len(labels), dtype=np.float32))
    cuts = [*range(0, rows, 500_000), rows]
    files = [write_part(out, f"part-{n:05d}", [whole.take(slice(*cut))]) for n, cut in enumerate(pairwise(cuts))]
    commit_rows(out, schema, files)
    return sr.EncodedRows(out), whole.take(slice(rows, len(labels)))


def fitted_alone(rows: sr.EncodedRows, epochs: int) -> sr.FM:
    """What `fit` does, in one process, which keeps decoded rows for the epochs to come, as the workers do."""
    trainer = sr.BatchTrainer(model=sr.FM(rows.schema, dim=16), epochs=epochs)
    trainer.run(Share(copy.copy(rows), Cuts(len(rows), 1, trainer.window, len(rows)), 0, keep=1 << 30))
    return trainer.model


class Cost(NamedTuple):
    """Seconds by the clock, CPU seconds of this process, and of each worker."""

    clock: float
    here: float
    workers: Sequence[float]


def cost(client: Any, work: Callable[[], object]) -> Cost:
    """What some work costs."""
    before = client.run(time.process_time)
    start, here = clock(), time.process_time()
    work()
    end, used = clock(), time.process_time() - here
    return Cost(end - start, used, [now - before[worker] for worker, now in client.run(time.process_time).items()])


def apart(client: Any, work: Callable[[], object]) -> float:
    """Seconds in which every worker has done all of this work, for itself."""

    def whole() -> None:
        work()

    start = clock()
    client.gather([client.submit(whole, workers=[one], pure=False) for one in client.scheduler_info()["workers"]])
    return clock() - start


def main(shown: int = 500_000, rows: int = 2_000_000, *chosen: str, repetitions: int = 5) -> None:
    """Print the medians and their ratios."""
    import pyarrow
    from distributed import Client, LocalCluster

    from streamrec.adapters import dask

    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # for the workers, Arrow's own threads among them
    pyarrow.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_archive(folder, shown)
        archive, small = str(folder / "*.jsonl"), str(folder / "0.jsonl")
        begun = clock()
        with (
            one_thread(),
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
            Client(cluster) as client,
        ):
            started = clock() - begun
            users, items = [f"u{n}" for n in range(USERS)], [f"p{n}" for n in range(50_000)]
            works: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
                "prepare": (
                    partial(prepared_alone, archive, name),
                    lambda: dask.prepare(
                        client, archive, f"{name}/two", schema=SCHEMA, piece=2 << 20, parts=2, **parts()
                    ),
                ),
            }
            print(f"\ncluster started in {started:.1f} s")
            if "score" in chosen or not chosen:
                model = sr.FM(SCHEMA, dim=16)
                sr.BatchTrainer(model=model).run(prepared_alone(small, f"{name}/small"))
                works["score"] = (
                    partial(scored_alone, model, users, name, items),
                    lambda: dask.score(client, model, users, f"{name}/two", catalogue=items),
                )
            tests: dict[str, LabeledRows] = {}
            trained: dict[str, sr.FM] = {}
            if "fit" in chosen or not chosen:
                usual, wide, small_model = kinds = (10, 200_000), (39, 200_000), (10, 20_000)  # fields, ids
                sets = {
                    (fields, ids): write_rows(f"{name}/fit-{fields}-{ids}", rows * 10 // fields, fields, ids)
                    for fields, ids in kinds
                }

                def fit(data: sr.EncodedRows, epochs: int) -> sr.FM:
                    trainer = sr.BatchTrainer(model=sr.FM(data.schema, dim=16), epochs=epochs)
                    dask.fit(client, trainer, data)
                    return trainer.model

                for what, kind, epochs in (
                    ("fit", usual, EPOCHS),
                    ("fit, one epoch", usual, 1),
                    ("fit, 39 fields", wide, EPOCHS),
                    ("fit, 20,000 ids", small_model, EPOCHS),
                ):
                    data, tests[what] = sets[kind]
                    works[what] = partial(fitted_alone, data, epochs), partial(fit, data, epochs)
            sizes = f"{rows:,} rows of 10 fields, {rows * 10 // 39:,} of 39"
            print(f"{count:,} events; {len(users):,} users, {len(items):,} items; {sizes}, {EPOCHS} epochs\n")
            for what, (alone, two) in works.items():
                if chosen and what.split(",")[0] not in chosen:
                    continue
                results = alone(), two()  # compiles
                if what in tests:
                    trained |= zip((f"{what}, one process", f"{what}, two workers"), results, strict=True)
                apart(client, alone)
                costs, at_once = [], []
                for _ in range(repetitions):
                    costs.append((cost(client, alone), cost(client, two)))
                    at_once.append(2 * costs[-1][0].clock / apart(client, alone))
                one, both = (statistics.median(pair[n].clock for pair in costs) for n in (0, 1))
                cpu = statistics.median(pair[0].here for pair in costs)
                busier = statistics.median(max(pair[1].workers) for pair in costs)
                least = max(busier, statistics.median(pair[1].here + sum(pair[1].workers) for pair in costs) / 2)
                print(
                    f"  {what:<15} one process {one:6.2f} s, two workers {both:6.2f} s, ratio {one / both:.2f}; "
                    f"CPU {cpu:6.2f} s and {busier:6.2f} s, ratio {cpu / busier:.2f}; "
                    f"at most {cpu / least:.2f} by the clock of two cores, "
                    f"which do {statistics.median(at_once):.2f} times what one does",
                    flush=True,
                )
            for who, fitted in trained.items():
                test = tests[who.rpartition(", ")[0]]
                print(f"  AUC, {who:<27} {auc(test.labels, fitted.predict(test.batch)):.4f}")
            if not chosen or "prepare" in chosen:
                same = sr.EncodedRows(f"{name}/alone-{os.getpid()}"), sr.EncodedRows(f"{name}/two")
                print(f"  rows prepared {len(same[0]):,} and {len(same[1]):,}\n")


if __name__ == "__main__":
    main(*(int(word) if word.isdigit() else word for word in sys.argv[1:]))  # type: ignore[arg-type]
