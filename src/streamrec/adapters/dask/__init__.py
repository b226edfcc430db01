"""Dask: prepare an archive, train and search for a model, judge it and score a catalogue on a cluster of your own.

Every function takes your `distributed.Client`, starts no cluster and stops none. Needs Dask: `pip install
"streamrec[dask]"`.
"""

from __future__ import annotations

try:
    import distributed as _distributed  # noqa: F401
except ImportError as _error:
    from streamrec.errors import ConfigError as _ConfigError

    raise _ConfigError('this needs Dask: pip install "streamrec[dask]"') from _error

from streamrec.adapters.dask._cluster import ClusterError, once
from streamrec.adapters.dask._dense import fit_dense
from streamrec.adapters.dask._evaluate import evaluate
from streamrec.adapters.dask._fit import fit
from streamrec.adapters.dask._prepare import prepare
from streamrec.adapters.dask._score import User, score
from streamrec.adapters.dask._search import Halving, search
from streamrec.adapters.dask._space import OptunaPoints, RandomPoints
from streamrec.adapters.dask._trials import Trial, Trials
from streamrec.models.space import Choice, Real, Whole

__all__ = [
    "Choice",
    "ClusterError",
    "Halving",
    "OptunaPoints",
    "RandomPoints",
    "Real",
    "Trial",
    "Trials",
    "User",
    "Whole",
    "evaluate",
    "fit",
    "fit_dense",
    "once",
    "prepare",
    "score",
    "search",
]
