"""Serving: scores and rankings from published versions."""

from streamrec.serving._loader import STAGES
from streamrec.serving.candidates import Candidate, Ranked, Shortlist
from streamrec.serving.follower import Follower
from streamrec.serving.notifier import StoreNotifier
from streamrec.serving.scorer import Scorer, Status
from streamrec.serving.view import View

__all__ = ["STAGES", "Candidate", "Follower", "Ranked", "Scorer", "Shortlist", "Status", "StoreNotifier", "View"]
