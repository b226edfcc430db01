"""Models: click probabilities that learn."""

from streamrec.models.fm import FM
from streamrec.models.id_table import IdTable
from streamrec.models.optimizers import FTRL, SGD, Adagrad, Adam

__all__ = ["FM", "FTRL", "SGD", "Adagrad", "Adam", "IdTable"]
