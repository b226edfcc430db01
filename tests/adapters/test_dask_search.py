"""A search on a cluster finds what trying everything in one process would find: with real processes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part
from streamrec.testing._state import copy_state, first_difference
from tests.adapters.conftest import compile_loops
from tests.adapters.killing import kill_worker

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("streamrec.adapters.dask")

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))
# few pairs of dim and optimizers: each is compiled for
SPACE = {"dim": dask.Choice((4, 8)), "optimizer.lr": dask.Real(0.001, 1.0, log=True)}
NINE = dask.Halving(trials=9)


def archive(folder: Path, count: int = 3000, files: int = 5) -> sr.EncodedRows:
    """Users like items of their own parity; a second apart."""
    rng = random.Random(0)
    examples = []
    for n in range(count):
        user, item = rng.randrange(30), rng.randrange(30)
        shown = sr.Impression(f"i{n}", 1_700_000_000.0 + n, f"u{user}", f"p{item}")
        examples.append((shown, float(rng.random() < (0.7 if (user + item) % 2 else 0.1))))
    written = []
    for n in range(files):
        some = examples[count * n // files : count * (n + 1) // files]
        labels = np.array([label for _, label in some], dtype=np.float32)
        rows = LabeledRows(encode(SCHEMA, [one for one, _ in some]).batch, labels, np.ones_like(labels))
        written.append(write_part(str(folder), f"part-{n}", [rows]))
    commit_rows(str(folder), SCHEMA, written)
    return sr.EncodedRows(str(folder))


@pytest.fixture(name="rows", scope="module")
def _rows(tmp_path_factory: pytest.TempPathFactory) -> sr.EncodedRows:
    compile_loops(tmp_path_factory, dim=8)
    return archive(tmp_path_factory.mktemp("archive"))


def by_hand(rows: sr.EncodedRows, params: Any, budget: float) -> tuple[sr.FM, dict[str, float]]:
    """What a trial is: learn the newest share of what is before the last tenth, and be judged by that tenth."""
    rows.load_state_dict({"row": 0})
    whole = rows.read(10**6)
    assert whole is not None
    first, last = rows.span() or (0.0, 0.0)
    split = last - 0.1 * (last - first)
    times = whole.batch.times
    learned = whole.take(np.flatnonzero((times >= split - budget * (split - first)) & (times < split)))
    judged = whole.take(np.flatnonzero(times >= split))
    # both by the rates of FM's defaults, the factors' but for what the point says
    model = sr.FM(SCHEMA, dim=params["dim"], optimizer=sr.Adagrad(lr=params["optimizer.lr"], eps=0.1))
    model = sr.FM(SCHEMA, dim=model.dim, optimizer=model.optimizer, linear_optimizer=sr.FTRL(lr=0.2))
    model.learn(*learned)
    found = {}
    for metric in (sr.LogLoss(), sr.AUC()):
        metric.update(judged.labels, model.predict(judged.batch), judged.weights)
        found[metric.name] = metric.compute()
    return model, found


def told(trials: Any) -> Any:
    """All but the seconds and where the store is."""
    return [(one.number, one.params, one.budget, one.status, one.metrics, one.reason) for one in trials]


def same(one: Any, other: Any) -> bool:
    return first_difference(copy_state(one.state_dict()), copy_state(other.state_dict())) is None


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_a_search_finds_what_one_process_finds(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    trials = dask.search(client, SPACE, rows, store=tmp_path, halving=NINE, metrics=[sr.AUC()])
    assert len(trials) == 9 and trials.counts == {"whole": 1, "stopped": 8}
    going = list(trials)
    for number, count in enumerate((3, 1, 1)):
        budget = 3.0 ** (number - 2)
        losses = {one.number: by_hand(rows, one.params, budget)[1] for one in going}
        for one in going:
            if one.budget == budget:  # the most that was tried with it
                assert one.metrics == pytest.approx(losses[one.number], rel=1e-12)
        kept = sorted(losses, key=lambda one: losses[one]["LogLoss"])[:count]
        going = [trials[one] for one in sorted(kept)]
    assert [trials.best] == going and trials.best.status == "whole"

    model, metrics = by_hand(rows, trials.best.params, 1.0)
    scorer, version = sr.Scorer(str(tmp_path)), sr.Store(tmp_path).versions.latest()
    assert version is not None and version.number == trials.version == 1
    assert version.info["metrics"]["LogLoss"] == pytest.approx(metrics["LogLoss"], rel=1e-12)
    assert version.info["search"]["trial"] == trials.best_number
    shown = [sr.Impression(f"x{n}", 1.8e9, f"u{n}", f"p{n % 7}") for n in range(40)]
    expected = model.predict(encode(SCHEMA, shown).batch)
    np.testing.assert_array_equal(scorer.score(shown), expected)
    assert [one.name for one in (tmp_path / "search").iterdir()] == ["search.json"]  # no model but the best is left

    settings = {"dim": model.dim, "optimizer": model.optimizer, "linear_optimizer": model.linear_optimizer}
    stream = sr.OnlineTrainer(model=sr.FM(SCHEMA, **settings), store=tmp_path)
    examples = [sr.Labeled(one, 1.0) for one in shown]
    stream.run(sr.Memory(examples))  # goes on from the store
    alone = sr.OnlineTrainer(model=model)
    alone.run(sr.Memory(examples))
    assert same(stream.model, alone.model)


def test_neither_workers_nor_threads_change_what_comes_out(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    two = dask.search(client, SPACE, rows, store=tmp_path / "two", halving=NINE, points=dask.RandomPoints(seed=5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = distributed.LocalCluster(
            n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None, silence_logs=50
        )
    with cluster, distributed.Client(cluster, set_as_default=False) as one_client:
        one = dask.search(one_client, SPACE, rows, store=tmp_path / "one", halving=NINE, points=dask.RandomPoints(5))
    assert told(one) == told(two) and one.best_number == two.best_number
    models = [sr.Store(tmp_path / name).checkpoints.read() for name in ("one", "two")]
    assert models[0] is not None and models[1] is not None
    assert first_difference(copy_state(models[0][1]["model"]), copy_state(models[1][1]["model"])) is None
    other = dask.search(client, SPACE, rows, store=tmp_path / "other", halving=NINE, points=dask.RandomPoints(seed=6))
    assert told(other) != told(two)


def test_a_search_takes_the_files_it_is_given(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    space = {"dim": dask.Choice((4,)), "optimizer.lr": dask.Choice((0.05,))}
    some = rows.only([1, 2, 3])
    found = dask.search(client, space, some, store=tmp_path, halving=dask.Halving(1, rounds=1), metrics=[sr.AUC()])
    _, metrics = by_hand(some, found.best.params, 1.0)
    assert found.best.metrics == pytest.approx(metrics, rel=1e-12)
    with pytest.raises(sr.ConfigError, match="holds another search: data was"):
        dask.search(client, space, rows, store=tmp_path, halving=dask.Halving(1, rounds=1))


def test_optuna_chooses_the_points_the_same_each_time(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def sampler() -> Any:
        return optuna.samplers.TPESampler(seed=3, n_startup_trials=4)

    points = dask.OptunaPoints(sampler, group=4)
    space = {**SPACE, "init": dask.Real(0.0, 0.1), "epochs": dask.Whole(1, 2)}
    found = dask.search(client, space, rows, store=tmp_path / "one", halving=dask.Halving(12, rounds=2), points=points)
    again = dask.search(client, space, rows, store=tmp_path / "two", halving=dask.Halving(12, rounds=2), points=points)
    assert told(found) == told(again) and {one.params["epochs"] for one in found} == {1, 2}
    alone = optuna.create_study(sampler=sampler())  # asked for four, told them, asked for four
    of = optuna.distributions
    kinds = {
        "dim": of.CategoricalDistribution(range(2)),
        "optimizer.lr": of.FloatDistribution(0.001, 1.0, log=True),
        "init": of.FloatDistribution(0.0, 0.1),
        "epochs": of.IntDistribution(1, 2),
    }
    losses = json.loads((tmp_path / "one" / "search" / "search.json").read_text())["rounds"][0]
    for begin in range(0, 12, 4):
        asked = [alone.ask(kinds) for _ in range(4)]
        for number, one in enumerate(asked, begin):
            assert found[number].params == {**one.params, "dim": (4, 8)[one.params["dim"]]}
            alone.tell(one, losses[str(number)]["metrics"]["LogLoss"])


def test_a_table_can_be_read_by_people_and_programs(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    space = {
        "linear_optimizer": dask.Choice((sr.FTRL(), sr.FTRL(l1=0.1))),
        "linear_optimizer.lr": dask.Choice([0.1]),
        "init": dask.Real(0.0, 0.1),
        "dim": dask.Choice((4,)),
    }
    trials = dask.search(client, space, rows, store=tmp_path, halving=dask.Halving(3, rounds=2), metrics=[sr.AUC()])
    lines = str(trials).splitlines()
    assert lines[0].split() == ["trial", "status", "budget", "LogLoss", "AUC", *space, "reason"]
    assert lines[1].split()[:3] == [str(trials.best_number), "whole", "1"]
    assert lines[-1] == f"3 trials: 1 whole, 2 stopped; trial {trials.best_number} is version 1 of {tmp_path}"
    read = json.loads(trials.to_json())
    assert read["best"] == trials.best_number and [one["number"] for one in read["trials"]] == [0, 1, 2]
    assert (
        read["trials"][0]["metrics"] == trials[0].metrics and read["trials"][0]["params"]["linear_optimizer.lr"] == 0.1
    )
    assert {one["params"]["linear_optimizer"]["l1"] for one in read["trials"]} <= {0.0, 0.1}


# -- trials that come to nothing ---------------------------------------------------------------------------------------


class Broken(sr.FM):
    """Scores nan from the first row that was learned on."""

    def predict(self, batch: sr.Batch) -> Any:
        scores = super().predict(batch)
        return scores if not self.ids.used else np.full_like(scores, math.nan)


def test_trials_that_fail_or_score_nan_are_counted_and_stopped(
    client: Any, rows: sr.EncodedRows, tmp_path: Path
) -> None:
    reads = tmp_path / "reads"

    def make(params: Any) -> Any:
        if params["kind"] == "raises":
            raise ArithmeticError("no such model")
        if params["kind"] == "nan":
            with open(reads, "a") as file:
                file.write("x")
            return sr.BatchTrainer(model=Broken(SCHEMA, dim=4), epochs=1000, window=100, patience=1000)
        return sr.FM(SCHEMA, dim=4)

    space = {"kind": dask.Choice(("raises", "nan", "good"))}
    trials = dask.search(client, space, rows, make=make, store=tmp_path / "store", halving=NINE)
    by_kind: dict[str, set[str]] = {}
    for one in trials:
        by_kind.setdefault(one.params["kind"], set()).add(one.status)
    assert by_kind == {"raises": {"failed"}, "nan": {"nan"}, "good": {"whole", "stopped"}}
    reasons = {one.status: one.reason for one in trials}
    assert reasons["failed"] == "ArithmeticError: no such model" and reasons["nan"] == "scores are not finite"
    assert trials.counts["nan"] + trials.counts["failed"] + trials.counts["whole"] + trials.counts["stopped"] == 9
    assert "no such model" in str(trials) and json.loads(trials.to_json())["trials"]
    assert len(reads.read_text()) == trials.counts["nan"]  # none of them went on to the next round

    with pytest.raises(sr.ConfigError, match="no trial is left to choose: 9 came to nothing, the first for: Arith"):
        dask.search(client, {"kind": dask.Choice(("raises",))}, rows, make=make, store=tmp_path / "none", halving=NINE)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_worker_killed_in_a_trial(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")

    def make(params: Any) -> Any:
        if params["n"] == 1:
            kill_worker(flag)
        return sr.FM(SCHEMA, dim=4, init=params["n"] / 100)

    def calm(params: Any) -> Any:
        return sr.FM(SCHEMA, dim=4, init=params["n"] / 100)

    space = {"n": dask.Choice((0, 1, 2))}
    found = dask.search(client, space, rows, make=make, store=tmp_path / "one", halving=NINE)
    assert os.path.exists(flag)
    assert told(found) == told(dask.search(client, space, rows, make=calm, store=tmp_path / "two", halving=NINE))


def test_a_trial_that_always_kills_is_one_that_failed(
    client: Any, rows: sr.EncodedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)  # each death takes seconds

    def make(params: Any) -> Any:
        if params["n"] == 1:
            kill_worker()
        return sr.FM(SCHEMA, dim=4, init=params["n"] / 100)

    points = dask.RandomPoints(seed=next(seed for seed in range(99) if kinds(seed) == [0, 1, 2]))
    space = {"n": dask.Choice((0, 1, 2))}
    trials = dask.search(
        client, space, rows, make=make, store=tmp_path, halving=dask.Halving(3, rounds=1), points=points
    )
    assert [one.status for one in trials] == ["whole", "failed", "whole"]
    assert trials[1].reason == "workers died again and again over it"


def kinds(seed: int) -> list[int]:
    points = dask.RandomPoints(seed=seed).begin({"n": dask.Choice((0, 1, 2))})
    return [points.ask(number)["n"] for number in range(3)]


@pytest.mark.parametrize(("calls", "sampled"), [(1, False), (5, True), (11, False), (12, False)])
def test_a_search_that_broke_goes_on(
    client: Any, rows: sr.EncodedRows, tmp_path: Path, calls: int, sampled: bool
) -> None:
    points = dask.RandomPoints()
    if sampled:
        optuna = pytest.importorskip("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        points = dask.OptunaPoints(lambda: optuna.samplers.TPESampler(seed=0, n_startup_trials=2), group=3)
    log = tmp_path / "log"
    log.touch()

    def make(params: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{params['lr']}\n")
        if len(log.read_text().splitlines()) == calls:
            raise OSError("the disk is gone")
        return sr.FM(SCHEMA, dim=4, init=params["lr"])

    def search(store: str) -> Any:
        space = {"lr": dask.Real(0.01, 1.0)}
        return dask.search(client, space, rows, make=make, store=tmp_path / store, halving=NINE, points=points)

    with pytest.raises(OSError, match="the disk is gone"):
        search("one")
    before = len(log.read_text().splitlines())
    found = search("one")
    after = len(log.read_text().splitlines())
    # of those in flight when it broke, two at most were lost
    assert after - before <= 13 - (calls - 1) + 2 and after - before >= 13 - calls
    assert told(found) == told(search("two"))
    assert told(search("one")) == told(found) and len(log.read_text().splitlines()) == after + 13  # it only tells
    assert sr.Store(tmp_path / "one").versions.latest().number == 1  # type: ignore[union-attr]


def test_what_never_ends_is_a_clear_error(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    flag = tmp_path / "end"

    def make(params: Any) -> Any:
        while not flag.exists():
            time.sleep(0.01)
        raise ValueError

    try:
        with pytest.raises(dask.ClusterError, match=r"no task has ended in 1 s, with \d workers"):
            dask.search(client, {"n": dask.Whole(1, 2)}, rows, make=make, store=tmp_path, halving=NINE, timeout=1.0)
    finally:
        flag.touch()


def test_a_lost_scheduler_is_a_clear_error_and_the_search_goes_on_elsewhere(
    client: Any, rows: sr.EncodedRows, tmp_path: Path
) -> None:
    where = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen([*command, "--no-dashboard", "--scheduler-file", str(where)], **quiet)
    worker = None
    try:
        while not where.exists():
            assert scheduler.poll() is None
            time.sleep(0.05)
        command = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(where), "--no-nanny"]
        worker = subprocess.Popen([*command, "--nthreads", "1", "--no-dashboard", "--death-timeout", "300"], **quiet)
        started = tmp_path / "started"

        def make(params: Any) -> Any:
            if params["n"] > 2 and multiprocessing.parent_process() is None:  # on that worker alone
                started.touch()
                time.sleep(600)
            return sr.FM(SCHEMA, dim=4, init=params["n"] / 100)

        def kill() -> None:
            while not started.exists():
                time.sleep(0.05)
            scheduler.kill()

        space = {"n": dask.Whole(0, 4)}
        killer = threading.Thread(target=kill)
        killer.start()
        with distributed.Client(scheduler_file=str(where), set_as_default=False) as lost:
            lost.wait_for_workers(1, timeout=300)
            with pytest.raises(dask.ClusterError, match="the scheduler is lost"):
                dask.search(lost, space, rows, make=make, store=tmp_path / "one", halving=NINE, timeout=300.0)
        killer.join()
    finally:
        for process in (scheduler, worker):
            if process is not None:
                process.kill()
                process.wait()
    found = dask.search(client, space, rows, make=make, store=tmp_path / "one", halving=NINE)
    assert told(found) == told(dask.search(client, space, rows, make=make, store=tmp_path / "two", halving=NINE))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_search_refuses(client: Any, rows: sr.EncodedRows, tmp_path: Path) -> None:
    def search(space: Any = SPACE, **changed: Any) -> Any:
        settings = {"store": tmp_path, "halving": dask.Halving(2, rounds=1), **changed}
        return dask.search(client, space, rows, **settings)

    for space, message in (
        ({}, "space must name what to search in"),
        ({"dim": 5}, "'dim' must be a Real, Whole or Choice, got 5"),
        ({"dimension": dask.Whole(1, 2)}, "an FM has no 'dimension' to search in"),
    ):
        with pytest.raises(sr.ConfigError, match=message):
            search(space)
    with pytest.raises(sr.ConfigError, match="validation must be a share"):
        search(validation=0.0)
    with pytest.raises(sr.StoreError, match="there is no data set"):
        dask.search(client, SPACE, str(tmp_path / "none"), store=tmp_path)
    with pytest.raises(sr.ConfigError, match=r"no trial is left to choose: 2 .* Adagrad has no beta"):
        search({"optimizer.beta": dask.Real(0.0, 1.0)}, store=tmp_path / "none")
    search()
    with pytest.raises(sr.ConfigError, match=r"holds another search: halving was .*trials=2.* and is .*trials=3"):
        search(halving=dask.Halving(3, rounds=1))
    (tmp_path / "search" / "search.json").write_bytes(b"{}")
    with pytest.raises(sr.DamagedError, match="is damaged"):
        search()
    (tmp_path / "search" / "search.json").unlink()
    with pytest.raises(sr.ConfigError, match="holds what a trainer has left"):
        search()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dask.Real(1.0, 0.0), "low must not be above high"),
        (lambda: dask.Real(0.0, math.inf), "both finite"),
        (lambda: dask.Real(0.0, 1.0, log=True), "low must be > 0"),
        (lambda: dask.Whole(1.5, 2), "Whole takes whole numbers, got 1.5"),
        (lambda: dask.Choice(()), "Choice takes a tuple of one value or more"),
        (lambda: dask.Choice("abc"), "Choice takes a tuple"),
        (lambda: dask.RandomPoints(seed=-1), "seed must be >= 0"),
        (lambda: dask.Halving(0), "trials must be a whole number >= 1"),
        (lambda: dask.Halving(factor=1), "factor must be a whole number >= 2"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, message: str) -> None:
    with pytest.raises(sr.ConfigError, match=message):
        make()


def test_values_are_drawn_evenly() -> None:
    rng = np.random.default_rng(0)
    for one in (dask.Whole(1, 8), dask.Choice((*range(1, 9),))):
        counts = np.bincount([one.draw(rng) for _ in range(8000)], minlength=9)[1:]
        assert counts.sum() == 8000 and counts.min() > 850
    in_log = np.array([dask.Real(1e-4, 1.0, log=True).draw(rng) for _ in range(4000)])
    assert np.histogram(np.log10(in_log), bins=4, range=(-4, 0))[0].min() > 900
    whole = np.bincount([dask.Whole(1, 7, log=True).draw(rng) for _ in range(9000)], minlength=8)
    assert whole[1] == pytest.approx(3000, rel=0.1)  # log 2 / log 8
    assert whole[4:].sum() == pytest.approx(3000, rel=0.1)
