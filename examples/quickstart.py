"""The whole job on real data: a model that learns from an event log, judged on every event before it learns from it.

    python examples/quickstart.py [--synthetic] [--limit N] [--out FOLDER]

MovieLens-100K as impressions and clicks (see movielens.py) goes through dedup, the label join, a factorization machine
and the metrics; next to it, on the same events, the two floors every CTR model should beat. Then a service's part:
load the published version and rank items for one user.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import movielens
import streamrec as sr
from streamrec.batch import Batch
from streamrec.evaluators.plot import plot_windows

WINDOW = 600.0  # seconds in which a click counts: until then, nobody knows that there was none
WEEK = 7 * 86400.0
FIELDS = ("user", "item", "age", "gender", "occupation", "zip", "year", "hour", "weekday")

schema = sr.Schema(*(sr.Id(name) for name in FIELDS), sr.Ids("genres"))


class BaseRate:
    """The floor of floors, and all that a model of your own needs: it predicts the share of clicks so far."""

    def __init__(self) -> None:
        self.schema = schema
        self.clicks, self.total = 1.0, 2.0

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        return np.full(len(batch), self.clicks / self.total, dtype=np.float32)

    def learn(self, batch: Batch, labels: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        for label in labels.tolist():  # one by one: sums of floats depend on their order
            self.clicks += label
            self.total += 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"clicks": self.clicks, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clicks, self.total = state["clicks"], state["total"]


def trainer(model: Any, store: str | None = None) -> sr.OnlineTrainer:
    return sr.OnlineTrainer(
        model=model,
        preprocessors=[sr.Dedup(ttl=3600.0, capacity=1_000_000)],
        join=sr.LabelJoin(windows={"click": WINDOW}, lateness=60.0),
        metrics=[sr.AUC(), sr.LogLoss(), sr.NormalizedEntropy(), sr.Calibration(), sr.CTR()],
        window=WEEK,
        store=store,
        checkpoint_every=50_000,
    )


def compare(reports: Mapping[str, sr.Report]) -> str:
    names = ("AUC", "LogLoss", "NormalizedEntropy", "Calibration")
    lines = [f"{'':28}" + "".join(f"{name:>19}" for name in names)]
    for label, report in reports.items():
        lines.append(f"{label:28}" + "".join(f"{report.metrics[name]:19.4f}" for name in names))
    return "\n".join(lines)


def candidates(examples: Sequence[sr.Labeled]) -> list[sr.Candidate]:
    """Every item with its own features."""
    own = ("year", "genres")
    shown = {example.impression.item: example.impression.features for example in examples}
    return [sr.Candidate(item, {name: features[name] for name in own}) for item, features in shown.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="events to read (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where the store and picture go")
    parser.add_argument("--synthetic", action="store_true", help="use the built-in stream; nothing is downloaded")
    options = parser.parse_args(arguments)

    dataset = movielens.synthetic(reason="--synthetic was given") if options.synthetic else movielens.load()
    log = movielens.event_log(dataset)
    origin = "" if dataset.is_real else f" (not MovieLens-100K: {dataset.reason})"
    print(f"{dataset.name}, {len(dataset.labeled):,} impressions and the clicks on them{origin}")
    print(f"A click counts within {WINDOW:.0f} s of its impression, so labels come {WINDOW + 60:.0f} s late.\n")

    shutil.rmtree(options.out, ignore_errors=True)  # a demonstration starts afresh; your own runs resume
    store = str(options.out / "store")
    model = trainer(sr.FM(schema, dim=16, seed=0), store)
    source = sr.JsonLines(log)
    print(f"{'events':>9}{'learned':>10}{'AUC':>9}{'NE':>9}{'calibration':>13}")
    before, part = -1, max((options.limit or 150_000) // 6, 1)
    report = model.report()
    while before < report.counts["events"] < (options.limit or float("inf")):
        before = report.counts["events"]
        report = model.run(source, limit=min(part, (options.limit or part + before) - before))
        if report.counts["events"] > before:
            told = report.metrics
            print(
                f"{report.counts['events']:9,}{report.counts['learned']:10,}{told['AUC']:9.4f}"
                f"{told['NormalizedEntropy']:9.4f}{told['Calibration']:13.4f}",
                flush=True,
            )
    print(f"\n{report}\n")

    reports = {
        "factorization machine": report,
        "logistic regression": trainer(sr.FM(schema, dim=0)).run(sr.JsonLines(log), limit=options.limit),
        "base rate": trainer(BaseRate()).run(sr.JsonLines(log), limit=options.limit),
    }
    print(compare(reports))

    picture = options.out / "quickstart.png"
    plot_windows(reports, picture, title=f"{dataset.name} by week, each score judged before it is learned from")
    print(f"\nPicture: {picture}")

    scorer = sr.Scorer(store)
    print(f"Published: version {scorer.version.number}, {scorer.version.bytes / 1e6:.1f} MB, in {store}\n")
    last = dataset.labeled[-1].impression
    about = {name: last.features[name] for name in FIELDS[2:] if name != "year"}
    titles = {example.impression.item: example.impression.features["title"] for example in dataset.labeled}
    print(f"For user {last.user} ({about['occupation']}, about {int(about['age']) * 5}):")
    for ranked in scorer.rank(user=last.user, candidates=candidates(dataset.labeled), k=5, features=about):
        print(f"  {ranked.score:.3f}  {titles[ranked.item]}")


if __name__ == "__main__":
    main()
