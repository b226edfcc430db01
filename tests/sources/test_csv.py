"""Rows of comma-separated values as events."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.events import DeadLetter, Item
from streamrec.sources import Csv
from streamrec.testing import check_source


def rest(source: Csv, limit: int = 100) -> list[Item]:
    items: list[Item] = []
    while more := source.read(limit):
        items += more
    source.close()
    return items


@pytest.mark.parametrize("chunk", [1, 9, 1 << 20])
def test_contract(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Csv, "_chunk", chunk)
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbftype,time,id,user,item,impression_id,genres,price,title\r\n"
        b'impression,1.5,i1,u1,p1,,a|b,9.5,"Say ""hi"",\nand go"\r\n'
        b"feedback,2.5,f1,,,i1,,,\r\n\r\n"
        b"purchase,2.5,f1,,,i1,,,\r\n"
        b"impression,1.5,i1\r\n"
        b"impression,noon,i1,u1,p1,,,,\r\n"
        b"impression,nan,i1,u1,p1,,,,\r\n"
        b"impression,3,i2,u1,,,,,\r\n"
        b"impression,3,i2,u1,p1,,,cheap,\r\n"
        b"impression,1970-01-01T00:00:03Z,\xff,u1,p1,,,,\r\n"
        b"impression,1970-01-01T00:00:04,i3,u1,p1,,,0,"
    )
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"time,id,impression_id,value\n5,f2,i3,1.25\n"))
    (tmp_path / "c.csv").write_bytes(b"")

    def new() -> Csv:
        return Csv(tmp_path / "a.csv", numbers=["price"], lists={"genres": "|"})

    check_source(new)
    check_source(lambda: Csv(tmp_path / "*"))
    items = rest(new())
    features = {"genres": ["a", "b"], "price": 9.5, "title": 'Say "hi",\nand go'}
    assert [item for item in items if not isinstance(item, DeadLetter)] == [
        sr.Impression("i1", 1.5, "u1", "p1", features),
        sr.Feedback("f1", "i1", 2.5),
        sr.Impression("i3", 4.0, "u1", "p1", {"price": 0.0}),
    ]
    letters = [item for item in items if isinstance(item, DeadLetter)]
    words = ["purchase", "3 values for 9 columns", "noon", "nan", "item is missing", "cheap", "utf-8"]
    assert len(letters) == len(words)
    for letter, word in zip(letters, words, strict=True):
        assert letter.reason.startswith("malformed: ") and word in letter.reason.replace("'nan'", "nan")
    assert rest(Csv(tmp_path / "*"))[-1] == sr.Feedback("f2", "i3", 5.0, "click", 1.25)
    assert rest(Csv(tmp_path / "c.csv")) == []


def test_the_users_own_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("when\twho\tsku\trow\tclicked\tcolor\tsecret\n1700000000250\tu1\tp1\t17\t1\tred\tx\n")
    columns = {"time": "when", "user": "who", "item": "sku", "id": "row", "label": "clicked"}
    items = rest(Csv(path, columns=columns, features=["color"], time_unit="ms", delimiter="\t"))
    assert items == [sr.Labeled(sr.Impression("17", 1_700_000_000.25, "u1", "p1", {"color": "red"}), 1.0)]


cell = st.text(st.sampled_from('ab,"\n\r é'), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cell, cell), max_size=12), st.sampled_from([1, 6, 1000]), st.integers(1, 5))
def test_whatever_is_in_a_cell_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], chunk: int, limit: int
) -> None:
    import csv

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["time", "id", "user", "item", "x", "y"])
        writer.writerows([[n, f"i{n}", "u", "p", *cells] for n, cells in enumerate(rows)])

    class Small(Csv):
        _chunk = chunk

    found = rest(Small(path), limit)
    expected = [
        sr.Impression(f"i{n}", float(n), "u", "p", {k: v for k, v in (("x", x), ("y", y)) if v})
        for n, (x, y) in enumerate(rows)
    ]
    assert found == expected


def test_a_quote_that_nobody_closed_spoils_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamrec.sources.csv._MAX_RECORD", 60)
    path = tmp_path / "a.csv"
    rows = "".join(f"{n},f{n},i{n}\n" for n in range(2, 40))
    path.write_text('time,id,impression_id\n1,"f1,i1\n' + rows)
    letter, *items = rest(Csv(path))
    assert isinstance(letter, DeadLetter) and letter.raw == b'1,"f1,i1'
    assert items == [sr.Feedback(f"f{n}", f"i{n}", float(n)) for n in range(2, 40)]


def test_what_it_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("time,user,item\n1,u,p\n")
    with pytest.raises(sr.SourceError, match='no column "id"'):
        Csv(path).read(1)
    path.write_text("time,id,user,item\n1,i,u,p\n")
    with pytest.raises(sr.SourceError, match="no feature 'price'"):
        Csv(path, numbers=["price"]).read(1)
    with pytest.raises(sr.ConfigError, match="delimiter must"):
        Csv(path, delimiter='"')
    with pytest.raises(sr.ConfigError, match="in a list"):
        Csv(path, numbers="price")
    with pytest.raises(sr.SourceError, match="no position"):
        Csv(path).seek({"index": 0})
