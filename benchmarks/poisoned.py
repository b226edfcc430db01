"""An hour of flipped labels, with and without the learner's way back: `python -m benchmarks.poisoned [--plot FILE]`.

One simulated stream (200 users, 50 items, a planted FM of 3 factors), labels known at once, `FM(dim=4)` with its
defaults, one thread. From event 300,000 on, 20,000 labels are flipped. AUC is against the labels as they should be, by
the score that the learner gave before it learned, in windows of 5,000 events that all runs share, and so is the log
loss. Means over seeds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np

import streamrec as sr

EVENTS, BEGIN, HOUR, WINDOW = 400_000, 300_000, 20_000, 5_000
USERS, ITEMS = 200, 50
SCHEMA = sr.Schema(sr.Id("user"), sr.Id("item"))
END = BEGIN + HOUR


def stream(seed: int) -> tuple[list[sr.Impression], np.ndarray]:
    """Impressions, and whether each is clicked."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(USERS, size=EVENTS), rng.integers(ITEMS, size=EVENTS)
    a, b = rng.normal(0, 1, (USERS, 3)), rng.normal(0, 1, (ITEMS, 3))
    logits = -1 + (a[users] * b[items]).sum(1) + rng.normal(0, 0.7, USERS)[users] + rng.normal(0, 0.7, ITEMS)[items]
    clicked = rng.random(EVENTS) < 1 / (1 + np.exp(-logits))
    shown = [sr.Impression(f"i{n}", 1e9 + n, f"u{users[n]}", f"p{items[n]}") for n in range(EVENTS)]
    return shown, clicked


def run(
    shown: list[sr.Impression], labels: np.ndarray, truth: np.ndarray, recover: bool
) -> tuple[list[list[float]], Any]:
    """AUC and log loss of each window; how much was unlearned, and the history."""
    labeled = [sr.Labeled(one, float(label)) for one, label in zip(shown, labels, strict=True)]
    scores: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = sr.OnlineTrainer(
            model=sr.FM(SCHEMA, dim=4),
            store=folder,
            gate=sr.Gate(recover=recover),
            checkpoint_every=5_000,
            checkpoint_seconds=1e9,
            background=False,
        )
        push = trainer.push
        trainer.push = lambda events: scores.extend(push(events)) or []  # type: ignore[method-assign, func-returns-value]
        trainer.run(sr.Memory(labeled))
        history = trainer.store.served.history()  # type: ignore[union-attr]
    found = []
    for start in range(0, EVENTS, WINDOW):
        rows = slice(start, start + WINDOW)
        metrics = sr.AUC(), sr.LogLoss()
        for metric in metrics:
            metric.update(truth[rows].astype(np.float32), np.array(scores[rows], dtype=np.float32))
        found.append([metric.compute() for metric in metrics])
    return np.transpose(found).tolist(), (trainer.report().counts["unlearned"], history)


def back_after(best: np.ndarray, found: np.ndarray, within: float) -> int | None:
    """Events after the hour from which on the AUC stays this near to the undisturbed one, over four windows; None where
    it does not."""
    lost = np.convolve(best - found, np.ones(4) / 4, mode="valid")[END // WINDOW :]
    far = np.flatnonzero(lost > within)
    return 0 if not len(far) else None if far[-1] + 1 >= len(lost) else int(far[-1] + 1) * WINDOW


def main(seeds: int, plot: str | None) -> None:
    begun = time.process_time()
    names = "undisturbed", "left alone", "with recovery"
    curves: list[list[list[list[float]]]] = []  # by seed, run, metric, window
    for seed in range(seeds):
        shown, truth = stream(seed)
        flipped = truth.copy()
        flipped[BEGIN:END] ^= True
        runs = [run(shown, truth, truth, True), run(shown, flipped, truth, False), run(shown, flipped, truth, True)]
        curves.append([found for found, _ in runs])
        print(f"seed {seed}: {runs[0][1][0]:,} events unlearned undisturbed, {runs[2][1][0]:,} after the hour")
        for decision in runs[2][1][1]:
            if "goes back" in decision.why or "is worse than" in decision.why:
                print(f"  {decision.version}: {decision.why}")
    mean = np.mean(np.array(curves), axis=0)
    print(f"\n{'events from the end of the hour on':34}" + "".join(f"{name:>18}" for name in names))
    for place in range(BEGIN // WINDOW - 2, END // WINDOW + 9):
        told = "".join(f"{auc[place]:10.4f}{loss[place]:8.4f}" for auc, loss in mean)
        print(f"{place * WINDOW - END:+34,}{told}")
    for name, found in zip(names[1:], mean[1:], strict=True):
        after = [back_after(mean[0][0], found[0], within) for within in (0.01, 0.005, 0.002)]
        told = ", ".join("never" if one is None else f"{one:,}" for one in after)
        print(f"{name}: within 0.01, 0.005 and 0.002 AUC of undisturbed after {told} events")
    print(f"\n{time.process_time() - begun:.0f} CPU seconds")
    if plot is not None:
        draw(mean, names, plot)


def draw(mean: np.ndarray, names: tuple[str, ...], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    places = range(BEGIN // WINDOW - 4, END // WINDOW + 12)
    at = np.array([place * WINDOW + WINDOW / 2 for place in places]) / 1000
    for metric, (axes, what) in enumerate(zip(figure.subplots(1, 2), ("AUC", "log loss"), strict=True)):
        axes.axvspan(BEGIN / 1000, END / 1000, color="#fee2e2", label="labels flipped")
        for one, name, colour in zip(mean, names, ("#94a3b8", "#dc2626", "#2563eb"), strict=True):
            axes.plot(at, one[metric][places.start : places.stop], label=name, color=colour)
        axes.set_xlabel("thousand events")
        axes.set_ylabel(what)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--plot", help="where to draw the picture of the docs")
    options = parser.parse_args()
    main(options.seeds, options.plot)
