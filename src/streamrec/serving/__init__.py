"""Serving: scores and rankings from published versions."""

from streamrec.serving._loader import STAGES
from streamrec.serving.candidates import Candidate, Ranked, Shortlist
from streamrec.serving.notifier import StoreNotifier
from streamrec.serving.scorer import Scorer

__all__ = ["STAGES", "Candidate", "Ranked", "Scorer", "Shortlist", "StoreNotifier"]
