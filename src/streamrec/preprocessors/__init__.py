"""Preprocessors: what stands between the source and the model."""

from streamrec.preprocessors.dead_letters import DeadLetters
from streamrec.preprocessors.dedup import Dedup
from streamrec.preprocessors.encode import Encoded, Encoder, Problem, encode
from streamrec.preprocessors.expect import Expect
from streamrec.preprocessors.filter import Filter
from streamrec.preprocessors.history import History
from streamrec.preprocessors.label_join import After, Closed, LabelJoin
from streamrec.preprocessors.privacy import Pseudonymize, Redact, network, prefix, steps
from streamrec.preprocessors.rate_limit import RateLimit
from streamrec.preprocessors.validate import Validate

__all__ = [
    "After",
    "Closed",
    "DeadLetters",
    "Dedup",
    "Encoded",
    "Encoder",
    "Expect",
    "Filter",
    "History",
    "LabelJoin",
    "Problem",
    "Pseudonymize",
    "RateLimit",
    "Redact",
    "Validate",
    "encode",
    "network",
    "prefix",
    "steps",
]
