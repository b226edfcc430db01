"""An FM that several processes have learned is as good as one process's, and as often as they die."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part
from tests.adapters.conftest import local_cluster
from tests.adapters.killing import kill_worker

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("streamrec.adapters.dask")

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Number("price", standardize=True))
START = 1_700_000_000.0


def learnable(count: int, seed: int = 0) -> LabeledRows:
    """Users of two kinds and items of two kinds: a user clicks on items of the same kind."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 60, count), rng.integers(0, 40, count)
    labels = rng.random(count) < np.where((users + items) % 2 == 0, 0.7, 0.1)
    shown = [
        sr.Impression(f"i{n}", START + n, f"u{users[n]}", f"p{items[n]}", {"price": float(items[n])})
        for n in range(count)
    ]
    return LabeledRows(encode(SCHEMA, shown).batch, labels.astype(np.float32), np.ones(count, dtype=np.float32))


def written(folder: Path, count: int = 6000, files: int = 3) -> str:
    rows = learnable(count)
    parts = [
        write_part(str(folder), f"part-{n}", [rows.take(slice(count * n // files, count * (n + 1) // files))])
        for n in range(files)
    ]
    commit_rows(str(folder), SCHEMA, parts)
    return str(folder)


def make(**settings: Any) -> sr.BatchTrainer:
    model = sr.FM(SCHEMA, dim=4, seed=3)
    return sr.BatchTrainer(model=model, **{"epochs": 2, "window": 500, **settings})


def state_of(model: sr.FM) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.asarray(value) for name, value in model.state_dict().items()}


def assert_same(one: sr.FM, other: sr.FM) -> None:
    expected = state_of(other)
    for name, value in state_of(one).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


VARIED = {"shuffle": True, "validation": 0.2, "patience": 2, "schedule": sr.trainers.Linear(), "metrics": [sr.AUC()]}


@pytest.mark.parametrize("settings", [{}, VARIED], ids=["plain", "varied"])
def test_one_copy_is_the_trainer_itself(client: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    uri = written(tmp_path)
    alone, fitted = make(**settings), make(**settings)
    expected = alone.run(sr.EncodedRows(uri))
    found = dask.fit(client, fitted, uri, copies=1)
    assert_same(fitted.model, alone.model)
    assert found.metrics == expected.metrics and found.counts == expected.counts
    assert fitted.history == alone.history


@pytest.mark.parametrize("settings", [{}, VARIED], ids=["plain", "varied"])
def test_copies_are_as_good_as_one(client: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    uri = written(tmp_path, 20_000)
    test = learnable(5_000, seed=1)
    found = {}
    for copies in (1, 2, 3):  # three take turns on two workers
        trainer = make(**settings)
        report = dask.fit(client, trainer, uri, copies=copies, apart=4_000)
        metric = sr.AUC()
        metric.update(test.labels, trainer.model.predict(test.batch))
        found[copies] = metric.compute()
        assert report.counts["learned"] == 2 * (16_000 if settings else 20_000)
    assert min(found.values()) > max(found.values()) - 0.005 and found[1] > 0.75


def test_the_result_does_not_depend_on_who_has_which_copy(client: Any, tmp_path: Path) -> None:
    uri = written(tmp_path)
    results = []
    for _ in range(2):
        trainer = make(**VARIED)
        dask.fit(client, trainer, uri, copies=2, apart=1000)
        results.append(trainer)
    assert_same(results[0].model, results[1].model)
    assert results[0].history == results[1].history


def test_the_stream_goes_on_and_a_training_that_has_ended_is_not_begun_again(client: Any, tmp_path: Path) -> None:
    uri, store = written(tmp_path), str(tmp_path / "store")
    trainer = make(store=store)
    report = dask.fit(client, trainer, uri, copies=2)
    again = make(store=store)
    assert dask.fit(client, again, uri, copies=2).counts == report.counts
    assert_same(again.model, trainer.model)
    assert make(store=store).run(sr.EncodedRows(uri)).counts == report.counts
    online = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4, seed=3), store=store)
    online.resume()
    assert_same(online.model, trainer.model)
    assert sr.Scorer(store).version is not None


def test_a_model_that_workers_hand_on_has_memory_of_its_own(client: Any) -> None:
    from distributed.protocol import deserialize, serialize

    rows = learnable(200)
    model, calm = sr.FM(SCHEMA, dim=4, seed=3), sr.FM(SCHEMA, dim=4, seed=3)
    model.learn(*rows)  # its loops know their addresses
    calm.learn(*rows)
    header, frames = serialize(model)
    assert header["serializer"] == "pickle"  # whoever receives it needs nothing of this package's adapter
    copied = deserialize(header, frames)
    assert_same(copied, model)
    copied.learn(*rows)
    assert_same(model, calm)
    calm.learn(*rows)
    assert_same(copied, calm)


# -- failures ----------------------------------------------------------------------------------------------------------


class Killer:
    """A schedule that takes its worker along when the training is so far, once."""

    def __init__(self, flag: str, at: float) -> None:
        self.flag, self.at = flag, at

    def __call__(self, progress: float) -> float:
        if progress >= self.at:
            kill_worker(self.flag)
        return 1.0


@pytest.mark.parametrize(("copies", "kept"), [(1, False), (2, True)], ids=["one, no store", "two, a store"])
def test_a_killed_worker_changes_nothing(client: Any, tmp_path: Path, copies: int, kept: bool) -> None:
    uri = written(tmp_path)
    settings: dict[str, Any] = {**VARIED, "schedule": lambda progress: 1.0, "epochs": 3}
    calm = make(**settings)
    dask.fit(client, calm, uri, copies=copies, apart=1000)
    killer = Killer(str(tmp_path / "flag"), 0.6)
    store = {"store": str(tmp_path / "store"), "checkpoint_seconds": 1e-3} if kept else {}
    struck = make(**{**settings, **store, "schedule": killer})
    dask.fit(client, struck, uri, copies=copies, apart=1000)
    assert os.path.exists(killer.flag)
    assert_same(struck.model, calm.model)
    assert struck.history == calm.history


def test_a_copy_that_hangs_is_a_clear_error(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamrec.adapters.dask._ranks.GRACE", 0.5)  # nothing but waiting
    monkeypatch.setattr("streamrec.adapters.dask._copies.TRIES", 2)
    uri, flag, end = written(tmp_path), tmp_path / "flag", tmp_path / "end"

    def hang(progress: float) -> float:
        if progress >= 0.6 and multiprocessing.parent_process() is not None:
            with suppress(FileExistsError), open(flag, "x"):
                while not end.exists():
                    time.sleep(0.01)
        return 1.0

    assert dask.fit(client, make(), uri, copies=2).counts["learned"] == 12_000  # the workers have what they need
    # the other waits for it no longer than it may; then nobody can open a meeting, or not all come to it
    clear = r"workers were lost 2 times, .*has not come in time|nothing was heard of the ranks for 3 s"
    try:
        with pytest.raises(dask.ClusterError, match=clear):
            dask.fit(client, make(schedule=hang), uri, copies=2, apart=1000, timeout=3.0)
        assert flag.exists()
    finally:
        end.touch()
    assert dask.fit(client, make(), uri, copies=2).counts["learned"] == 12_000  # the workers are free again


def test_a_worker_that_always_dies_is_a_clear_error_with_a_checkpoint(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamrec.adapters.dask._copies.TRIES", 2)  # each loss takes a worker's start
    uri, store = written(tmp_path), str(tmp_path / "store")

    def deadly(progress: float) -> float:
        if progress >= 0.6:
            kill_worker()
        return 1.0

    settings: dict[str, Any] = {"store": store, "checkpoint_seconds": 1e-3}
    # of its own: a nanny whose worker dies while it starts may never start it again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # starting a cluster is not what is tested
        cluster = local_cluster(1)
    clear = pytest.raises(dask.ClusterError, match=r"workers were lost 2 times|there are no workers")
    with cluster, distributed.Client(cluster, set_as_default=False) as other, clear:
        dask.fit(other, make(**settings, schedule=deadly), uri, copies=2, apart=1000)
    with pytest.raises(sr.ConfigError, match="copies=2 there and None here"):
        make(**settings).run(sr.EncodedRows(uri))
    resumed, calm = make(**settings), make()
    dask.fit(client, resumed, uri, copies=2, apart=1000)
    dask.fit(client, calm, uri, copies=2, apart=1000)
    assert_same(resumed.model, calm.model)


def test_what_a_rank_raises_is_raised(client: Any, tmp_path: Path) -> None:
    uri = written(tmp_path)
    rows = sr.EncodedRows(uri)
    (tmp_path / "rows" / rows.parts[2].name).unlink()
    begun = time.monotonic()
    with pytest.raises(sr.errors.DamagedError, match="lacks the file"):
        dask.fit(client, make(), rows, copies=2)
    assert time.monotonic() - begun < 100  # and not after the timeout


def test_what_fit_refuses(client: Any, tmp_path: Path) -> None:
    uri = written(tmp_path, 100, 1)
    for name, value in {"copies": 0, "apart": 0, "keep": -1, "timeout": 0.0}.items():
        with pytest.raises(sr.ConfigError, match=f"{name} must be"):
            dask.fit(client, make(), uri, **{name: value})
    with pytest.raises(sr.SchemaError, match="differs from that of the rows"):
        dask.fit(client, sr.BatchTrainer(model=sr.FM(sr.Schema(sr.Id("user")))), uri)
    with pytest.raises(sr.ConfigError, match="must be the distributed"):
        dask.fit("localhost", make(), uri)


def test_a_busy_cluster_is_a_clear_error(client: Any, tmp_path: Path) -> None:
    uri, flag = written(tmp_path, 100, 1), tmp_path / "end"

    def hold() -> None:
        while not flag.exists():
            time.sleep(0.01)

    held = [client.submit(hold, workers=[address], pure=False) for address in client.nthreads()]
    try:
        with pytest.raises(dask.ClusterError, match="nothing was heard of the ranks for 2 s"):
            dask.fit(client, make(), uri, copies=2, timeout=2.0)
    finally:
        flag.touch()
        client.gather(held)


def test_ranks_stop_when_the_client_gives_up(client: Any, tmp_path: Path) -> None:
    uri, steps = written(tmp_path, 100, 1), tmp_path / "steps"

    def slow(progress: float) -> float:
        if multiprocessing.parent_process() is not None:
            with open(steps, "a") as file:
                file.write(".")
            if progress > 0.01:
                time.sleep(3.0)
        return 1.0

    with pytest.raises(dask.ClusterError, match="nothing was heard of the ranks for 2 s"):
        dask.fit(client, make(epochs=100, schedule=slow), uri, copies=1, timeout=2.0)
    for address in client.nthreads():
        # each worker has one thread, which is free again long before the training would have ended
        client.submit(abs, 1, workers=[address], pure=False).result(timeout=60)
    assert steps.stat().st_size < 50
    assert set(client.run(open_stores).values()) == {0}


def open_stores() -> int:
    from streamrec.adapters.dask import _ranks

    return len(_ranks._stores)


def test_a_lost_scheduler_is_a_clear_error(tmp_path: Path) -> None:
    where = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen(
        [*command, "--no-dashboard", "--scheduler-file", str(where)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    worker = subprocess.Popen(
        [
            *(sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(where), "--no-dashboard"),
            *("--nthreads", "1", "--host", "127.0.0.1", "--death-timeout", "60"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not where.exists():
            assert scheduler.poll() is None
            time.sleep(0.05)
        uri = written(tmp_path, 100, 1)
        with distributed.Client(scheduler_file=str(where), set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            killer = threading.Timer(1.0, scheduler.kill)
            trainer = make(epochs=100_000)
            killer.start()
            with pytest.raises(dask.ClusterError, match="the scheduler is lost"):
                dask.fit(client, trainer, uri, timeout=60.0)
            killer.join()
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()
