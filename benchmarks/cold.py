"""What compiling takes where nothing has been compiled yet: `python -m benchmarks.cold`.

A process with an empty cache makes FMs of three kinds, one after the other: each learns from one batch, scores one row
and gives its parts. A second process, with what the first one left, does the same. CPU seconds, one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from benchmarks._measure import environment

SCRIPT = """
import json, time
import numpy as np
from streamrec import FM, Adagrad, FTRL, Id, Ids, Impression, Number, Schema
from streamrec.preprocessors import encode

schema = Schema(Id("user"), Id("item"), Ids("genres"), Number("price"))
shown = [Impression(str(n), 0.0, f"u{n}", "p", {"genres": ["a"], "price": 1.0}) for n in range(4)]
seconds, before = {}, time.process_time()
batch = encode(schema, shown).batch
after = time.process_time()
seconds["encode"] = after - before
kinds = {"dim 16, Adagrad": (16, Adagrad()), "dim 16, FTRL": (16, FTRL()), "dim 8, Adagrad": (8, Adagrad())}
for name, (dim, rule) in kinds.items():
    before, model = after, FM(schema, dim=dim, optimizer=rule, seed=0)
    model.learn(batch, np.zeros(4, dtype=np.float32))
    model.one(batch.take([0]))
    model.parts(batch)
    after = time.process_time()
    seconds["FM, " + name] = after - before
print(json.dumps(seconds))
"""


def main() -> None:
    print(environment())
    with tempfile.TemporaryDirectory() as cache:
        # the first line that numba compiles brings LLVM up, for a tenth of a second: that is in "encode"
        given = {**os.environ, "NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        runs = [
            json.loads(
                subprocess.run([sys.executable, "-c", SCRIPT], env=given, capture_output=True, check=True).stdout
            )
            for _ in range(2)
        ]
    print("\n| CPU seconds | nothing compiled | compiled before |\n|---|---:|---:|")
    for name, cold in runs[0].items():
        print(f"| {name} | {cold:.1f} | {runs[1][name]:.2f} |")


if __name__ == "__main__":
    main()
