"""What comes from a cluster is what one process makes: with real processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.events import DeadLetter, decode_event, encode_event
from streamrec.preprocessors import Validate
from streamrec.storage.encoded import commit_rows, write_part
from tests.adapters.killing import kill_worker
from tests.trainers.conftest import LATENESS, WINDOWS, Schema, make_stream

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("streamrec.adapters.dask")


def parts() -> dict[str, Any]:
    join = sr.LabelJoin(windows=WINDOWS, lateness=LATENESS)
    return {"preprocessors": [sr.Dedup(ttl=150.0, capacity=10_000), sr.Filter(popular)], "join": join}


def popular(event: Any) -> bool:
    return getattr(event, "item", "") != "p7"


def lines(stream: list[Any]) -> list[bytes]:
    """As JSON lines, what cannot be written as one that cannot be read."""
    written = []
    for one in stream:
        try:
            written.append(encode_event(one) if not isinstance(one, DeadLetter) else b"{broken")
        except TypeError:
            written.append(b"null")
    return written


def write(folder: Path, stream: list[Any], files: int) -> str:
    """Cut anywhere, some files empty."""
    rng = random.Random(files)
    cuts = sorted(rng.randrange(len(stream)) for _ in range(files - 1))
    written = lines(stream)
    for n, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(stream)], strict=True)):
        (folder / f"{n:03d}.jsonl").write_bytes(b"".join(line + b"\n" for line in written[begin:end]))
    return str(folder / "*.jsonl")


def whole(source: Any) -> tuple[LabeledRows, dict[str, int]]:
    rows = sr.JoinedEvents(source, schema=Schema, **parts())
    read = []
    while (part := rows.read(1000)) is not None:
        read.append(part)
    return LabeledRows.concatenated(read), {name: n for name, n in rows.counts.items() if n}


def assert_equal(found: LabeledRows, expected: LabeledRows) -> None:
    one, other = found.batch.compact(), expected.batch.compact()
    for name in ("times", "ids", "values", "fields", "starts", "ends"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.weights, expected.weights)
    for row in range(len(one)):
        texts = [[b.texts[ref] if ref >= 0 else None for ref in b.text_refs[row]] for b in (one, other)]
        assert texts[0] == texts[1]


# -- prepare -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_parts_joined_are_the_whole(client: Any, tmp_path: Path, seed: int) -> None:
    archive = write(tmp_path, make_stream(seed, 500), files=7 + seed)
    expected, counts = whole(sr.JsonLines(archive))
    rows = dask.prepare(client, archive, str(tmp_path / "out"), schema=Schema, parts=5, piece=4000, **parts())
    found = rows.read(10**6)
    assert found is not None
    assert_equal(found, expected)
    assert {name: n for name, n in rows.counts.items() if n} == counts
    assert counts["malformed"] and counts["duplicate"] and counts["filtered"] and counts["late_impression"]


def test_an_event_that_cannot_be_used_does_not_move_the_edges(client: Any, tmp_path: Path) -> None:
    stream = lines(make_stream(2, 500, messy=False))
    ahead = msgspec.json.decode(stream[-1])["time"] + 5 * 86_400.0  # its time alone looks as if it could be used
    stream.insert(150, b'{"type":"feedback","id":"","impression_id":"i1","time":%f}' % ahead)
    (tmp_path / "all.jsonl").write_bytes(b"\n".join(stream))
    archive = str(tmp_path / "all.jsonl")
    expected, counts = whole(sr.JsonLines(archive))
    rows = dask.prepare(client, archive, str(tmp_path / "out"), schema=Schema, parts=6, piece=3000, **parts())
    found = rows.read(10**6)
    assert found is not None
    assert_equal(found, expected)
    assert {name: n for name, n in rows.counts.items() if n} == counts
    assert len([*(tmp_path / "out" / "rows").glob("*.parquet")]) == len(rows.parts)


def test_without_enough_overlap_the_edges_are_wrong(client: Any, tmp_path: Path) -> None:
    archive = write(tmp_path, make_stream(0, 300), files=7)
    expected, _ = whole(sr.JsonLines(archive))
    rows = dask.prepare(
        client, archive, str(tmp_path / "out"), schema=Schema, parts=10, piece=3000, overlap=0.0, **parts()
    )
    found = rows.read(10**6)
    assert found is not None
    assert len(rows) != len(expected.labels) or not np.array_equal(found.labels, expected.labels)


def test_bags_of_events_of_mappings_and_of_lines(client: Any, tmp_path: Path) -> None:
    bag = pytest.importorskip("dask.bag")
    good = [one for one in make_stream(3, 300, messy=False) if not isinstance(one, DeadLetter)]
    expected, _ = whole(sr.Memory(good))
    for n, items in enumerate((good, [msgspec.json.decode(encode_event(one)) for one in good], lines(good))):
        archive = bag.from_sequence(items, npartitions=6)
        rows = dask.prepare(client, archive, f"{tmp_path}/{n}", schema=Schema, parts=4, **parts())
        found = rows.read(10**6)
        assert found is not None
        assert_equal(found, expected)


def with_feature_columns(good: list[Any]) -> list[dict[str, Any]]:
    """The events as rows, a feature a column; the sixth is of no type there is."""
    plain = [msgspec.json.decode(encode_event(one)) for one in good]
    columns = [{**{k: v for k, v in one.items() if k != "features"}, **one.get("features", {})} for one in plain]
    columns[5] = {**columns[5], "type": "nothing"}
    return columns


def assert_all_but_the_sixth(rows: sr.EncodedRows, good: list[Any]) -> None:
    """What `prepare` made of such rows is what one process makes of the events without the sixth, which is counted."""
    assert rows.counts["malformed"] == 1 and rows.counts["events"] == len(good)
    expected, _ = whole(sr.Memory([*good[:5], *good[6:]]))
    found = rows.read(10**6)
    assert found is not None
    assert_equal(found, expected)


def test_parquet_of_events_with_features_as_columns(client: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    good = [one for one in make_stream(3, 300, messy=False, labeled=0.0) if not isinstance(one, DeadLetter)]
    columns = with_feature_columns(good)
    table = pyarrow.Table.from_pylist(
        columns,
        schema=pyarrow.unify_schemas(
            [pyarrow.Table.from_pylist([one]).schema for one in columns], promote_options="permissive"
        ),
    )
    parquet.write_table(table, tmp_path / "events.parquet", row_group_size=60)
    rows = dask.prepare(client, str(tmp_path / "events.parquet"), str(tmp_path), schema=Schema, parts=3, **parts())
    assert_all_but_the_sixth(rows, good)


def test_a_dataframe_is_an_archive(client: Any, tmp_path: Path) -> None:
    frames = pytest.importorskip("dask.dataframe")
    pandas = pytest.importorskip("pandas")
    good = [one for one in make_stream(3, 300, messy=False, labeled=0.0) if not isinstance(one, DeadLetter)]
    columns = with_feature_columns(good)
    frame = pandas.DataFrame(columns)  # where nothing is, it has nan
    with pytest.importorskip("dask").config.set({"dataframe.convert-string": False}):  # else of lists, too
        archive = frames.from_pandas(frame, npartitions=5, sort=False)
        rows = dask.prepare(client, archive, str(tmp_path), schema=Schema, parts=3, **parts())
    assert_all_but_the_sixth(rows, good)


def test_what_prepare_refuses(client: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(sr.SourceError, match="nothing in"):
        dask.prepare(client, str(tmp_path / "*.jsonl"), out, schema=Schema)
    with pytest.raises(sr.SourceError, match="cannot read"):
        dask.prepare(client, str(tmp_path / "none.jsonl"), out, schema=Schema)
    with pytest.raises(sr.ConfigError, match="must be a URI"):
        dask.prepare(client, [5], out, schema=Schema)
    with pytest.raises(sr.ConfigError, match="nobody knows how far back Validate remembers"):
        dask.prepare(client, out, out, schema=Schema, preprocessors=[Validate()])
    with pytest.raises(sr.ConfigError, match="overlap must be"):
        dask.prepare(client, out, out, schema=Schema, overlap=-1.0)
    with pytest.raises(sr.ConfigError, match="must be the distributed"):
        dask.prepare("localhost", out, out, schema=Schema)


# -- evaluate and score ------------------------------------------------------------------------------------------------


def trained(folder: Path) -> tuple[sr.FM, sr.EncodedRows]:
    uri = str(folder)
    examples = make_stream(1, 600, messy=False, labeled=1.0, kinds=["click"])
    rows = sr.JoinedEvents(sr.Memory(examples), schema=Schema)
    written = []
    while (part := rows.read(97)) is not None:
        written.append(write_part(uri, f"part-{len(written)}", [part]))
    commit_rows(uri, Schema, written)
    model = sr.FM(Schema, dim=4)
    sr.BatchTrainer(model=model, store=uri).run(sr.EncodedRows(uri))
    return model, sr.EncodedRows(uri)


METRICS = [sr.AUC(), sr.LogLoss(), sr.NormalizedEntropy(), sr.Calibration(), sr.CTR()]


def judged(model: Any, rows: sr.EncodedRows) -> dict[str, float]:
    part = rows.read(10**6)
    assert part is not None
    found = {}
    for metric in METRICS:
        one = metric.fresh()
        one.update(part.labels, model.predict(part.batch), part.weights)
        found[one.name] = one.compute()
    return found


@pytest.mark.parametrize("kind", ["object", "store"])
def test_metrics_are_those_of_one_pass(client: Any, tmp_path: Path, kind: str) -> None:
    model, rows = trained(tmp_path)
    report = dask.evaluate(client, model if kind == "object" else str(tmp_path), str(tmp_path), metrics=METRICS)
    assert report.metrics == pytest.approx(judged(model, rows), rel=1e-12) and report.counts["events"] == len(rows)
    some = [1, len(rows.parts) - 1]
    report = dask.evaluate(client, model, rows.only(some), metrics=METRICS)
    assert report.metrics == pytest.approx(judged(model, rows.only(some)), rel=1e-12)
    assert report.counts["events"] == sum(rows.parts[place].rows for place in some)
    with pytest.raises(sr.ConfigError, match="must name one"):
        dask.evaluate(client, model, rows, metrics=[])
    with pytest.raises(sr.StoreError, match="nothing is published"):
        dask.evaluate(client, str(tmp_path / "none"), rows, metrics=METRICS)
    with pytest.raises(sr.SchemaError, match="differs from that of the rows"):
        dask.evaluate(client, sr.FM(sr.Schema(sr.Id("user"))), rows, metrics=METRICS)


@pytest.mark.parametrize("kind", ["object", "store"])
def test_scores_are_those_of_a_scorer(client: Any, tmp_path: Path, kind: str) -> None:
    from pyarrow import parquet

    model, _ = trained(tmp_path)
    catalogue = [sr.Candidate(f"p{n}", {"genres": ["abc"[n % 3]]}) for n in range(20)]
    users = [dask.User(f"u{n}", {"age": 20 + n}) if n % 2 else f"u{n}" for n in range(25)]
    files = dask.score(
        client,
        model if kind == "object" else sr.Store(str(tmp_path)),
        users,
        str(tmp_path),
        catalogue=catalogue,
        k=3,
        at_once=4,
    )
    assert len(files) == 7
    found = [row for name in files for row in parquet.read_table(name).to_pylist()]
    scorer = sr.Scorer(str(tmp_path))
    scorer.set_catalogue(catalogue)
    expected = []
    for one in users:
        user = dask.User(one) if isinstance(one, str) else one
        ranked = scorer.retrieve(user=user.name, k=3, features=user.features)
        for n, (item, score) in enumerate(ranked):
            expected.append({"user": user.name, "rank": n + 1, "item": item, "score": score})
    assert found == expected
    dask.score(client, model, users[:3], str(tmp_path), catalogue=catalogue, k=None)
    assert len([*(tmp_path / "scores").glob("*.parquet")]) == 1
    with pytest.raises(sr.ConfigError, match="k must be >= 1"):
        dask.score(client, model, users, str(tmp_path), catalogue=catalogue, k=0)


# -- failures ----------------------------------------------------------------------------------------------------------


class Deadly(dict[str, Any]):
    """Features that kill the worker which unpacks them. Neither client nor scheduler may: they only hand them on."""

    def __reduce__(self) -> Any:
        return _unpacked, (self["flag"],)


def _unpacked(flag: str) -> dict[str, Any]:
    assert multiprocessing.parent_process() is not None, "unpacked where no worker is"
    kill_worker(flag)
    return {}


class Mortal:
    """A model that takes its worker along."""

    def __init__(self, model: sr.FM, flag: str) -> None:
        self.model, self.flag, self.schema = model, flag, model.schema

    def predict(self, batch: sr.Batch) -> Any:
        kill_worker(self.flag)
        return self.model.predict(batch)


def test_a_worker_killed_in_prepare(client: Any, tmp_path: Path) -> None:
    archive = write(tmp_path, make_stream(2, 300), files=6)
    expected, counts = whole(sr.JsonLines(archive))
    flag = str(tmp_path / "flag")

    def decode(line: bytes) -> Any:
        if b"i200" in line:
            kill_worker(flag)
        return decode_event(line)

    rows = dask.prepare(client, archive, str(tmp_path / "out"), schema=Schema, parts=3, decode=decode, **parts())
    assert os.path.exists(flag)
    found = rows.read(10**6)
    assert found is not None
    assert_equal(found, expected)
    assert {name: n for name, n in rows.counts.items() if n} == counts
    assert len([*(tmp_path / "out" / "rows").glob("*.parquet")]) == len(rows.parts)


def test_a_worker_killed_in_evaluate(client: Any, tmp_path: Path) -> None:
    model, rows = trained(tmp_path)
    flag = str(tmp_path / "flag")
    report = dask.evaluate(client, Mortal(model, flag), rows, metrics=METRICS)
    assert os.path.exists(flag) and report.metrics == pytest.approx(judged(model, rows), rel=1e-12)


def test_a_worker_killed_in_score(client: Any, tmp_path: Path) -> None:
    from pyarrow import parquet

    trained(tmp_path)
    flag = str(tmp_path / "flag")
    users = [dask.User(f"u{n}", Deadly(flag=flag) if n == 5 else {}) for n in range(12)]
    files = dask.score(client, str(tmp_path), users, str(tmp_path), catalogue=["p1", "p2"], at_once=2, k=1)
    assert os.path.exists(flag)
    assert [row["user"] for name in files for row in parquet.read_table(name).to_pylist()] == [u.name for u in users]


def test_a_task_that_always_kills_is_a_clear_error(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)  # each death takes seconds
    archive = write(tmp_path, make_stream(2, 50), files=1)

    def decode(line: bytes) -> Any:
        kill_worker()

    with pytest.raises(dask.ClusterError, match="workers died again and again"):
        dask.prepare(client, archive, str(tmp_path / "out"), schema=Schema, decode=decode)
    assert not (tmp_path / "out").exists()


def test_a_task_that_never_ends_is_a_clear_error(client: Any, tmp_path: Path) -> None:
    archive = write(tmp_path, make_stream(2, 50), files=1)
    flag = tmp_path / "end"

    def decode(line: bytes) -> Any:
        while not flag.exists():
            time.sleep(0.01)
        raise ValueError

    try:
        with pytest.raises(dask.ClusterError, match=r"no task has ended in 1 s, with \d workers"):
            dask.prepare(client, archive, str(tmp_path / "out"), schema=Schema, decode=decode, timeout=1.0)
    finally:
        flag.touch()


def test_a_lost_scheduler_and_one_without_workers_are_clear_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "scheduler.json"
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen(
        [*command, "--no-dashboard", "--scheduler-file", str(where)],
        stdout=quiet,
        stderr=quiet,
    )
    try:
        while not where.exists():
            assert scheduler.poll() is None
            time.sleep(0.05)
        with distributed.Client(scheduler_file=str(where), set_as_default=False) as client:
            archive = write(tmp_path, make_stream(2, 50), files=1)
            with monkeypatch.context() as patched:
                patched.setattr("streamrec.adapters.dask._cluster.NOBODY", 0.5)
                with pytest.raises(dask.ClusterError, match="the cluster has had no worker"):
                    dask.prepare(client, archive, str(tmp_path / "out"), schema=Schema)
            (model, rows), out = trained(tmp_path), str(tmp_path / "out")
            with ThreadPoolExecutor() as threads:
                waiting = [
                    threads.submit(dask.score, client, model, ["u1"], out, catalogue=["p1"], timeout=60.0),
                    threads.submit(dask.evaluate, client, model, rows, metrics=METRICS, timeout=60.0),
                    threads.submit(dask.prepare, client, archive, out, schema=Schema, timeout=60.0),
                ]
                killer = threading.Timer(1.0, scheduler.kill)  # nobody works there: the tasks wait
                killer.start()
                for one in waiting:
                    with pytest.raises(dask.ClusterError, match="the scheduler is lost"):
                        one.result()
                killer.join()
    finally:
        scheduler.kill()
        scheduler.wait()
