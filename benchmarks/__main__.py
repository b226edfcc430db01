"""All of it, in one run: `make bench`, or `python -m benchmarks [--repetitions N]`.

Peers whose wheels want an interpreter of their own are run where that is given, or where this one has them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks import auc_metric, criteo_like, end_to_end, ids, join, ranking, raw_events
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--vw-python", help="an interpreter that has vowpalwabbit")
    parser.add_argument("--torchrec-python", help="an interpreter that has torchrec and fbgemm-gpu-cpu")
    parser.add_argument("--bytewax-python", help="an interpreter that has bytewax")
    options = parser.parse_args()
    repetitions = options.repetitions
    few = max(1, repetitions // 2)  # of what takes long; `python -m benchmarks.NAME` repeats it more often
    print(f"{environment()}\n")
    dataset = movielens.load()
    results = compare([*ours(), *peers()], dataset.labeled, repetitions=repetitions)
    print(f"Predict, then learn, {dataset.name}, dim 16, features prepared beforehand, labels without delay:\n")
    print(
        table(
            results,
            against=["River FM", "PyTorch FM, sparse Adagrad, batch 256", "PyTorch FM, sparse Adagrad, batch 320"],
        ),
        flush=True,
    )
    end_to_end.main(repetitions)
    raw_events.main(repetitions, quality=20_000)
    join.main(repetitions, options.bytewax_python)
    auc_metric.main()
    ranking.main()
    criteo_like.main(few, vw_python=options.vw_python, torchrec_python=options.torchrec_python)
    ids.main(1)
    print(f"import streamrec: {import_time():.1f} ms on top of a bare interpreter")


if __name__ == "__main__":
    main()
