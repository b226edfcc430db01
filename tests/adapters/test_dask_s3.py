"""Archive, rows, models and results in a bucket, by an S3 server of these tests on a port of this machine's own."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import streamrec as sr
from tests.adapters.test_dask import METRICS, assert_equal, judged, parts, whole, write
from tests.models.tiny_bert import tiny_bert
from tests.trainers.conftest import Schema, make_stream

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("streamrec.adapters.dask")
s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")
pytest.importorskip("flask_cors")  # of moto's server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server and of botocore


class Bucket(NamedTuple):
    """A bucket of this test's own, and how often each file in it was read."""

    uri: str
    fs: Any
    read: Counter[str]

    def reads(self, suffix: str) -> int:
        return sum(count for name, count in self.read.items() if name.endswith(suffix))


def configure(endpoint: str | None) -> None:
    """Tell fsspec in this process where S3 is; None: nowhere."""
    import fsspec
    import s3fs

    fsspec.config.conf.pop("s3", None)
    if endpoint is not None:
        fsspec.config.conf["s3"] = {"endpoint_url": endpoint, "key": "nobody", "secret": "nothing"}
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(name="bucket")
def _bucket(client: Any) -> Iterator[Bucket]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    read: Counter[str] = Counter()
    app = DomainDispatcherApplication(create_backend_app)

    def counted(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "GET":
            read[environ["PATH_INFO"]] += 1
        return app(environ, start)

    class Silent(WSGIRequestHandler):
        def log(self, *arguments: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        configure(endpoint)
        client.run(configure, endpoint)
        fs = s3fs.S3FileSystem()
        name = f"shop-{secrets.token_hex(4)}"
        fs.mkdir(name)
        yield Bucket(f"s3://{name}", fs, read)
    finally:
        client.run(configure, None)
        configure(None)
        server.shutdown()
        thread.join()
        server.server_close()


def test_from_an_archive_in_a_bucket_to_scores_in_it(client: Any, bucket: Bucket, tmp_path: Path) -> None:
    from pyarrow import parquet

    (tmp_path / "logs").mkdir()
    local = write(tmp_path / "logs", make_stream(1, 400), files=4)
    bucket.fs.put(str(tmp_path / "logs"), bucket.uri, recursive=True)
    expected, counts = whole(sr.JsonLines(local))

    uri = bucket.uri
    rows = dask.prepare(client, f"{uri}/logs/*.jsonl", uri, schema=Schema, parts=3, piece=8000, **parts())
    found = rows.read(10**6)
    assert found is not None
    assert_equal(found, expected)
    assert {name: n for name, n in rows.counts.items() if n} == counts and counts["malformed"]

    models: list[Any] = []
    settings: dict[str, Any] = {"epochs": 2, "window": 500}
    for store in (f"{uri}/ctr", str(tmp_path / "ctr")):
        trainer = sr.BatchTrainer(model=sr.FM(Schema, dim=4), store=store, checkpoint_seconds=1e-3, **settings)
        dask.fit(client, trainer, uri, copies=2)
        models.append(trainer.model.state_dict())
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(models[1][name]), err_msg=name)
    assert len(sr.Store(f"{uri}/ctr").checkpoints.list()) > 1  # a worker wrote there, too

    model = sr.FM(Schema, dim=4)
    sr.OnlineTrainer(model=model, store=f"{uri}/ctr").resume()  # the stream goes on
    np.testing.assert_array_equal(model.state_dict()["weights"], models[0]["weights"])
    bucket.read.clear()
    report = dask.evaluate(client, f"{uri}/ctr", uri, metrics=METRICS)
    assert report.metrics == pytest.approx(judged(model, sr.EncodedRows(uri)), rel=1e-12)
    assert 1 <= bucket.reads(".safetensors") <= len(client.nthreads())

    bucket.read.clear()
    files = dask.score(client, f"{uri}/ctr", [f"u{n}" for n in range(12)], uri, catalogue=["p1", "p2"], at_once=1, k=1)
    assert len(files) == 12 and all(name.startswith(f"{uri}/scores/") for name in files)
    assert 1 <= bucket.reads(".safetensors") <= len(client.nthreads())  # once a worker, whatever the tasks
    scorer = sr.Scorer(f"{uri}/ctr")
    scorer.set_catalogue(["p1", "p2"])
    for n, name in enumerate(files):
        with bucket.fs.open(name) as file:
            (row,) = parquet.read_table(file).to_pylist()
        assert (row["item"], row["score"]) == scorer.retrieve(user=f"u{n}", k=1)[0]


def test_a_search_in_a_bucket(client: Any, bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write(tmp_path / "logs", make_stream(1, 300), files=2)
    bucket.fs.put(str(tmp_path / "logs"), bucket.uri, recursive=True)
    dask.prepare(client, f"{bucket.uri}/logs/*.jsonl", bucket.uri, schema=Schema, **parts())
    space, halving = {"dim": dask.Choice((4,)), "init": dask.Real(0.0, 0.1)}, dask.Halving(3, rounds=2)
    found = dask.search(client, space, bucket.uri, store=f"{bucket.uri}/search", halving=halving, validation=0.3)
    assert found.counts == {"whole": 1, "stopped": 2}
    assert sr.Store(f"{bucket.uri}/search").versions.latest() is not None
    again = dask.search(client, space, bucket.uri, store=f"{bucket.uri}/search", halving=halving, validation=0.3)
    assert str(again) == str(found)  # it only tells


def test_a_pretrained_encoder_in_a_bucket_is_read_once_a_worker(client: Any, bucket: Bucket, tmp_path: Path) -> None:
    bucket.fs.put(str(tiny_bert(tmp_path / "bert")), bucket.uri, recursive=True)
    uri, texts = f"{bucket.uri}/bert", ["red wine glass", "a large paper clock"]

    def vectors(number: int) -> Any:
        encoder = dask.once("bert", lambda: sr.TextEncoder(uri))
        return encoder.embed(texts[:1] if number % 2 else texts)

    expected = sr.TextEncoder(tmp_path / "bert").embed(texts)
    bucket.read.clear()
    found = client.gather(client.map(vectors, range(8), pure=False))
    assert 1 <= bucket.reads("model.safetensors") <= len(client.nthreads())
    for number, one in enumerate(found):
        np.testing.assert_allclose(one, expected[: len(one)], rtol=1e-5, atol=1e-6)
        assert len(one) == 2 - number % 2
