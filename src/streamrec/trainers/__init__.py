"""Trainers: what drives a model through a stream."""

from streamrec.trainers.online import OnlineTrainer

__all__ = ["OnlineTrainer"]
