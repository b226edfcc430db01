"""Models: click probabilities that learn."""

from streamrec.models.bert_ctr import BertCTR
from streamrec.models.bert_fm import BertFM, Taste
from streamrec.models.fm import FM
from streamrec.models.id_table import IdTable
from streamrec.models.optimizers import FTRL, SGD, Adagrad, Adam
from streamrec.models.space import Choice, Real, Whole
from streamrec.models.text_cache import TextCache
from streamrec.models.text_encoder import TextEncoder
from streamrec.models.text_learner import TextLearner
from streamrec.models.tuning import AdamW, Full, LoRA, Pair, Top

__all__ = [
    "FM",
    "FTRL",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BertCTR",
    "BertFM",
    "Choice",
    "Full",
    "IdTable",
    "LoRA",
    "Pair",
    "Real",
    "Taste",
    "TextCache",
    "TextEncoder",
    "TextLearner",
    "Top",
    "Whole",
]
