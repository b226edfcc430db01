"""The memory of what waits for a label: `python -m benchmarks.open_impressions`.

A million impressions of 16 fields, open in the join of an `OnlineTrainer`: the memory of the process before them and
after, and at its highest, by the system's own count.
"""

from __future__ import annotations

import argparse
import os
import resource
from typing import Any

import streamrec as sr

FIELDS = [sr.Id("user"), sr.Id("item"), *(sr.Id(f"f{n}") for n in range(10)), *(sr.Number(f"x{n}") for n in range(4))]


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(count: int) -> None:
    """Print what `count` open impressions take."""
    trainer = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(*FIELDS), dim=4),
        join=sr.LabelJoin(windows={"click": "30d"}, capacity=count),
    )

    def shown(n: int) -> sr.Impression:
        features: dict[str, Any] = {f"f{k}": f"v{(n * (k + 3)) % 1000}" for k in range(10)}
        features |= {f"x{k}": float(n % (k + 7)) for k in range(4)}
        return sr.Impression(f"impression-{n:08d}", 1.7e9 + 0.001 * n, f"user-{n % 5000}", f"item-{n % 700}", features)

    trainer.push([shown(n) for n in range(512)])  # compiles, and takes what every trainer takes
    before = resident()
    for begin in range(512, count, 512):
        trainer.push([shown(n) for n in range(begin, min(begin + 512, count))])
    after = resident()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert trainer.join is not None and trainer.join.pending == count
    print(f"{count:,} open impressions of {len(FIELDS)} fields: {(after - before) / 1e6:,.0f} MB, at most ")
    print(f"{(peak - before) / 1e6:,.0f} MB while they came; {(after - before) / count:.0f} bytes each\n")


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    memory(parser.parse_args().count)


if __name__ == "__main__":
    main()
