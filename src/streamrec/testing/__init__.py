"""Contracts for parts of your own: call one from a test, and it raises `AssertionError` where a promise is broken.

They need no test framework.
"""

from streamrec.testing._metric import check_metric
from streamrec.testing._model import check_model
from streamrec.testing._source import check_source
from streamrec.testing._stage import check_stage

__all__ = ["check_metric", "check_model", "check_source", "check_stage"]
