"""Serving: scores and rankings from published versions."""

from streamrec.serving.scorer import Candidate, Ranked, Scorer

__all__ = ["Candidate", "Ranked", "Scorer"]
