"""What one process has compiled, the next one loads: the right one, and no more files each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import gc, json, sys
import numpy as np
from numba.core.registry import CPUDispatcher
from numba.core.types import unliteral
from streamrec import FM, Adagrad, FTRL, Id, Ids, Impression, Schema
from streamrec.models import ranking
from streamrec.preprocessors import encode

schema = Schema(Id("user"), Ids("genres"))
shown = [Impression(str(n), 0.0, f"u{n % 7}", "p", {"genres": ["a", "b", "c"][: n % 4]}) for n in range(60)]
batch = encode(schema, shown).batch
labels = np.arange(60, dtype=np.float32) % 3 // 2
rules = {"adagrad": Adagrad(lr=0.5), "ftrl": FTRL(lr=0.5)}
found = {"scores": {}, "hits": 0, "misses": 0, "twice": []}
for one in sys.argv[1:]:
    dim, rule = one.split("-")
    model = FM(schema, dim=int(dim), optimizer=rules[rule])
    model.learn(batch, labels)
    parts = model.parts(batch)
    places = np.arange(60)
    found["scores"][one] = [
        model.predict(batch).tolist(), model.one(batch.take([5])), parts.tolist(),
        [numbers.tolist() for numbers in ranking.best(model, parts[3], parts, places, 5)],
    ]
    kernels = [model._kernels.step, model._kernels.one, model._kernels.parts, ranking._kernels_of(model.dim).best]
    for kernel in kernels:
        found["hits"] += sum(kernel.stats.cache_hits.values())
        found["misses"] += sum(kernel.stats.cache_misses.values())
for function in gc.get_objects():
    if isinstance(function, CPUDispatcher) and function.__module__.startswith("streamrec"):
        kinds = [tuple(map(unliteral, signature)) for signature in function.signatures]
        if len(set(kinds)) < len(kinds):
            found["twice"].append(function.__qualname__)
print(json.dumps(found))
"""


def run(cache: Path, *models: str) -> Any:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *models], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cache that three processes have filled, each with a model of its own, and what those gave."""
    cache = tmp_path_factory.mktemp("numba")
    first = {}
    for model in ("4-adagrad", "8-adagrad", "4-ftrl"):
        found = run(cache, model)
        assert found["misses"] > 0
        assert not found["twice"], "compiled once more for a constant that some caller passes"
        first |= found["scores"]
    return cache, first


def test_a_fourth_process_compiles_nothing_and_loads_the_right_ones(caches: tuple[Path, dict[str, Any]]) -> None:
    cache, first = caches
    files = sorted(cache.rglob("*.nb*"))
    for order in (["4-adagrad", "8-adagrad", "4-ftrl"], ["4-ftrl", "8-adagrad", "4-adagrad"]):
        found = run(cache, *order)
        assert found["misses"] == 0 and found["hits"] >= 9
        assert found["scores"] == first
    assert sorted(cache.rglob("*.nb*")) == files
