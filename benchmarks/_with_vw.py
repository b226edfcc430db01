"""Vowpal Wabbit over a text file, for an interpreter that has `vowpalwabbit` and need not have streamrec.

    python benchmarks/_with_vw.py TEXT PREDICTIONS [VW OPTION ...]

Its own parser, its own learner, its own thread for each: the command line's work without the command line, which the
wheel does not have. Each line is predicted, then learned. Prints the CPU seconds of both threads as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from time import perf_counter, process_time

from vowpalwabbit import Workspace


def main() -> None:
    text, predictions, *options = sys.argv[1:]
    start, wall = process_time(), perf_counter()
    with Workspace(arg_list=["--data", text, "--predictions", predictions, "--quiet", *options]):
        pass  # it reads the whole file as it is made
    found = {"seconds": process_time() - start, "wall": perf_counter() - wall, "vowpalwabbit": version("vowpalwabbit")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
