"""Rows of Parquet files as events: in event-time order, resumable, whatever the columns are called."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec._event_columns import table_of
from streamrec.events import DeadLetter, Decoded, Item
from streamrec.sources import Parquet
from streamrec.testing import check_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def mixed(first: int, end: int) -> list[Any]:
    """Events of all kinds, one a second."""
    events: list[Any] = []
    for n in range(first, end):
        features = {"genres": ["a", "b"][: n % 3], "price": n / 3, "nested": {"x": [n, None]}} if n % 4 else {}
        shown = sr.Impression(f"i{n}", float(n), f"u{n % 5}", f"p{n % 7}", features, None if n % 2 else 0.25)
        click = sr.Feedback(f"f{n}", f"i{n - 1}", float(n), "buy" if n % 5 == 0 else "click", 9.5 if n % 2 else None)
        events.append((shown, click, sr.Labeled(shown, n % 2 / 2, "click", 2.0))[n % 3])
    return events


def write(path: Path, events: list[Any], rows: int = 1_000_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(events), path, row_group_size=rows)


def rest(source: Parquet, limit: int = 1_000) -> list[Item]:
    items: list[Item] = []
    while more := source.read(limit):
        items += more
    return items


def test_the_default_layout_gives_back_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", mixed(0, 60), rows=16)
    source = Parquet(str(tmp_path / "a.parquet"))
    assert len(source) == 60 and source.fraction() == 0.0
    assert rest(source, 7) == mixed(0, 60) and source.fraction() == 1.0
    check_source(lambda: Parquet(str(tmp_path / "a.parquet")))


def test_features_in_a_struct_or_a_map_are_those_of_a_json_object(tmp_path: Path) -> None:
    told = [{"a": "x", "n": 0.5}, {"n": 1.5}, {}]
    shown: list[Any] = [
        sr.Impression(f"i{n}", float(n), "u", "p", {**one, "page": "home"}) for n, one in enumerate(told)
    ]
    table = table_of([sr.Impression(f"i{n}", float(n), "u", "p") for n in range(3)]).drop_columns(["features"])
    table = table.append_column("page", pa.array(["home"] * 3))
    struct = pa.array([*told[:2], None], pa.struct([("a", pa.string()), ("n", pa.float64())]))
    pq.write_table(table.append_column("features", struct), tmp_path / "struct.parquet")
    assert rest(Parquet(str(tmp_path / "struct.parquet"))) == shown
    weights = [[("a", 0.5)], [("b", None), ("c", 2.0)], None]
    pairs = pa.array(weights, pa.map_(pa.string(), pa.float64()))
    pq.write_table(table.append_column("features", pairs), tmp_path / "map.parquet")
    found: list[Any] = rest(Parquet(str(tmp_path / "map.parquet")))
    assert [one.features for one in found] == [{"a": 0.5, "page": "home"}, {"c": 2.0, "page": "home"}, {"page": "home"}]


def test_contract_over_a_partitioned_data_set_with_bad_rows(tmp_path: Path) -> None:
    events = mixed(0, 80)
    for hour in range(4):
        part = events[20 * hour : 20 * hour + 20]
        folder = tmp_path / "date=2026-01-01" / f"hour={3 - hour}"  # by name, the latest is first
        write(folder / "one.parquet", part[::2], rows=4)
        write(folder / "two.parquet", part[1::2], rows=7)
    (tmp_path / "_SUCCESS").write_bytes(b"")
    write(tmp_path / "_old" / "x.parquet", mixed(0, 5))
    table = table_of([e for e in mixed(200, 240) if isinstance(e, sr.Impression)]).to_pydict()
    for name, row, value in (
        ("time", 1, None), ("id", 2, None), ("user", 3, None), ("type", 4, "purchase"), ("type", 5, None),
        ("features", 6, "[1]"), ("time", 7, math.inf),
    ):  # fmt: skip
        table[name][row] = value
    pq.write_table(pa.table(table), tmp_path / "z.parquet")
    check_source(lambda: Parquet(str(tmp_path)))
    items = rest(Parquet(str(tmp_path)))
    assert items[:80] == events
    bad = [item for item in items if isinstance(item, DeadLetter)]
    assert sorted(item.position["row"] for item in bad) == [1, 2, 3, 4, 5, 6, 7]
    assert {item.position["path"] for item in bad} == {"z.parquet"}
    assert all(item.reason.startswith("malformed: row ") and item.raw for item in bad)
    assert type(Parquet(str(tmp_path)).read(10)) is list  # there are labeled ones, which `Validate` looks at


@settings(max_examples=40, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=4),
    rows=st.integers(1, 4),
    limit=st.integers(1, 9),
)
def test_event_time_order_with_rows_of_one_time_by_file(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], rows: int, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    all_of_them = []
    for number, times in enumerate(files):
        if number % 2:
            times = sorted(times)
        events = [sr.Feedback(f"{number}-{row}", "i", float(time)) for row, time in enumerate(times)]
        write(folder / f"{number}.parquet", events, rows=rows)
        all_of_them += events
    found = rest(Parquet(str(folder)), limit)
    assert [event.time for event in found] == sorted(event.time for event in all_of_them)  # type: ignore[union-attr]
    assert sorted(event.id for event in found) == sorted(event.id for event in all_of_them)  # type: ignore[union-attr]
    as_they_stand = rest(Parquet(str(folder), order="file"), limit)
    assert as_they_stand == all_of_them


def test_the_users_own_columns(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 1, 31, 7, tzinfo=datetime.timezone.utc)
    table = pa.table(
        {
            "ts": pa.array([when, when + datetime.timedelta(seconds=1), None], pa.timestamp("us", tz="Europe/Berlin")),
            "customer": pa.array([17, 18, 19], pa.int64()),
            "sku": pa.array(["p1", "p2", "p3"]).dictionary_encode(),
            "clicked": pa.array([True, False, True]),
            "price": pa.array([9.5, None, 1.0]),
            "genres": pa.array([["a", "b"], None, []]),
            "stock": pa.array([3, 4, 5], pa.int32()),
            "day": pa.array([datetime.date(2026, 1, 31)] * 3),
            "secret": ["x", "y", "z"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    columns = {"time": "ts", "user": "customer", "item": "sku", "label": "clicked"}
    features = ["price", "genres", "stock", "day"]
    letter, *items = rest(Parquet(str(tmp_path / "a.parquet"), columns=columns, features=features))
    assert isinstance(letter, DeadLetter) and "its time is missing" in letter.reason  # without a time it is first
    start, day = when.timestamp(), datetime.datetime(2026, 1, 31, tzinfo=datetime.timezone.utc).timestamp()
    first = sr.Impression(
        "a.parquet:0", start, "17", "p1", {"price": 9.5, "genres": ["a", "b"], "stock": 3, "day": day}
    )
    second = sr.Impression("a.parquet:1", start + 1, "18", "p2", {"stock": 4, "day": day})
    assert items == [sr.Labeled(first, 1.0), sr.Labeled(second, 0.0)]


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 1_000), ("us", 1_000_000), ("ns", 1_000_000_000)])
def test_times_that_are_numbers(tmp_path: Path, unit: str, factor: int) -> None:
    times = [1_700_000_000.25, 1_700_000_001.5]
    columns = {"time": [int(4 * time) * factor // 4 if factor > 1 else time for time in times], "id": ["a", "b"]}
    table = pa.table({**columns, "impression_id": ["i", "i"]})
    pq.write_table(table, tmp_path / "a.parquet")
    items = rest(Parquet(str(tmp_path), time_unit=unit))
    assert items == [sr.Feedback("a", "i", times[0]), sr.Feedback("b", "i", times[1])]


def test_plain_impressions_need_no_second_look(tmp_path: Path) -> None:
    events = [sr.Impression(f"i{n}", float(n), "u", "p", {"x": n / 2, "y": "z"}) for n in range(10)]
    columns = {"id": [e.id for e in events], "time": [e.time for e in events], "user": ["u"] * 10, "item": ["p"] * 10}
    pq.write_table(pa.table({**columns, "x": [n / 2 for n in range(10)], "y": ["z"] * 10}), tmp_path / "a.parquet")
    items = Parquet(str(tmp_path)).read(100)
    assert items == events and type(items) is Decoded
    columns["x"] = [math.nan] * 10  # type: ignore[assignment]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert type(Parquet(str(tmp_path)).read(100)) is list


def test_an_archive_that_grows(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", mixed(100, 110), rows=5)
    source = Parquet(str(tmp_path))
    rest(source)
    end = json.dumps(source.position())
    write(tmp_path / "c.parquet", mixed(120, 130))
    source = Parquet(str(tmp_path))
    source.seek(json.loads(end))
    assert rest(source) == mixed(120, 130)
    write(tmp_path / "a.parquet", mixed(0, 7))  # before what was read
    for _ in range(2):
        source = Parquet(str(tmp_path))
        source.seek(json.loads(end))
        assert source.position() == json.loads(end)
    gap, *items = rest(source, 5)
    assert isinstance(gap, DeadLetter) and gap.reason.startswith("gap: 7 rows were added")
    assert items == mixed(120, 130)
    write(tmp_path / "d.parquet", mixed(105, 109))  # amid what was read together
    source = Parquet(str(tmp_path))
    with pytest.raises(sr.SourceError, match="no longer read together"):
        source.seek(json.loads(end))


def test_any_file_system_and_a_pattern(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, first in (("day-1", 0), ("day-2", 10), ("other", 20)):
        with memory.open(f"/test_parquet/{name}.parquet", "wb") as file:
            pq.write_table(table_of(mixed(first, first + 10)), file)
    assert rest(Parquet("memory://test_parquet")) == mixed(0, 30)
    assert rest(Parquet("memory://test_parquet/day-*.parquet")) == mixed(0, 20)
    source = Parquet("memory://test_parquet/day-2.parquet")
    source.read(3)
    assert source.position()["path"] == "day-2.parquet" and rest(source) == mixed(13, 20)
    memory.rm("/test_parquet", recursive=True)


def test_what_it_refuses(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", mixed(0, 9), rows=3)
    write(tmp_path / "b.parquet", mixed(0, 9), rows=3)
    uri = str(tmp_path)
    for words, settings_ in (
        ("order must", {"order": "size"}),
        ("max_rows must", {"max_rows": 0}),
        ("no field of an event", {"columns": {"customer": "x"}}),
        ("kind must", {"kind": "click"}),
        ("time_unit must", {"time_unit": "h"}),
        ("in a list", {"features": "price"}),
    ):
        with pytest.raises(sr.ConfigError, match=words):
            Parquet(uri, **settings_)  # type: ignore[arg-type]
    for words, settings_ in (
        ("overlap, 6 rows, more than max_rows = 5", {"max_rows": 5}),
        ("has no column 'ts' for 'time'", {"columns": {"time": "ts"}}),
        ("has no column 'price' for a feature", {"features": ["price"]}),
    ):
        with pytest.raises(sr.SourceError, match=words):
            Parquet(uri, **settings_)  # type: ignore[arg-type]
    with pytest.raises(sr.SourceError, match="no file or folder"):
        Parquet(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(sr.SourceError, match="no Parquet file in"):
        Parquet(str(tmp_path / "empty"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(sr.SourceError, match=r"c.parquet' as Parquet"):
        Parquet(uri)
    (tmp_path / "c.parquet").unlink()
    source = Parquet(uri)
    good = dict(source.position())
    for position in ({}, {**good, "row": -1}, {**good, "rows": 2}, {**good, "path": "x"}, {**good, "group": "0"}):
        with pytest.raises(sr.SourceError, match=r"position|no longer"):
            source.seek(position)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(sr.SourceError, match="bring back"):
        source.read(5)
    assert source.position() == good


def test_a_file_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [])
    source = Parquet(str(tmp_path))
    assert rest(source) == [] and source.fraction() is None
    saved = source.position()
    write(tmp_path / "b.parquet", mixed(0, 3))
    source = Parquet(str(tmp_path))
    source.seek(saved)
    assert rest(source) == mixed(0, 3)
