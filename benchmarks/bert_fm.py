"""BertFM: how fast it learns, and what it is worth on a stream constructed from real purchases.

    python -m benchmarks.bert_fm [--retail FOLDER --encoder FOLDER]

Speed: score and learn, one text field, dim 16, embeddings of 384 numbers that are cached, one thread, beside a torch
head over the same vectors (batch 256). Quality: `FOLDER` has a `make_ctr_stream.py` whose `make("pop")` gives a stream
constructed from the UCI set Online Retail; whole invoices are scored before they are learned. AUC with its 95 %
interval by a bootstrap over invoices, over all rows and over items with fewer than 5 events so far.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import auc, environment, one_thread
from streamrec.batch import Batch
from streamrec.models import BertFM
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE

HIDDEN, COLD, CALL = 384, 5, 256


class Table:
    """Vectors of texts, computed beforehand."""

    version = "table"

    def __init__(self, vectors: NDArray[np.float32], texts: Sequence[str]) -> None:
        self.hidden = vectors.shape[1]
        self._vectors, self._places = vectors, {text: n for n, text in enumerate(texts)}

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._vectors[[self._places[text] for text in texts]]


# -- speed -------------------------------------------------------------------------------------------------------------


class Head(torch.nn.Module):
    """The same in PyTorch: embeddings of user and item, and a projection of the text's vector, paired as by an FM."""

    def __init__(self, users: int, items: int, dim: int = 16) -> None:
        super().__init__()
        self.users, self.items = torch.nn.Embedding(users, dim + 1), torch.nn.Embedding(items, dim + 1)
        self.project = torch.nn.Linear(HIDDEN, dim + 1)

    def forward(self, users: torch.Tensor, items: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        parts = torch.stack([self.users(users), self.items(items), self.project(vectors)], dim=1)  # (n, 3, dim + 1)
        sums, squares = parts.sum(dim=1), (parts**2).sum(dim=1)
        return sums[:, -1] + (sums[:, :-1] ** 2 - squares[:, :-1]).sum(dim=1) / 2


def speed(rows: int = 40_000, users: int = 5_000, items: int = 3_000, repetitions: int = 5) -> None:
    rng = np.random.default_rng(0)
    who, what = rng.integers(users, size=rows), rng.integers(items, size=rows)
    labels = (rng.random(rows) < 0.2).astype(np.float32)
    texts = [f"item {n}" for n in range(items)]
    vectors = rng.normal(size=(items, HIDDEN)).astype(np.float32)
    schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Text("title"))
    shown = [
        sr.Impression("", 0.0, str(user), str(item), {"title": texts[item]})
        for user, item in zip(who.tolist(), what.tolist(), strict=True)
    ]
    batch = encode(schema, shown).batch
    ops, ones = np.full(rows, SCORE | LEARN, dtype=np.int8), np.ones(rows, dtype=np.float32)
    models = {
        "BertFM": BertFM(schema, texts=Table(vectors, texts), taste=None),
        "BertFM with tastes": BertFM(schema, texts=Table(vectors, texts)),
    }
    head = Head(users, items)
    adam = torch.optim.Adagrad(head.parameters(), lr=0.05)
    tensors = [torch.from_numpy(array) for array in (who, what, vectors[what], labels)]

    def ours(model: BertFM) -> None:
        for begin in range(0, rows, CALL):
            part = np.arange(begin, min(begin + CALL, rows))
            model.step(batch, part, ops[part], labels[part], ones[part])

    def theirs() -> None:
        for begin in range(0, rows, CALL):
            users, items, texts, wanted = (tensor[begin : begin + CALL] for tensor in tensors)
            adam.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(head(users, items, texts), wanted).backward()
            adam.step()

    runs: dict[str, Any] = {name: lambda model=model: ours(model) for name, model in models.items()}
    runs["a torch head, batch 256"] = theirs
    taken = defaultdict(list)
    with one_thread():
        for repetition in range(repetitions + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                if repetition:
                    taken[name].append(rows / (time.process_time() - start))
    for name, speeds in taken.items():
        print(
            f"  {name:28} {np.median(speeds):10,.0f} events per CPU second ({min(speeds):,.0f} to {max(speeds):,.0f})"
        )


# -- quality -----------------------------------------------------------------------------------------------------------


def history(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is known before the invoice: how often the user bought the item, the user and the item anything, when last;
    and the time."""
    bought: dict[tuple[int, int], int] = defaultdict(int)
    when: dict[tuple[int, int], float] = {}
    by_user: dict[int, int] = defaultdict(int)
    of_item: dict[int, int] = defaultdict(int)
    shown_item: dict[int, int] = defaultdict(int)
    found = []
    edges = np.flatnonzero(np.diff(made["group"], prepend=-1, append=-1))
    columns = [made[name].tolist() for name in ("ts", "user", "item", "label", "last_price")]
    for begin, end in pairwise(edges.tolist()):
        rows = [[column[n] for column in columns] for n in range(begin, end)]
        for ts, user, item, _, price in rows:
            pair = user, item
            days = (ts - when[pair]) / 86400 if pair in when else None
            found.append(
                {
                    "hour": ts // 3600 % 24,
                    "weekday": ts // 86400 % 7,
                    "price": None if price < 0 else price,
                    "times": bought[pair],
                    "seen": min(bought[pair], 5),
                    "days": days,
                    "orders": by_user[user],
                    "sold": of_item[item],
                    "rate": (of_item[item] + 0.2) / (shown_item[item] + 1),
                }
            )
        for ts, user, item, label, _ in rows:
            shown_item[item] += 1
            if label:
                bought[user, item] += 1
                when[user, item] = ts
                by_user[user] += 1
                of_item[item] += 1
    return found


FIELDS = (
    *(sr.Id("user"), sr.Id("item"), sr.Id("hour"), sr.Id("weekday"), sr.Id("seen")),
    *(sr.Number(name, log=True, standardize=True) for name in ("price", "times", "days", "orders", "sold")),
    sr.Number("rate", standardize=True),
)


def progressive(model: Any, batch: Batch, labels: NDArray[np.float32], edges: NDArray[np.int64]) -> Any:
    """Each row's score before its invoice is learned."""
    rows = np.arange(len(labels), dtype=np.int64)
    order = np.concatenate([np.tile(rows[a:b], 2) for a, b in pairwise(edges)])
    ops = np.concatenate([np.repeat(np.array([SCORE, LEARN], dtype=np.int8), b - a) for a, b in pairwise(edges)])
    return model.step(batch, order, ops, labels[order], np.ones(len(order), dtype=np.float32))[ops == SCORE]


def interval(labels: NDArray[np.float32], scores: Any, groups: NDArray[np.int64], draws: int = 40) -> tuple[float, ...]:
    """AUC, and the middle 95 % of it over invoices drawn again."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        counts = rng.poisson(1.0, groups.max() + 1)[groups]
        rows = np.repeat(np.arange(len(labels)), counts)
        found.append(auc(labels[rows], scores[rows]))
    return auc(labels, scores), *np.quantile(found, [0.025, 0.975])


def quality(folder: Path, encoder: str | None, vectors: Path | None, rows: int | None) -> None:
    spec = importlib.util.spec_from_file_location("make_ctr_stream", folder / "make_ctr_stream.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"no make_ctr_stream.py in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.make("pop")
    titles = [title for _, title in made["items"]]
    known = history(made)[:rows]
    made = {name: column if name == "items" else column[:rows] for name, column in made.items()}
    shown = [
        sr.Impression("", float(ts), str(user), str(item), {**features, "title": titles[item]})
        for ts, user, item, features in zip(
            made["ts"], made["user"].tolist(), made["item"].tolist(), known, strict=True
        )
    ]
    labels, groups = made["label"].astype(np.float32), made["group"]
    edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1))
    seen: dict[int, int] = defaultdict(int)
    before = []
    for item in made["item"].tolist():
        before.append(seen[item])
        seen[item] += 1
    cold = np.array(before) < COLD
    texts = _texts(titles, encoder, vectors)
    random = Table(np.random.default_rng(1).normal(size=(len(titles), HIDDEN)).astype(np.float32), titles)
    plain, worded = sr.Schema(*FIELDS), sr.Schema(*FIELDS, sr.Text("title"))
    batches = {schema: encode(schema, shown).batch for schema in (plain, worded)}
    del shown, known
    titled = Table(reduced(tfidf(titles)), titles)
    both = Table(reduced(np.hstack([raised(texts.vectors(titles)), raised(tfidf(titles))])), titles)
    models = {
        "FM": sr.FM(plain),
        "BertFM, random vectors": BertFM(worded, texts=random),
        "BertFM, no tastes": BertFM(worded, texts=texts, taste=None),
        "BertFM": BertFM(worded, texts=texts),
        "BertFM, centred TF-IDF": BertFM(worded, texts=titled),
        "BertFM, both": BertFM(worded, texts=both),
        "BertFM, both, text lr 0.1": BertFM(worded, texts=both, text_optimizer=sr.Adagrad(lr=0.1, eps=0.1)),
    }
    for name, model in models.items():
        start = time.process_time()
        scores = progressive(model, batches[model.schema], labels, edges)
        whole, low, high = interval(labels, scores, groups)
        seconds = time.process_time() - start
        chilled = interval(labels[cold], scores[cold], groups[cold])
        print(
            f"  {name:28} AUC {whole:.4f} ({low:.4f} to {high:.4f})  cold {chilled[0]:.4f} "
            f"({chilled[1]:.4f} to {chilled[2]:.4f})  {seconds:.0f} s",
            flush=True,
        )


def raised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Less their mean, at length 1."""
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def tfidf(titles: Sequence[str]) -> NDArray[np.float32]:
    """float32 `(n, words)`: of the words of two titles or more, at length 1."""
    words = [set(re.findall(r"[a-z0-9]+", title.lower())) for title in titles]
    counts = Counter(word for some in words for word in some)
    places = {word: n for n, word in enumerate(sorted(word for word, count in counts.items() if count > 1))}
    found = np.zeros((len(titles), len(places)), dtype=np.float32)
    for row, some in enumerate(words):
        for word in some & places.keys():
            found[row, places[word]] = np.log(len(titles) / counts[word])
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def reduced(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 `(n, 384)`: their inner products as well as so many numbers can keep them."""
    _, axes = np.linalg.eigh(vectors.T @ vectors)
    return np.ascontiguousarray((vectors @ axes[:, -HIDDEN:]).astype(np.float32))


def _texts(titles: list[str], encoder: str | None, vectors: Path | None) -> Any:
    if vectors is not None:
        return Table(np.load(vectors), titles)
    from streamrec.models.text_cache import TextCache
    from streamrec.models.text_encoder import TextEncoder

    if encoder is None:
        raise SystemExit("--retail wants --encoder: a folder of a model of the BERT family, or --vectors")
    return TextCache(TextEncoder(encoder))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--retail", type=Path, help="where make_ctr_stream.py is")
    parser.add_argument("--encoder", help="the encoder of the titles")
    parser.add_argument("--vectors", type=Path, help="or their vectors, a .npy in the order of the items")
    parser.add_argument("--rows", type=int, help="only the first so many")
    options = parser.parse_args()
    print(f"{environment()}\n")
    speed()
    if options.retail is not None:
        quality(options.retail, options.encoder, options.vectors, options.rows)


if __name__ == "__main__":
    main()
