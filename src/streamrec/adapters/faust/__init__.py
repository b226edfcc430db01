"""Faust: a trainer, a label join, a scorer and user profiles inside an app of your own.

Each function takes your `faust.App` and registers something with it; nothing starts before your worker does, and
importing this starts nothing. Needs `pip install "streamrec[faust]"`.
"""

import sys
from importlib.util import find_spec

if (
    "faust" not in sys.modules and find_spec("faust") is None
):  # it is not imported here: it reads the command line when it is
    raise ImportError('streamrec.adapters.faust needs Faust: pip install "streamrec[faust]"')

from streamrec.adapters.faust._join import join
from streamrec.adapters.faust._profiles import profiles
from streamrec.adapters.faust._score import ScoreRequest, ScoreResponse, score
from streamrec.adapters.faust._train import Notice, train

__all__ = ["Notice", "ScoreRequest", "ScoreResponse", "join", "profiles", "score", "train"]
