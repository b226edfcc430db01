"""The archive stores the lines that events were read from, and what it holds is what it would hold without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.events import Decoded, decode_event, decode_lines, encode_event, lines_of
from streamrec.storage import _archive_columns as columns
from streamrec.storage import _archive_lines as scan
from streamrec.storage._archive_rows import _event

START = 1_700_000_000.0
TEXTS = st.text(max_size=6) | st.sampled_from(['a "quoted"', "back\\slash\\", "u1", "\u00e9\u2028", "{", "}]", '"'])
SCALARS = TEXTS | st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, width=32)
VALUES = st.recursive(
    SCALARS.filter(lambda one: one not in (float("inf"), float("-inf"))),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(TEXTS, one, max_size=3),
    max_leaves=5,
)

WORDS = st.sampled_from(["u1", "i1"]) | VALUES
NUMBERS = st.sampled_from([1, -2.5e-3, None]) | VALUES


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """An event as some service writes it: in any order, with spaces, escapes, keys of its own, and twice the same."""
    row: dict[str, Any] = {"id": draw(TEXTS), "time": START + draw(st.integers(0, 9999))}
    if draw(st.booleans()):
        row |= {"type": "impression", "user": draw(TEXTS), "item": draw(TEXTS)}
        if draw(st.booleans()):
            row["features"] = draw(st.dictionaries(TEXTS, VALUES, max_size=3))
        if draw(st.booleans()):
            row["score"] = draw(st.none() | st.sampled_from([0, 0.25, 1]))
        if draw(st.booleans()):
            row |= {"impression_id": draw(WORDS), "value": draw(NUMBERS)}  # an impression has none
    else:
        row |= {"type": "feedback", "impression_id": draw(TEXTS)}
        if draw(st.booleans()):
            row["kind"] = draw(TEXTS)
        if draw(st.booleans()):
            row["value"] = draw(st.none() | st.sampled_from([1, 2.5]))
        if draw(st.booleans()):
            row |= {"features": draw(st.just({}) | VALUES), "score": draw(NUMBERS), "user": draw(WORDS)}  # nor feedback
    if draw(st.booleans()):
        row["page"] = draw(VALUES)
    names = draw(st.permutations(list(row)))
    spaces = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :  ")]))
    text = json.dumps({name: row[name] for name in names}, ensure_ascii=draw(st.booleans()), separators=spaces)
    twice = draw(st.sampled_from(["", "", "", '"id":"first",', '"features":{"a":1},', '"\\u0069d":"escaped",']))
    text = text[0] + twice + text[1:]
    return draw(st.sampled_from(["", "", " "])).encode() + text.encode("utf-8", "surrogatepass")


def archived(pieces: list[tuple[list[Any], list[bytes] | None]]) -> tuple[list[Any], list[Any]]:
    """The events that are read back, and all else that is in the columns."""
    rows = columns.EventRows(1)
    for events, read in pieces:
        rows.add(events, read)
    found = rows.table().to_pylist()
    return [_event(row) for row in found], [{**row, "features": row["features"] is None} for row in found]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_lines_are_archived_as_their_events_are(data: st.DataObject) -> None:
    read = [one for one in data.draw(st.lists(lines(), min_size=1, max_size=12)) if decode_lines([one]) is not None]
    events: list[Any] = decode_lines(read) or []
    assume(events)
    cut = data.draw(st.integers(0, len(read)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_BLOCK", data.draw(st.sampled_from([1, 1 << 20])))
        pieces: list[Any] = [(events[:cut], read[:cut]), (events[:1], None), (events[cut:], read[cut:])]
        found, columns_of_lines = archived([(one, lines) for one, lines in pieces if one])
    assert found == [event for one, _ in pieces for event in one]
    assert columns_of_lines == archived([(found, None)])[1]


def test_only_what_is_odd_is_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(scan, "decode_event", lambda line: decoded.append(line) or decode_event(line))
    shown = b'{"type":"impression","id":"%s","time":1.0,"user":"u1","item":"p1","features": {"a" : [1.50, "}\\""]}}'
    usual, escaped, told = (
        shown % b"i1",
        shown % b"i\\u0031",
        b'{"type":"feedback","id":"f1","impression_id":"i1","time":2}',
    )
    rows = columns.EventRows(1)
    rows.add(decode_lines([usual, escaped, told]) or [], [usual, escaped, told])
    table = rows.table().to_pydict()
    assert decoded == [escaped]
    assert table["id"] == ["i1", "i1", "f1"] and table["impression_id"] == [None, None, "i1"]
    assert table["features"] == ['{"a" : [1.50, "}\\""]}', '{"a":[1.5,"}\\""]}', None]  # the first as it was read


def test_lines_go_with_the_very_events_that_were_read() -> None:
    shown = [sr.Impression(f"i{n}", START + n, "u1", "p1") for n in range(4)]
    read = [encode_event(one) for one in shown]
    items = Decoded(shown, lines=read)
    assert lines_of(items, list(shown)) == read and lines_of(items, shown[1::2]) == read[1::2]
    assert lines_of(items, []) == []
    other = sr.Impression("i1", START + 1, "pseudonym", "p1")
    assert lines_of(items, [shown[0], other, *shown[2:]]) is None
    assert lines_of(items, [shown[1], shown[0]]) is None
    assert lines_of(list(shown), shown) is None
    with pytest.raises(ValueError, match="3 for 4"):
        Decoded(shown, lines=read[1:])


@pytest.mark.parametrize("pseudonyms", [False, True])
def test_a_log_is_archived_as_events_in_memory_are(tmp_path: Path, pseudonyms: bool) -> None:
    events: list[Any] = []
    for n in range(300):
        events.append(
            sr.Impression(f"i{n}", START + 60.0 * n, f"Ren\u00e9{n % 7}", "p1", {"n": n}, None if n % 3 else 0.5)
        )
        if n % 4 == 0:
            events += [sr.Feedback(f"c{n}", f"i{n}", START + 60.0 * n + 5.0)] * 2  # one of them a duplicate
    log = tmp_path / "log.jsonl"
    text = [json.dumps(json.loads(encode_event(one)), ensure_ascii=bool(n % 2)) for n, one in enumerate(events)]
    log.write_text("\n".join([*text[:200], "{", *text[200:]]), encoding="utf-8")  # with a line that is none

    def run(source: Any, name: str) -> list[Any]:
        door = [sr.Pseudonymize({0.0: b"k" * 16})] if pseudonyms else []
        trainer = sr.OnlineTrainer(
            model=sr.FM(sr.Schema(sr.Id("user")), dim=4),
            preprocessors=[*door, sr.Dedup(ttl=1e6, capacity=10_000)],
            join=sr.LabelJoin(windows={"click": 300.0}),
            store=tmp_path / name / "store",
            archive=tmp_path / name / "archive",
            checkpoint_every=100,
            batch_size=32,
        )
        trainer.run(source)
        archive = sr.Archive(tmp_path / name / "archive")
        return [archive.read("events").read(1000), archive.read("labeled").read(1000)]

    assert run(sr.JsonLines(log), "lines") == run(sr.Memory(events), "memory")
    if pseudonyms:
        import pyarrow.parquet as pq

        files = sr.Archive(tmp_path / "lines" / "archive").files("events")
        assert files and not any("Ren" in repr(pq.read_table(name).to_pylist()) for name in files)
