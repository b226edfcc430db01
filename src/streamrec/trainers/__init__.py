"""Trainers: what drives a model through a stream, or through an archive."""

from streamrec.trainers.batch import BatchTrainer
from streamrec.trainers.callbacks import Callback, Progress
from streamrec.trainers.dense import Dense, Peers
from streamrec.trainers.drift import Alert, Drift
from streamrec.trainers.gate import Gate
from streamrec.trainers.joined_events import JoinedEvents
from streamrec.trainers.online import OnlineTrainer
from streamrec.trainers.pretrain import InBatch, MaskedLM, SimCSE, pretrain
from streamrec.trainers.schedules import Cosine, Linear
from streamrec.trainers.tuner import Tuner

__all__ = [
    "Alert",
    "BatchTrainer",
    "Callback",
    "Cosine",
    "Dense",
    "Drift",
    "Gate",
    "InBatch",
    "JoinedEvents",
    "Linear",
    "MaskedLM",
    "OnlineTrainer",
    "Peers",
    "Progress",
    "SimCSE",
    "Tuner",
    "pretrain",
]
