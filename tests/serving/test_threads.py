"""Several threads get what one gets: requests share nothing that they write."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import streamrec as sr
from streamrec.preprocessors import encode

SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"), sr.Ids("genres"), sr.Number("price", standardize=True))


def test_threads_get_what_one_thread_gets() -> None:
    shown = [
        sr.Impression(f"i{n}", float(n), f"u{n % 20}", f"p{n % 900}", {"genres": [f"g{n % 7}", "a"], "price": n % 11})
        for n in range(3000)
    ]
    trainer = sr.OnlineTrainer(model=sr.FM(SCHEMA, dim=4), store="memory://test-threads")
    trainer.push([sr.Labeled(one, float(n % 7 < 2)) for n, one in enumerate(shown)])
    trainer.publish()
    scorer = sr.Scorer("memory://test-threads")
    scorer.set_catalogue([sr.Candidate(f"p{n}", {"genres": [f"g{n % 7}"]}) for n in range(900)])
    names = [f"p{n}" for n in range(0, 900, 3)]
    shortlist = scorer.shortlist(names)
    batch = encode(SCHEMA, shown).batch
    model: Any = scorer._serving.model

    def requests(number: int) -> tuple[Any, ...]:
        asked: dict[str, Any] = {"user": f"u{number % 20}", "features": {"price": number % 5}}
        rows = np.arange(number, len(batch), 7)
        raw = [sr.Candidate("p1", {"price": number}), "p2", "stranger"]
        return (
            model.predict(batch.take(rows)).tobytes(),
            scorer.score(shown[number : number + 50]).tobytes(),
            scorer.rank(candidates=names, k=5, **asked),
            scorer.rank(candidates=shortlist, **asked),
            scorer.rank(candidates=raw, **asked),
            scorer.retrieve(k=10, exclude=[f"p{number}"], **asked),
            scorer.retrieve(k=None, **asked),
        )

    alone = [requests(number) for number in range(60)]
    assert len({str(one) for one in alone}) == 60
    each: Callable[[int], Any] = requests
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(each, range(60))) == alone
