"""A cluster of real processes, started once, on ports of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

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


@pytest.fixture(scope="session", name="clients")
def _clients() -> Iterator[list[Any]]:
    """Of the cluster that tests share, while it is whole."""
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
            clients.append(distributed.Client(local_cluster()))
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
