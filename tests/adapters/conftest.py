"""A cluster of real processes, started once, on ports of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from filelock import FileLock

from tests.adapters.faust_workers import worker  # noqa: F401  # the fixture, for whoever names it

collect_ignore = ["worker.py"]  # a Faust worker is a program of its own, started by the tests

distributed = pytest.importorskip("distributed")


def local_cluster(workers: int = 2) -> Any:
    """Two processes of one thread each, without a dashboard."""
    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        worker_dashboard_address=None,
        scheduler_port=0,
        silence_logs=50,
    )


def compile_loops(factory: pytest.TempPathFactory, dim: int = 4) -> None:
    """Compile what workers run, once for all of them and for all processes of these tests: each would do so by itself,
    all at the same time."""
    # the parent of each process's own folder is that of all processes of this run
    with FileLock(factory.getbasetemp().parent / f"compiled-{dim}.lock"):
        _learn_and_merge(dim)


def _learn_and_merge(dim: int) -> None:
    import numpy as np

    import streamrec as sr
    from streamrec.models.merging import Copy, merge
    from streamrec.preprocessors import encode

    schema = sr.Schema(sr.Id("user"), sr.Number("price", standardize=True))
    batch = encode(schema, [sr.Impression("i1", 0.0, "u1", "p1", {"price": 1.0})]).batch
    models = [sr.FM(schema, dim=dim) for _ in range(2)]
    copies = [Copy(model) for model in models]
    for model in models:
        model.learn(batch, np.ones(1, dtype=np.float32))
        model.predict(batch)
    merge(copies)


@pytest.fixture(scope="session", name="clients")
def _clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Of the cluster that tests share, while it is whole."""
    compile_loops(tmp_path_factory)
    clients: list[Any] = []
    yield clients
    for client in clients:
        _close(client)


@pytest.fixture
def client(clients: list[Any]) -> Any:
    """Of two workers; of a new cluster where one is lost: a nanny gives up a worker that is killed while it starts."""
    if clients and not _whole(clients[-1]):
        _close(clients.pop())
    if not clients:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # starting a cluster is not what is tested
            # nothing may take the default client of all for the one that it was given
            clients.append(distributed.Client(local_cluster(), set_as_default=False))
    return clients[-1]


def _whole(client: Any) -> bool:
    try:
        client.wait_for_workers(2, timeout=30)
    except TimeoutError:
        return False
    return True


def _close(client: Any) -> None:
    cluster = client.cluster
    client.close()
    cluster.close()
