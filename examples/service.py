"""streamrec inside a service that has its own loop: learn from what happens, score what is about to be shown.

    python examples/service.py

Here one process plays both parts. In yours, the loop runs where the events arrive, and the scorer where items are
shown; they share nothing but the store.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator

import streamrec as sr

schema = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("tags"), sr.Number("price", log=True, standardize=True))


def make_trainer(store: str) -> sr.OnlineTrainer:
    return sr.OnlineTrainer(
        model=sr.FM(schema, dim=8),
        preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)],
        join=sr.LabelJoin(windows={"click": 1800.0}, lateness=60.0),
        metrics=[sr.AUC(), sr.NormalizedEntropy(), sr.Calibration()],
        store=store,
        checkpoint_every=10_000,
    )


def topic(start: int, count: int) -> Iterator[list[sr.Impression | sr.Feedback]]:
    """Stands for your queue: small batches of events. Everyone likes cheap things, and fans of an artist her prints."""
    for n in range(start, start + count):
        rng = random.Random(n)
        user, artist, price = rng.randrange(200), rng.choice(["kahlo", "klee"]), rng.uniform(5, 500)
        fan = (user % 2 == 0) == (artist == "kahlo")
        features = {"tags": [artist, "print"], "price": price}
        shown = sr.Impression(id=f"i{n}", time=60.0 * n, user=f"u{user}", item=f"{artist}-{n % 50}", features=features)
        clicked = rng.random() < (0.6 if fan else 0.1) * (1.0 if price < 100 else 0.5)
        yield [shown, sr.Feedback(id=f"c{n}", impression_id=shown.id, time=shown.time + 20.0)] if clicked else [shown]


def main() -> None:
    with tempfile.TemporaryDirectory() as store:
        trainer = make_trainer(store)
        trainer.resume()  # nothing yet; after a restart: the newest checkpoint, and your queue's position with it
        offset = 0
        for events in topic(start=0, count=30_000):
            trainer.push(events)
            offset += 1
            if trainer.checkpoint_due:
                trainer.checkpoint({"offset": offset})
        trainer.checkpoint({"offset": offset})
        print(trainer.report(), "\n")

        scorer = sr.Scorer(store)
        candidates = [
            sr.Candidate("kahlo-7", {"tags": ["kahlo", "print"], "price": 40.0}),
            sr.Candidate("klee-8", {"tags": ["klee", "print"], "price": 40.0}),
            sr.Candidate("kahlo-new", {"tags": ["kahlo", "print"], "price": 400.0}),
        ]
        for user in ("u2", "u3"):
            print(
                user,
                [(ranked.item, round(ranked.score, 3)) for ranked in scorer.rank(user=user, candidates=candidates)],
            )

        restarted = make_trainer(store)
        position = restarted.resume()
        print(f"\nA restarted trainer goes on from {position}, with {restarted.report().counts['learned']:,} learned")


if __name__ == "__main__":
    main()
