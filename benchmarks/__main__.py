"""All of it, in one run: `make bench`, or `python -m benchmarks [--repetitions N]`."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks import auc_metric, end_to_end, ranking
from benchmarks._measure import compare, environment, table
from benchmarks.ours import ours
from benchmarks.peers import peers
from benchmarks.streams import movielens


def import_time(repetitions: int = 11) -> float:
    """Milliseconds that `import streamrec` adds to a bare interpreter: the difference of two medians."""
    code = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"

    def median(statement: str) -> float:
        runs = [
            float(
                subprocess.run([sys.executable, "-c", code.format(statement)], capture_output=True, check=True).stdout
            )
            for _ in range(repetitions)
        ]
        return statistics.median(runs)

    return 1000 * (median("import streamrec") - median("pass"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    print(f"{environment()}\n")
    dataset = movielens.load()
    results = compare([*ours(), *peers()], dataset.labeled, repetitions=repetitions)
    print(f"Predict, then learn, {dataset.name}, dim 16, features prepared beforehand, labels without delay:\n")
    print(
        table(
            results,
            against=["River FM", "PyTorch FM, sparse Adagrad, batch 256", "PyTorch FM, sparse Adagrad, batch 320"],
        )
    )
    end_to_end.main(repetitions)
    auc_metric.main()
    ranking.main()
    print(f"import streamrec: {import_time():.1f} ms on top of a bare interpreter")


if __name__ == "__main__":
    main()
