"""Preprocessors: what stands between the source and the model."""

from streamrec.preprocessors.dead_letters import DeadLetters
from streamrec.preprocessors.dedup import Dedup
from streamrec.preprocessors.encode import Encoded, Encoder, Problem, encode
from streamrec.preprocessors.filter import Filter
from streamrec.preprocessors.label_join import Closed, LabelJoin
from streamrec.preprocessors.validate import Validate

__all__ = [
    "Closed",
    "DeadLetters",
    "Dedup",
    "Encoded",
    "Encoder",
    "Filter",
    "LabelJoin",
    "Problem",
    "Validate",
    "encode",
]
