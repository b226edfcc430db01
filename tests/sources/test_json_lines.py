from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamrec.errors import ConfigError, SourceError
from streamrec.events import DeadLetter, Event, Feedback, Impression, Item, encode_event
from streamrec.sources import JsonLines
from streamrec.testing import check_source


def click(n: int) -> Feedback:
    return Feedback(id=f"f{n}", impression_id="i1", time=float(n))


def lines(*numbers: int) -> bytes:
    return b"".join(encode_event(click(n)) + b"\n" for n in numbers)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read_all(source: JsonLines, limit: int = 100) -> list[Item]:
    items: list[Item] = []
    while more := source.read(limit):
        items += more
    source.close()
    return items


def test_a_file_of_events(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(*range(10)))
    with JsonLines(path) as source:
        assert source.read(4) == [click(n) for n in range(4)]
        assert source.position() == {"path": str(path), "offset": len(lines(*range(4)))}
        assert source.read(100) == [click(n) for n in range(4, 10)]
        assert source.position() == {"path": str(path), "offset": path.stat().st_size}
        assert source.read(1) == [] and source.read(1) == []
        assert source.size == path.stat().st_size and source.fraction() == 1.0


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_contract_over_several_files_with_all_that_can_be_wrong(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JsonLines, "_chunk", chunk)
    written(tmp_path / "a.jsonl", b"\n \r\n" + lines(1, 2) + b"{\n\n" + lines(3) + b"\xff\n" + encode_event(click(4)))
    written(tmp_path / "b.jsonl.gz", gzip.compress(lines(5, 6)) + gzip.compress(lines(7) + b'{"type":"feed'))
    written(tmp_path / "c.jsonl", b"")
    written(tmp_path / "c.jsonl.gz", b"")
    written(tmp_path / "d.jsonl.gz", gzip.compress(lines(8, 9) + b'{"half":')[:-12])
    written(tmp_path / "e.jsonl", b"\n\n")
    written(tmp_path / "f.jsonl.gz", b"this is not gzip\n")
    written(tmp_path / "g.jsonl", lines(10).replace(b"\n", b"\r\n") + b"[1]\n\n")
    check_source(lambda: JsonLines(tmp_path / "*"))
    items = read_all(JsonLines(tmp_path / "*"))
    events = [item for item in items if not isinstance(item, DeadLetter)]
    assert events == [click(n) for n in range(1, 11)]
    letters = [item for item in items if isinstance(item, DeadLetter)]
    assert [os.path.basename(letter.position["path"]) for letter in letters] == [
        *["a.jsonl"] * 2, "b.jsonl.gz", "d.jsonl.gz", "f.jsonl.gz", "g.jsonl"
    ]  # fmt: skip
    assert all(letter.reason.startswith("malformed: ") for letter in letters)


BAD = {
    "truncated": (b'{"type":"feedback","id":"f1","impr', "truncated"),
    "wrong type": (b'{"type":"feedback","id":"f1","impression_id":"i1","time":"noon"}', "Expected `float`, got `str`"),
    "missing field": (b'{"type":"feedback","id":"f1","time":1}', "missing required field"),
    "another type": (b'{"type":"purchase"}', "Invalid value 'purchase'"),
    "no object": (b"[]", "Expected `object`"),
    "nan": (b'{"type":"feedback","id":"f1","impression_id":"i1","time":NaN}', "malformed"),
    "infinite": (b'{"type":"feedback","id":"f1","impression_id":"i1","time":1e999}', "out of range"),
    "invalid utf-8": (b'{"type":"feedback","id":"\xff","impression_id":"i1","time":1}', "utf-8"),
    "half a surrogate pair": (b'{"type":"feedback","id":"\\ud800","impression_id":"i1","time":1}', "surrogate"),
    "zeros": (b"\0" * 50, "malformed"),
    "deep": (b'{"type":"impression","features":{"a":' + b"[" * 100_000, "RecursionError"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("newline", [b"\n", b""])
def test_a_bad_line_is_a_dead_letter_in_its_place(tmp_path: Path, name: str, newline: bytes) -> None:
    line, words = BAD[name]
    path = written(tmp_path / "a.jsonl", lines(1) + line + newline + (lines(2) if newline else b""))
    first, letter, *rest = read_all(JsonLines(path))
    assert first == click(1) and rest == ([click(2)] if newline else [])
    assert isinstance(letter, DeadLetter)
    assert letter.position == {"path": str(path), "offset": len(lines(1))}
    assert letter.raw == line
    assert letter.reason.startswith("malformed: ") and words in letter.reason and len(letter.reason) <= 500


def test_a_last_line_without_newline_is_an_event(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(1, 2)[:-1])
    with JsonLines(path) as source:
        assert source.read(100) == [click(1), click(2)]
        assert source.position() == {"path": str(path), "offset": path.stat().st_size}


def test_an_id_of_a_megabyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonLines, "_chunk", 1 << 16)
    long = Feedback(id="x" * 1_000_000, impression_id="i1", time=1.0)
    path = written(tmp_path / "a.jsonl", lines(1) + encode_event(long) + b"\n" + lines(2))
    assert read_all(JsonLines(path)) == [click(1), long, click(2)]
    check_source(lambda: JsonLines(path))


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("id"), ZeroDivisionError(), RuntimeError("x" * 10_000)])
def test_whatever_decode_raises_is_a_dead_letter(tmp_path: Path, error: Exception) -> None:
    def decode(line: bytes) -> Event:
        if line == b"bad":
            raise error
        return click(int(line))

    letter, event = read_all(JsonLines(written(tmp_path / "a", b"bad\n7\n"), decode=decode))
    assert event == click(7)
    assert isinstance(letter, DeadLetter) and letter.raw == b"bad" and letter.reason.startswith("malformed: ")


def test_decode_that_returns_no_event(tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"1\n")
    nothing: Any = lambda line: None  # noqa: E731
    (letter,) = read_all(JsonLines(path, decode=nothing))
    assert isinstance(letter, DeadLetter) and "NoneType, which is no event" in letter.reason


def test_an_interrupted_read_has_not_happened(tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"1\n2\n3\n4\n")
    stop = [b"3"]

    def decode(line: bytes) -> Event:
        if line in stop:
            stop.clear()
            raise KeyboardInterrupt
        return click(int(line))

    with JsonLines(path, decode=decode) as source:
        assert source.read(1) == [click(1)]
        with pytest.raises(KeyboardInterrupt):
            source.read(100)
        assert source.position() == {"path": str(path), "offset": 2}
        assert source.read(100) == [click(2), click(3), click(4)]


def test_globs_are_sorted_by_name_and_literal_names_come_first(tmp_path: Path) -> None:
    for n in (3, 1, 2):
        written(tmp_path / f"part-{n}.jsonl", lines(n))
    written(tmp_path / "part-[1-2].jsonl", lines(9))
    (tmp_path / "part-4.jsonl").mkdir()
    assert read_all(JsonLines(tmp_path / "part-?.jsonl")) == [click(1), click(2), click(3)]
    assert read_all(JsonLines(str(tmp_path / "part-[1-2].jsonl"))) == [click(9)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.jsonl", "no file .*none.jsonl'; check"),
        ("*.jsonl", "no file matches"),
        ("", "is a folder; give"),
    ],
)
def test_a_missing_file_is_told_when_the_source_is_made(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        JsonLines(tmp_path / name)


def test_a_path_that_is_none() -> None:
    path: Any = 5
    with pytest.raises(ConfigError, match="got 5"):
        JsonLines(path)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    path = written(tmp_path / "a", lines(1))
    source = JsonLines(path)
    path.unlink()
    with pytest.raises(SourceError, match="cannot read"):
        source.read(1)


@pytest.mark.parametrize("packed", [False, True])
def test_seek_refuses_what_is_not_in_the_files(tmp_path: Path, packed: bool) -> None:
    content = lines(1, 2)
    path = written(tmp_path / ("a.gz" if packed else "a"), gzip.compress(content) if packed else content)
    with JsonLines(path) as source:
        source.read(1)
        stood = source.position()
        positions: list[tuple[dict[str, Any], str]] = [
            ({"path": str(path), "offset": len(content) + 1}, "ends at byte"),
            ({"path": str(tmp_path / "0"), "offset": 0}, "not among"),
            ({"path": str(tmp_path / "z"), "offset": 0}, "not among"),
            ({"path": str(path), "offset": -1}, "no position"),
            ({"path": str(path), "offset": 1.0}, "no position"),
            ({"path": str(path)}, "no position"),
            ({"index": 3}, "no position"),
        ]
        for position, words in positions:
            with pytest.raises(SourceError, match=words):
                source.seek(position)
        assert source.position() == stood
        assert source.read(9) == [click(2)]  # a refused seek changes nothing
        source.seek({"path": str(path), "offset": len(content)})
        assert source.read(9) == []


def test_a_file_that_grew_goes_on_where_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "a", lines(1))
    with JsonLines(path) as source:
        assert source.read(9) == [click(1)] and source.read(9) == []
        end = source.position()
    with path.open("ab") as more:
        more.write(lines(2))
    with JsonLines(path) as source:
        source.seek(end)
        assert source.read(9) == [click(2)]


def test_close_keeps_the_position(tmp_path: Path) -> None:
    written(tmp_path / "a", lines(1, 2))
    written(tmp_path / "b", lines(3))
    source = JsonLines(tmp_path / "*")
    assert source.read(1) == [click(1)]
    source.close()
    source.close()
    assert source.read(9) == [click(2), click(3)]
    source.read(1)
    source.close()


def test_a_source_that_nobody_closed_warns_of_nothing(tmp_path: Path) -> None:
    source = JsonLines(written(tmp_path / "a", lines(1, 2)))
    source.read(1)
    del source  # pytest turns a ResourceWarning into an error


def test_gzip_members_and_padding(tmp_path: Path) -> None:
    content = gzip.compress(lines(1)) + b"\0" * 70_000 + gzip.compress(b"") + gzip.compress(lines(2)) + b"\0" * 3
    path = written(tmp_path / "a.gz", content)
    assert read_all(JsonLines(path)) == [click(1), click(2)]
    with JsonLines(path) as source:
        source.read(9)
        source.read(9)
        assert source.fraction() == 1.0


def noisy(count: int) -> bytes:
    """Lines that do not compress to next to nothing."""
    ids = (os.urandom(32).hex() for _ in range(count))
    return b"".join(encode_event(Feedback(id=id, impression_id="i1", time=1.0)) + b"\n" for id in ids)


@pytest.mark.parametrize("harm", ["truncated", "garbled", "checksum", "garbage behind", "zeros"])
def test_damaged_gzip_is_read_up_to_the_damage(tmp_path: Path, harm: str) -> None:
    content = noisy(2000)
    packed = bytearray(gzip.compress(content))
    if harm == "truncated":
        del packed[len(packed) // 2 :]
    elif harm == "garbled":
        middle = len(packed) // 2
        packed[middle : middle + 200] = b"\xff" * 200
    elif harm == "checksum":
        packed[-8] ^= 0xFF
    elif harm == "zeros":
        packed[:] = b"\0" * len(packed)
    else:
        packed += b"not gzip"
    path = written(tmp_path / "a.gz", bytes(packed))
    written(tmp_path / "b.gz", gzip.compress(lines(5)))

    *items, last = read_all(JsonLines(tmp_path / "*.gz"))
    assert last == click(5)
    events = [item for item in items if not isinstance(item, DeadLetter)]
    letters = [item for item in items if isinstance(item, DeadLetter)]
    assert f"damaged gzip file '{path}'" in letters[-1].reason and letters[-1] is items[-1]
    assert letters[-1].position["path"] == str(path)
    if harm == "zeros":
        assert events == [] and letters[-1].position["offset"] == 0
    elif harm in ("checksum", "garbage behind"):
        assert len(events) == 2000 and letters[-1].position["offset"] == len(content)
    else:
        assert 900 < len(events) < 1100  # about half: nothing readable was lost
        good = b"".join(encode_event(event) + b"\n" for event in events)
        assert content.startswith(good[: len(good) // 2])
        read = letters[-1].position["offset"]
        if harm == "truncated":
            assert read == len(good) and content[read:].startswith(letters[-1].raw) and letters[-1].raw

    # behind the damage there is a position, which is not behind the file's end
    with JsonLines(path) as source:
        while source.read(100):
            pass
        end = source.position()
        source.seek(end)
        assert source.read(1) == [] and source.fraction() == 1.0
        with pytest.raises(SourceError, match="ends at byte"):
            source.seek({**end, "offset": end["offset"] + 1})


def test_fraction_grows_over_files(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", lines(1))
    written(tmp_path / "b.jsonl", lines(2))
    with JsonLines(tmp_path / "*") as source:
        shares = [source.fraction()]
        while source.read(1):
            shares.append(source.fraction())
        assert shares == [0.0, 0.5, 1.0]
    written(tmp_path / "c", b"")
    assert JsonLines(tmp_path / "c").fraction() is None


def test_memory_is_bounded_by_chunk_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonLines, "_chunk", 1 << 14)
    line = encode_event(Impression(id="i", time=1.0, user="u" * 80, item="p"))
    path = written(tmp_path / "a.gz", gzip.compress((line + b"\n") * 20_000))  # 3 MB, and 1000 times smaller packed
    with JsonLines(path) as source:
        tracemalloc.start()
        while source.read(50):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 500_000


piece = st.sampled_from(
    [b"\n", b" \n", b"{\n", b"\xff\xfe\n", b"\r\n", lines(1), lines(2, 3), lines(4)[:-1] + b"\r\n", b"\0\n"]
)
tail = st.sampled_from([b"", b"{", lines(9)[:-1]])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(st.booleans(), st.lists(piece, max_size=6), tail), min_size=1, max_size=3),
    limits=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    chunk=st.sampled_from([1, 5, 50, 1000]),
)
def test_positions_are_exact_after_any_mixture_of_limits(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[bool, list[bytes], bytes]],
    limits: list[int],
    chunk: int,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    expected = []  # by the ten lines of code that are obviously right
    for number, (packed, parts, last) in enumerate(files):
        content = b"".join(parts) + last
        path = written(folder / f"{number}{'.gz' if packed else ''}", gzip.compress(content) if packed else content)
        offset = 0
        for line in content.split(b"\n"):
            if line.strip():
                expected.append((str(path), offset, line))
            offset += len(line) + 1

    def decode(line: bytes) -> Event:
        raise ValueError(line)

    class Small(JsonLines):
        _chunk = chunk

    with Small(folder / "*", decode=decode) as source, Small(folder / "*", decode=decode) as other:
        found: list[tuple[str, int, bytes]] = []
        step = 0
        while True:
            limit = limits[step % len(limits)]
            items = source.read(limit)
            if not items:
                break
            found += [(i.position["path"], i.position["offset"], i.raw) for i in items if isinstance(i, DeadLetter)]
            other.seek(source.position())
            assert [i.position["offset"] for i in other.read(1) if isinstance(i, DeadLetter)] == [
                offset for _, offset, _ in expected[len(found) : len(found) + 1]
            ]
            step += 1
    assert found == expected


def test_an_interrupt_in_a_later_file_goes_back_to_the_file_before(tmp_path: Path) -> None:
    written(tmp_path / "a", b"1\n2\n")
    written(tmp_path / "b", b"3\n4\n")
    stop = [b"4"]

    def decode(line: bytes) -> Event:
        if line in stop:
            stop.clear()
            raise KeyboardInterrupt
        return click(int(line))

    with JsonLines(tmp_path / "?", decode=decode) as source:
        assert source.read(1) == [click(1)]
        with pytest.raises(KeyboardInterrupt):
            source.read(100)
        assert source.position() == {"path": str(tmp_path / "a"), "offset": 2}
        assert source.read(100) == [click(2), click(3), click(4)]
