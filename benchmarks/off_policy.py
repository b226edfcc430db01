"""Off-policy estimates on real logs of two policies: what does that of one say of the other?

    pip download --no-deps obp==0.4.1
    python -m benchmarks.off_policy obp-0.4.1-py3-none-any.whl

Open Bandit (Saito et al. 2021, arXiv 2008.07146): 10,000 impressions of a random policy and of Bernoulli Thompson
sampling in each of three campaigns. Both were run, so that both click-through rates are known, but from few clicks:
look at whether the intervals meet and at the effective number of entries, not at the third digit.
"""

from __future__ import annotations

import csv
import io
import sys
import zipfile

import numpy as np

from streamrec.evaluators import Estimate, ips, snips


def columns(wheel: zipfile.ZipFile, policy: str, campaign: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Clicks, the probability of what was shown, and how many items there are."""
    with wheel.open(f"obp/dataset/obd/{policy}/{campaign}/{campaign}.csv") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    clicks, propensities = (np.array([float(row[name]) for row in rows]) for name in ("click", "propensity_score"))
    return clicks, propensities, len({row["item_id"] for row in rows})


def line(name: str, found: Estimate) -> str:
    return f"{name:<34} {found.value:8.4%} {found.low:9.4%} to {found.high:7.4%} {found.effective:10,.0f}"


def main(path: str) -> None:
    with zipfile.ZipFile(path) as wheel:
        for campaign in ("all", "men", "women"):
            clicks, propensities, items = columns(wheel, "random", campaign)
            print(f"\n{campaign}, {items} items{'':<19}      CTR  95 % interval      effective entries")
            print(line("the random policy, as it was run", ips(clicks, propensities, propensities)))
            clicks, propensities, _ = columns(wheel, "bts", campaign)
            print(line("Thompson sampling, as it was run", ips(clicks, propensities, propensities)))
            random = np.full(len(clicks), 1 / items)
            print(line("random, by IPS from the latter", ips(clicks, propensities, random)))
            print(line("random, by SNIPS from the latter", snips(clicks, propensities, random)))


if __name__ == "__main__":
    main(sys.argv[1])
