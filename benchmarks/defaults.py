"""How the FM's default optimizers were chosen: each candidate on streams of different kinds.

    python -m benchmarks.defaults [--retail FOLDER]

Progressive AUC and log loss, labels without delay. `--retail`: a folder with a `make_ctr_stream.py` whose `make("pop")`
gives a stream constructed from the UCI set Online Retail; a whole invoice is scored before it is learned.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import auc, log_loss
from benchmarks.ours import TUNED
from benchmarks.streams import Stream, encoded, movielens, zipf
from streamrec.preprocessors import encode
from streamrec.protocols import LEARN, SCORE

CANDIDATES = {
    "SGD(0.02)": (sr.SGD(lr=0.02), None),
    "Adam(0.002)": (sr.Adam(lr=0.002), None),
    "Adagrad(0.05)": (sr.Adagrad(lr=0.05), None),
    "FTRL(0.1)": (sr.FTRL(lr=0.1), None),
    "Adagrad(0.05) + FTRL(0.1)": (sr.Adagrad(lr=0.05), sr.FTRL(lr=0.1)),
    "Adagrad(0.02) + FTRL(0.2)": (sr.Adagrad(lr=0.02), sr.FTRL(lr=0.2)),
    "Adagrad(0.05) + FTRL(0.2)": (sr.Adagrad(lr=0.05), sr.FTRL(lr=0.2)),
    "Adagrad(0.05, eps=0.1) + FTRL(0.2), the default": (None, None),
    "Adagrad(0.05, eps=1) + FTRL(0.2)": (sr.Adagrad(lr=0.05, eps=1.0), sr.FTRL(lr=0.2)),
    "Adagrad(0.1, eps=0.3) + FTRL(0.2)": (sr.Adagrad(lr=0.1, eps=0.3), sr.FTRL(lr=0.2)),
    "Adagrad(0.05) + FTRL(0.5)": (sr.Adagrad(lr=0.05), sr.FTRL(lr=0.5)),
    "Adagrad(0.1) + FTRL(0.2)": (sr.Adagrad(lr=0.1), sr.FTRL(lr=0.2)),
    "tuned on MovieLens": (TUNED["optimizer"], TUNED["linear_optimizer"]),
}


def progressive(model: sr.FM, stream: Stream) -> NDArray[np.float32]:
    """Each row's score before it is learned."""
    rows = np.arange(len(stream.labels), dtype=np.int64)
    ones = np.ones(len(rows), dtype=np.float32)
    if stream.groups is None:
        ops = np.full(len(rows), SCORE | LEARN, dtype=np.int8)
        return model.step(stream.batch, rows, ops, stream.labels, ones)
    edges = np.flatnonzero(np.diff(stream.groups, prepend=-1, append=-1))
    order = np.concatenate([np.tile(rows[a:b], 2) for a, b in pairwise(edges)])
    ops = np.concatenate([np.repeat(np.array([SCORE, LEARN], dtype=np.int8), b - a) for a, b in pairwise(edges)])
    scores = model.step(stream.batch, order, ops, stream.labels[order], ones[order])
    return scores[ops == SCORE]


def retail(folder: Path) -> Stream:
    spec = importlib.util.spec_from_file_location("make_ctr_stream", folder / "make_ctr_stream.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"no make_ctr_stream.py in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.make("pop")
    schema = sr.Schema(
        sr.Id("user"), sr.Id("item"), sr.Id("hour"), sr.Id("weekday"), sr.Ids("words"), sr.Number("price", log=True)
    )
    words = [description.lower().split() for _, description in made["items"]]
    shown = [
        sr.Impression(
            id="",
            time=float(ts),
            user=str(user),
            item=str(item),
            features={
                "hour": int(ts) // 3600 % 24,
                "weekday": int(ts) // 86400 % 7,
                "words": words[item],
                "price": None if price < 0 else float(price),
            },
        )
        for ts, user, item, price in zip(made["ts"], made["user"], made["item"], made["last_price"], strict=True)
    ]
    batch = encode(schema, shown).batch
    return Stream("Online Retail, constructed", schema, batch, made["label"].astype(np.float32), made["group"])


def streams(folder: Path | None) -> Iterator[Stream]:
    dataset = movielens.load()
    yield encoded(dataset.labeled, dataset.name)
    yield encoded(movielens.synthetic(100_000, seed=1).labeled, "synthetic")
    yield zipf(300_000, fields=12, ids=300_000)
    yield zipf(300_000)
    yield zipf(300_000, even=False)
    if folder is not None:
        yield retail(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--retail", type=Path, help="where make_ctr_stream.py is")
    for stream in streams(parser.parse_args().retail):
        print(f"\n{stream.name}: {len(stream.labels):,} rows\n", flush=True)
        for name, (optimizer, linear) in CANDIDATES.items():
            model = sr.FM(stream.schema, dim=16, optimizer=optimizer, linear_optimizer=linear, seed=0)
            scores = progressive(model, stream)
            print(
                f"  {name:48} AUC {auc(stream.labels, scores):.4f}  log loss {log_loss(stream.labels, scores):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
