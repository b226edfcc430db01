"""How often a gate errs, and how soon it notices: `python -m benchmarks.gate [--streams N]`. One thread.

Labels are drawn with probabilities known to nobody; two models see their logits with noise of their own. Equal models
differ in the noise alone, a worse one is shifted, and one of a poisoned hour says the opposite, as it would after
learning flipped labels. No model learns here: what is measured is the decision.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from streamrec.trainers import Gate
from streamrec.trainers._compare import Comparison, Watch

LABELS = 50_000
PIECE = 500


def stream(seed: int, worse: float, flipped: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, the challenger's scores and the champion's."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.5, 1.0, LABELS)
    rates = 1 / (1 + np.exp(-logits))
    labels = (rng.random(LABELS) < rates).astype(np.float32)
    seen = [logits + rng.normal(0.0, 0.3, LABELS) for _ in range(2)]
    seen[0] = -seen[0] if flipped else seen[0] + worse
    challenger, champion = (np.float32(1 / (1 + np.exp(-logit))) for logit in seen)
    return labels, challenger, champion


def trial(gate: Gate, seed: int, worse: float = 0.0, flipped: bool = False) -> tuple[str, int]:
    """What a trial ends with, and after how many labels."""
    comparison = Comparison(gate.confidence)
    labels, challenger, champion = stream(seed, worse, flipped)
    for start in range(0, LABELS, PIECE):
        rows = slice(start, start + PIECE)
        comparison.update(labels[rows], challenger[rows], champion[rows])
        if comparison.low > 0:
            return "turned down", start + PIECE
        if comparison.high < gate.worse:
            return "promoted", start + PIECE
    return "no answer", LABELS


def watched(gate: Gate, seed: int) -> bool:
    """Whether a champion as good as the one before it is taken back."""
    comparison = Watch(gate.worse, gate.confidence, gate.every, gate.watch)
    labels, champion, before = stream(seed, 0.0)
    for start in range(0, LABELS, PIECE):
        rows = slice(start, start + PIECE)
        comparison.update(labels[rows], champion[rows], before[rows])
        if comparison.regressed:
            return True
    return False


def shift_of(worse: float) -> float:
    """The shift in logit that makes the log loss, and so the normalized entropy, worse by this share."""
    low, high = 0.0, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        total = [0.0, 0.0]
        for seed in range(3):
            labels, *scores = stream(10_000 + seed, middle)
            for side, score in enumerate(scores):
                total[side] -= float(np.log(np.where(labels == 1, score, 1 - score)).sum())
        low, high = (middle, high) if total[0] / total[1] - 1 < worse else (low, middle)
    return high


def main(streams: int) -> None:
    gate = Gate()
    begun = time.process_time()
    found = [trial(gate, seed) for seed in range(streams)]
    taken_back = sum(watched(gate, seed) for seed in range(streams))
    share = {
        ended: sum(one == ended for one, _ in found) / streams for ended in ("turned down", "promoted", "no answer")
    }
    print(f"{streams:,} streams of {LABELS:,} labels, looked at every {PIECE}; worse={gate.worse}, 95 % confidence\n")
    print(f"equal models: {share['turned down']:.1%} turned down as worse, {share['promoted']:.1%} promoted")
    print(f"equal models, watched: {taken_back / streams:.1%} taken back")
    bound = shift_of(gate.worse)
    found = [trial(gate, seed, bound) for seed in range(streams)]
    promoted = sum(ended == "promoted" for ended, _ in found)
    print(f"{gate.worse:.2%} worse, at the bound: {promoted / streams:.1%} promoted")
    for name, worse, flipped in (("1 % worse in NE", shift_of(0.01), False), ("a poisoned hour's", 0.0, True)):
        found = [trial(gate, seed, worse, flipped) for seed in range(streams)]
        after = sorted(labels for ended, labels in found if ended == "turned down")
        promoted = sum(ended == "promoted" for ended, _ in found)
        when = f"median after {after[len(after) // 2]:,} labels, the last after {after[-1]:,}" if after else ""
        print(f"{name}: {len(after):,} of {streams:,} turned down, {promoted} promoted; {when}")
    print(f"\n{time.process_time() - begun:.0f} CPU seconds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=1000)
    main(parser.parse_args().streams)
