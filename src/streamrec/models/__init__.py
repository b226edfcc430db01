"""Models: click probabilities that learn."""

from streamrec.models.bert_fm import BertFM, Taste
from streamrec.models.fm import FM
from streamrec.models.id_table import IdTable
from streamrec.models.optimizers import FTRL, SGD, Adagrad, Adam
from streamrec.models.text_cache import TextCache
from streamrec.models.text_encoder import TextEncoder

__all__ = ["FM", "FTRL", "SGD", "Adagrad", "Adam", "BertFM", "IdTable", "Taste", "TextCache", "TextEncoder"]
