"""streamrec: click-through-rate models that never stop learning.

Every public name is loaded on first use: `import streamrec` alone loads no numpy, torch, numba or transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamrec.batch import Batch as Batch
    from streamrec.errors import ConfigError as ConfigError
    from streamrec.errors import DamagedError as DamagedError
    from streamrec.errors import FullError as FullError
    from streamrec.errors import SchemaError as SchemaError
    from streamrec.errors import SourceError as SourceError
    from streamrec.errors import StoreError as StoreError
    from streamrec.errors import StreamrecError as StreamrecError
    from streamrec.errors import UnreachableError as UnreachableError
    from streamrec.evaluators import ADWIN as ADWIN
    from streamrec.evaluators import AUC as AUC
    from streamrec.evaluators import CTR as CTR
    from streamrec.evaluators import GAUC as GAUC
    from streamrec.evaluators import NDCG as NDCG
    from streamrec.evaluators import PSI as PSI
    from streamrec.evaluators import Calibration as Calibration
    from streamrec.evaluators import ConversionRate as ConversionRate
    from streamrec.evaluators import Coverage as Coverage
    from streamrec.evaluators import LogLoss as LogLoss
    from streamrec.evaluators import NormalizedEntropy as NormalizedEntropy
    from streamrec.evaluators import PageHinkley as PageHinkley
    from streamrec.evaluators import Recall as Recall
    from streamrec.evaluators import Report as Report
    from streamrec.evaluators import Slices as Slices
    from streamrec.events import DeadLetter as DeadLetter
    from streamrec.events import Feedback as Feedback
    from streamrec.events import Impression as Impression
    from streamrec.events import Labeled as Labeled
    from streamrec.models import FM as FM
    from streamrec.models import FTRL as FTRL
    from streamrec.models import SGD as SGD
    from streamrec.models import Adagrad as Adagrad
    from streamrec.models import Adam as Adam
    from streamrec.models import BertCTR as BertCTR
    from streamrec.models import BertFM as BertFM
    from streamrec.models import Taste as Taste
    from streamrec.models import TextCache as TextCache
    from streamrec.models import TextEncoder as TextEncoder
    from streamrec.models import TextLearner as TextLearner
    from streamrec.preprocessors import After as After
    from streamrec.preprocessors import DeadLetters as DeadLetters
    from streamrec.preprocessors import Dedup as Dedup
    from streamrec.preprocessors import Expect as Expect
    from streamrec.preprocessors import Filter as Filter
    from streamrec.preprocessors import History as History
    from streamrec.preprocessors import LabelJoin as LabelJoin
    from streamrec.preprocessors import Pseudonymize as Pseudonymize
    from streamrec.preprocessors import RateLimit as RateLimit
    from streamrec.preprocessors import Redact as Redact
    from streamrec.schema import Hour as Hour
    from streamrec.schema import Id as Id
    from streamrec.schema import Ids as Ids
    from streamrec.schema import Number as Number
    from streamrec.schema import Schema as Schema
    from streamrec.schema import Text as Text
    from streamrec.schema import Weekday as Weekday
    from streamrec.serving import Candidate as Candidate
    from streamrec.serving import Ranked as Ranked
    from streamrec.serving import Scorer as Scorer
    from streamrec.sources import Csv as Csv
    from streamrec.sources import HttpPoll as HttpPoll
    from streamrec.sources import JsonLines as JsonLines
    from streamrec.sources import Memory as Memory
    from streamrec.sources import Merged as Merged
    from streamrec.sources import Parquet as Parquet
    from streamrec.sources import Push as Push
    from streamrec.storage import Archive as Archive
    from streamrec.storage import EncodedRows as EncodedRows
    from streamrec.storage import Store as Store
    from streamrec.trainers import BatchTrainer as BatchTrainer
    from streamrec.trainers import Drift as Drift
    from streamrec.trainers import Gate as Gate
    from streamrec.trainers import JoinedEvents as JoinedEvents
    from streamrec.trainers import OnlineTrainer as OnlineTrainer
    from streamrec.trainers import Tuner as Tuner

_HOME = {
    "batch": ("Batch",),
    "errors": (
        "ConfigError",
        "DamagedError",
        "FullError",
        "SchemaError",
        "SourceError",
        "StoreError",
        "StreamrecError",
        "UnreachableError",
    ),
    "evaluators": (
        "ADWIN",
        "AUC",
        "CTR",
        "GAUC",
        "NDCG",
        "PSI",
        "Calibration",
        "ConversionRate",
        "Coverage",
        "LogLoss",
        "NormalizedEntropy",
        "PageHinkley",
        "Recall",
        "Report",
        "Slices",
    ),
    "events": ("DeadLetter", "Feedback", "Impression", "Labeled"),
    "models": (
        "FM",
        "FTRL",
        "SGD",
        "Adagrad",
        "Adam",
        "BertCTR",
        "BertFM",
        "Taste",
        "TextCache",
        "TextEncoder",
        "TextLearner",
    ),
    "preprocessors": (
        "After",
        "DeadLetters",
        "Dedup",
        "Expect",
        "Filter",
        "History",
        "LabelJoin",
        "Pseudonymize",
        "RateLimit",
        "Redact",
    ),
    "schema": ("Hour", "Id", "Ids", "Number", "Schema", "Text", "Weekday"),
    "serving": ("Candidate", "Ranked", "Scorer"),
    "sources": ("Csv", "HttpPoll", "JsonLines", "Memory", "Merged", "Parquet", "Push"),
    "storage": ("Archive", "EncodedRows", "Store"),
    "trainers": ("BatchTrainer", "Drift", "Gate", "JoinedEvents", "OnlineTrainer", "Tuner"),
}
_ROOM = {name: room for room, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_ROOM)


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module 'streamrec' has no attribute {name!r}")
    value = getattr(import_module(f"streamrec.{_ROOM[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
