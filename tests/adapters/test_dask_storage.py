"""What workers need is read from where it is, by each of them once: over HTTP, which says how often it was asked."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("streamrec.adapters.dask")
pytest.importorskip("aiohttp")  # fsspec's HTTP needs it

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))


class Served(SimpleHTTPRequestHandler):
    """A folder, and how often each file of it was read."""

    read: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.read[self.path.rsplit("/", 1)[-1]] += 1
        super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(name="served")
def _served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    Served.read.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Served, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def payloads() -> int:
    return sum(count for name, count in Served.read.items() if name.endswith(".safetensors"))


def test_each_worker_reads_a_version_once_whatever_the_tasks(client: Any, served: tuple[Path, str]) -> None:
    folder, uri = served
    shown = [sr.Impression(f"i{n}", 1000.0 + n, f"u{n % 7}", f"p{n % 5}") for n in range(240)]
    labels = np.array([n % 3 == 0 for n in range(240)], dtype=np.float32)
    rows = LabeledRows(encode(SCHEMA, shown).batch, labels, np.ones_like(labels))
    parts = [write_part(str(folder), f"part-{n}", [rows.take(slice(20 * n, 20 * n + 20))]) for n in range(12)]
    commit_rows(str(folder), SCHEMA, parts)
    model = sr.FM(SCHEMA, dim=4)
    sr.BatchTrainer(model=model, store=folder / "store").run(sr.EncodedRows(str(folder)))
    assert payloads() == 0

    report = dask.evaluate(client, f"{uri}/store", str(folder), metrics=[sr.LogLoss()])
    expected = sr.LogLoss()
    expected.update(labels, model.predict(rows.batch))
    assert report.metrics["LogLoss"] == pytest.approx(expected.compute(), rel=1e-12)
    workers = len(client.nthreads())
    assert 1 <= payloads() <= workers < len(parts)

    Served.read.clear()
    users = [f"u{n}" for n in range(12)]
    files = dask.score(client, f"{uri}/store", users, str(folder), catalogue=["p1", "p2"], at_once=1, k=1)
    assert len(files) == 12 and 1 <= payloads() <= workers


def test_what_is_made_once_is_made_once_a_worker(client: Any, served: tuple[Path, str]) -> None:
    folder, uri = served
    (folder / "pretrained").write_bytes(b"0.05")
    shown = [sr.Impression(f"i{n}", 1000.0 + n, f"u{n % 7}", f"p{n % 5}") for n in range(100)]
    labels = np.array([n % 3 == 0 for n in range(100)], dtype=np.float32)
    rows = LabeledRows(encode(SCHEMA, shown).batch, labels, np.ones_like(labels))
    commit_rows(str(folder), SCHEMA, [write_part(str(folder), "part", [rows])])

    def load() -> float:
        import fsspec

        with fsspec.open(f"{uri}/pretrained") as file:
            return float(file.read())

    def make(point: Any) -> Any:
        return sr.FM(SCHEMA, dim=4, init=dask.once(f"{uri}/pretrained", load) + point["more"])

    space = {"more": dask.Real(0.0, 0.1)}
    found = dask.search(
        client, space, str(folder), make=make, store=folder / "store", halving=dask.Halving(8, rounds=1)
    )
    assert found.counts == {"whole": 8}
    assert 1 <= Served.read["pretrained"] <= len(client.nthreads())
    best = sr.Store(folder / "store").versions.latest()
    assert best is not None and best.info["model"]["config"]["init"] == pytest.approx(0.05 + found.best.params["more"])
