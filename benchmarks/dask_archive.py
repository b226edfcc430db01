"""A Parquet archive of ten million events, prepared and learned by two Dask workers: what memory each process takes.

    nice python -m benchmarks.dask_archive [events] [folder]

Takes minutes, and a gigabyte of disk. `folder` keeps the archive and its rows for the next run, which then begins at
`fit`; without one they are removed.
Peaks are the largest resident set that the system has seen of a process (Linux: `VmHWM`), the imports in it; "before"
is what it was when the work began. Two sizes in one run tell whether memory grows with the archive.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import streamrec as sr

__all__ = ["main", "write_archive"]

SCHEMA = sr.Schema(
    *(sr.Id(name) for name in ("user", "item", "country", "device", "genre")), sr.Number("price", log=True)
)
START, PER_SECOND = 1_700_000_000.0, 40.0
USERS, ITEMS = 50_000, 20_000
FILE, GROUP = 500_000, 50_000  # events of a file and of a row group, which is what `prepare` reads at once


def write_archive(folder: Path, events: int) -> None:
    """About so many events in order of time, a tenth of them clicks, as Parquet with features as columns."""
    import pyarrow
    from pyarrow import compute, parquet

    def named(name: str, numbers: np.ndarray, number: bool = True) -> Any:
        """The name and the number of each, null below 0."""
        text = pyarrow.array(numbers).cast(pyarrow.string()) if number else pyarrow.array([""] * len(numbers))
        return compute.if_else(pyarrow.array(numbers >= 0), compute.binary_join_element_wise(name, text, ""), None)

    folder.mkdir(parents=True, exist_ok=True)
    late: dict[str, np.ndarray] = {}  # clicks that come after the impressions of their file
    for number, first in enumerate(range(0, events, FILE)):
        rng = np.random.default_rng([7, number])
        shown = min(FILE, events - first) * 10 // 11
        ids = first + np.arange(shown)
        times = START + ids / PER_SECOND
        users, items = (USERS * rng.random(shown) ** 2).astype(int), (ITEMS * rng.random(shown) ** 2).astype(int)
        clicked = np.flatnonzero(rng.random(shown) < 0.02 + 0.16 * ((users + items) % 2))
        click = {"time": times[clicked] + rng.uniform(1.0, 600.0, len(clicked)), "of": ids[clicked]}
        click = {name: np.concatenate([late.get(name, column[:0]), column]) for name, column in click.items()}
        end = START + (first + min(FILE, events - first)) / PER_SECOND
        now = click["time"] < end if first + FILE < events else np.ones(len(click["of"]), dtype=bool)
        late, click = ({n: c[~now] for n, c in click.items()}, {n: c[now] for n, c in click.items()})
        nobody = np.full(len(click["of"]), -1)
        user, item = np.append(users, nobody), np.append(items, nobody)
        shown_id, click_id = named("i", np.append(ids, nobody)), named("c", np.append(np.full(shown, -1), click["of"]))
        columns: dict[str, Any] = {
            "type": pyarrow.array(["feedback", "impression"]).take(pyarrow.array((user >= 0).astype(int))),
            "id": compute.coalesce(shown_id, click_id),
            "time": np.concatenate([times, click["time"]]),
            "user": named("u", user),
            "item": named("p", item),
            "country": named("c", np.where(user < 0, -1, user % 30)),
            "device": named("d", np.where(user < 0, -1, user % 4)),
            "price": pyarrow.array((item % 90).astype(float), mask=item < 0),
            "genre": named("g", np.where(item < 0, -1, item % 7)),
            "impression_id": named("i", np.append(np.full(shown, -1), click["of"])),
            "kind": named("click", np.append(np.full(shown, -1), nobody + 1), number=False),
        }
        table = pyarrow.table(columns)
        table = table.take(np.argsort(columns["time"], kind="stable"))
        parquet.write_table(table, folder / f"{number:05d}.parquet", row_group_size=GROUP, compression="zstd")


def peak() -> float:
    """The largest resident set of this process so far, MiB."""
    # not getrusage, which begins with that of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def peaks(client: Any) -> str:
    """Of the client and of its workers."""
    workers = sorted(client.run(peak).values())
    return f"client {peak():,.0f} MiB, workers {' and '.join(f'{one:,.0f}' for one in workers)} MiB"


@contextmanager
def cluster() -> Iterator[Any]:
    """Two processes of one thread each."""
    from distributed import Client, LocalCluster

    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as local,
        Client(local) as client,
    ):
        yield client


def measure(events: int, folder: Path) -> None:
    """Prepare and learn one archive by processes that are new, and print what they took."""
    from streamrec.adapters import dask

    archive, out = folder / "archive", str(folder / "prepared")
    size = sum(one.stat().st_size for one in archive.glob("*.parquet")) / 2**20
    print(f"\n{events:,} events, {size:,.0f} MiB of Parquet", flush=True)
    with cluster() as client:
        client.run(__import__, "streamrec.adapters.dask")
        print(f"  before   {peaks(client)}", flush=True)
        if not Path(out, "rows", "rows.json").exists():
            begun = time.perf_counter()
            rows = dask.prepare(
                client,
                str(archive / "*.parquet"),
                out,
                schema=SCHEMA,
                preprocessors=[sr.Dedup(ttl=600.0, capacity=1_000_000)],
                join=sr.LabelJoin(windows={"click": 900.0}, lateness=60.0),
            )
            took = time.perf_counter() - begun
            print(
                f"  prepare  {peaks(client)}; {took:,.0f} s, {len(rows):,} rows in {len(rows.parts)} files", flush=True
            )
        begun = time.perf_counter()
        trainer = sr.BatchTrainer(model=sr.FM(SCHEMA, dim=16), validation=0.1, metrics=[sr.AUC()])
        report = dask.fit(client, trainer, out)
        took = time.perf_counter() - begun
        print(f"  fit      {peaks(client)}; {took:,.0f} s, AUC {report.metrics['AUC']:.4f}", flush=True)


def main(events: int = 10_000_000, folder: str | None = None) -> None:
    """A tenth of the archive first, then all of it, each by processes of its own: a peak never falls."""
    with tempfile.TemporaryDirectory() as temporary:
        for count in (events // 10, events):
            where = Path(folder or temporary, str(count))
            for step in ("write", "measure"):
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.dask_archive", step, str(count), str(where)], check=True
                )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", count, where]:
            if not Path(where, "archive").exists():
                write_archive(Path(where, "archive"), int(count))
        case ["measure", count, where]:
            measure(int(count), Path(where))
        case arguments:
            main(*(int(one) if one.isdigit() else one for one in arguments))  # type: ignore[arg-type]
