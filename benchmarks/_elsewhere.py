"""Peers that run in a process of their own, for their wheels want other versions than ours, or none of ours at all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def interpreter(given: str | None, module: str) -> str | None:
    """The interpreter that was given, else this one if it has the module; None: the peer is left out."""
    if given is not None:
        return given
    return sys.executable if importlib.util.find_spec(module) is not None else None


def run(python: str, script: str, *arguments: object) -> dict[str, Any]:
    """Run a script of this folder with one thread, and return the JSON of its last line.

    Raises `SystemExit` with what it said where it fails.
    """
    path = Path(__file__).parent / script
    command = [python, "-I", str(path), *map(str, arguments)]  # -I: nothing of ours is on its path
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SINGLE})
    if done.returncode:
        raise SystemExit(f"{script} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
