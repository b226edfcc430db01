"""MovieLens-100K as a stream of impressions and clicks.

    python examples/movielens.py        # writes .cache/events.jsonl

Each rating is an impression at its timestamp; a rating of 4 or 5 is followed, 1 to 600 seconds later, by a click.
Those delays are the only invented part, and they are seeded.

The ratings (Harper and Konstan 2015, doi 10.1145/2827872) are read out of the PyPI wheel `recbole==1.2.1`, which is
downloaded into `.cache/` and never installed. GroupLens forbids redistributing them: never commit what is in there.
Where the wheel cannot be had, a synthetic stream with known click rates takes its place: see `Dataset.is_real`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from streamrec.events import Feedback, Impression, Labeled, encode_event

CACHE = Path(__file__).resolve().parent.parent / ".cache"
WHEEL = "recbole==1.2.1"
IN_WHEEL = "recbole/dataset_example/ml-100k"
FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")


@dataclass(frozen=True)
class Dataset:
    """Impressions with their labels, in time order, and the log of them.

    `rates`: the true click rate of each, where it is known. `reason`: why this is not the real data, if it is not.
    """

    name: str
    is_real: bool
    labeled: Sequence[Labeled]
    rates: Sequence[float] | None = None
    reason: str = ""

    def events(self, *, seed: int = 0) -> list[Impression | Feedback]:
        """The impressions and the clicks on them, merged, in time order."""
        rng = random.Random(seed)
        stream: list[Impression | Feedback] = [example.impression for example in self.labeled]
        for row, example in enumerate(self.labeled):
            if example.label:
                seen = example.impression
                clicked = round(seen.time + rng.uniform(1.0, 600.0), 3)
                stream.append(Feedback(id=f"c{row}", impression_id=seen.id, time=clicked))
        return sorted(stream, key=lambda event: event.time)

    def write(self, path: Path) -> Path:
        """Write the events as JSON lines, all or nothing; a file that holds them already is left alone."""
        log = b"".join(encode_event(event) + b"\n" for event in self.events())
        if not (path.exists() and path.read_bytes() == log):
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            half.write_bytes(log)
            os.replace(half, path)
        return path


def load(cache: Path = CACHE) -> Dataset:
    """MovieLens-100K, downloaded if need be; the synthetic stream where that fails."""
    try:
        folder = download(cache)
    except (OSError, LookupError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        return synthetic(reason=f"{WHEEL} could not be downloaded: {error}")
    ratings = read(folder)
    clicks = sum(example.label for example in ratings)
    first = datetime.fromtimestamp(ratings[0].impression.time, timezone.utc).date().isoformat()
    if (len(ratings), clicks, first) != (100_000, 55_375, "1997-09-20"):
        raise ValueError(f"{folder} does not hold MovieLens-100K: {len(ratings)} ratings from {first}; delete it")
    return Dataset("MovieLens-100K", True, ratings)


def labeled(cache: Path = CACHE) -> Sequence[Labeled]:
    """The same impressions with their labels at once, in time order: the protocol where labels have no delay."""
    return load(cache).labeled


def event_log(dataset: Dataset, cache: Path = CACHE) -> Path:
    """Write the dataset's log into the cache. The two kinds have two names: neither is ever taken for the other."""
    return dataset.write(cache / ("events.jsonl" if dataset.is_real else "synthetic.jsonl"))


def download(cache: Path) -> Path:
    """The folder with the three files, fetched with pip on the first call."""
    folder = cache / "ml-100k"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, suffix=".tmp") as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        fetch = [*pip, "--timeout", "15", "--no-deps", "--only-binary", ":all:", "--dest", work, WHEEL]
        done = subprocess.run(fetch, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            raise OSError(said[-1])
        (wheel,) = Path(work).glob("*.whl")
        whole = Path(work, "ml-100k")
        whole.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                with archive.open(f"{IN_WHEEL}/{name}") as packed, (whole / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
        try:
            whole.rename(folder)  # in one step: a folder that is there is whole
        except OSError:
            if not folder.exists():  # where it is, another process was first
                raise
    return folder


def read(folder: Path) -> list[Labeled]:
    """The ratings in `folder` as labelled impressions. Ratings of the same second stay in the order of the file."""
    users = {user: rest for user, *rest in _rows(folder / "ml-100k.user")}
    items = {item: rest for item, *rest in _rows(folder / "ml-100k.item")}
    ratings = sorted(_rows(folder / "ml-100k.inter"), key=lambda rating: float(rating[3]))
    examples = []
    for row, (user, item, stars, seconds) in enumerate(ratings):
        age, gender, occupation, zipcode = users[user]
        title, year, genres = items[item]
        time = float(seconds)
        features = {
            "age": str(int(age) // 5),
            "gender": gender,
            "occupation": occupation,
            "zip": zipcode[:3],
            "year": year,
            **_clock(time),
            "genres": genres.split(),
            "title": title,
        }
        impression = Impression(id=f"i{row}", time=time, user=user, item=item, features=features)
        examples.append(Labeled(impression, label=float(float(stars) >= 4)))
    return examples


def _rows(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        next(lines)  # the names of the columns
        for line in lines:
            yield line.rstrip("\n").split("\t")


def _clock(time: float) -> dict[str, str]:
    moment = datetime.fromtimestamp(time, timezone.utc)
    return {"hour": str(moment.hour), "weekday": str(moment.weekday())}


GENRES = ("Action", "Children's", "Comedy", "Crime", "Drama", "Horror", "Musical", "Romance", "Sci-Fi", "War")
JOBS = ("artist", "doctor", "engineer", "farmer", "lawyer", "librarian", "student", "writer")


def synthetic(impressions: int = 100_000, *, seed: int = 0, reason: str = "") -> Dataset:
    """Impressions with the same fields, clicked with the rates of a factorization machine that is known.

    The log-odds are a base, a weight for the user, the item and each genre, and the product of the user's
    vector with those of the item and of its genres.
    """
    rng = np.random.default_rng(seed)
    users, items, dim = 1_000, 1_500, 4
    ages, zips, years = rng.integers(15, 70, users), rng.integers(100, 1_000, users), rng.integers(1950, 2000, items)
    genders, jobs = rng.integers(2, size=users), rng.integers(len(JOBS), size=users)
    genres = [np.sort(rng.choice(len(GENRES), size=n, replace=False)) for n in rng.integers(1, 4, size=items)]

    def planted(rows: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(0.0, scale, rows), rng.normal(0.0, scale, (rows, dim))

    user_weight, user_vector = planted(users, 0.7)
    item_weight, item_vector = planted(items, 0.6)
    genre_weight, genre_vector = planted(len(GENRES), 0.5)
    for item, its_genres in enumerate(genres):
        item_weight[item] += genre_weight[its_genres].mean()
        item_vector[item] += genre_vector[its_genres].mean(axis=0)

    busy = rng.permutation(1.0 / np.arange(3, users + 3))
    known = 1.0 / np.arange(5, items + 5)
    shown_to = rng.choice(users, impressions, p=busy / busy.sum())
    shown = rng.choice(items, impressions, p=known / known.sum())
    logits = 0.2 + user_weight[shown_to] + item_weight[shown] + (user_vector[shown_to] * item_vector[shown]).sum(axis=1)
    rates = 1.0 / (1.0 + np.exp(-logits))
    clicked = rng.random(impressions) < rates
    times = 1_735_689_600 + np.cumsum(rng.integers(0, 60, impressions))  # from 2025-01-01

    examples = []
    for row, (u, i) in enumerate(zip(shown_to.tolist(), shown.tolist(), strict=True)):
        features = {
            "age": str(ages[u] // 5),
            "gender": "FM"[genders[u]],
            "occupation": JOBS[jobs[u]],
            "zip": str(zips[u]),
            "year": str(years[i]),
            **_clock(float(times[row])),
            "genres": [GENRES[genre] for genre in genres[i]],
            "title": f"{GENRES[genres[i][0]]} No. {i}",
        }
        impression = Impression(id=f"i{row}", time=float(times[row]), user=f"u{u}", item=f"p{i}", features=features)
        examples.append(Labeled(impression, label=float(clicked[row])))
    return Dataset("a synthetic stream with known click rates", False, examples, rates.tolist(), reason)


def main() -> None:
    dataset = load()
    path = event_log(dataset)
    print(f"{dataset.name}: {len(dataset.labeled):,} impressions in {path}")
    if dataset.reason:
        print(dataset.reason)


if __name__ == "__main__":
    main()
