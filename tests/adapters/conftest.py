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


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # starting a cluster is not what is tested
        cluster = local_cluster()
        client = distributed.Client(cluster)
    yield client
    client.close()
    cluster.close()
