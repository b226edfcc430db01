"""Serving: scores and rankings from published versions, and what becomes of them before they are shown."""

from streamrec.serving._loader import STAGES
from streamrec.serving.ads import Ad, Auction, auction
from streamrec.serving.candidates import Candidate, Ranked, Shortlist
from streamrec.serving.exploration import Shown, epsilon_greedy, thompson
from streamrec.serving.follower import Follower
from streamrec.serving.notifier import StoreNotifier
from streamrec.serving.reranking import Rules, blended, diversified
from streamrec.serving.scorer import Scorer, Status
from streamrec.serving.view import View

__all__ = [
    "STAGES",
    "Ad",
    "Auction",
    "Candidate",
    "Follower",
    "Ranked",
    "Rules",
    "Scorer",
    "Shortlist",
    "Shown",
    "Status",
    "StoreNotifier",
    "View",
    "auction",
    "blended",
    "diversified",
    "epsilon_greedy",
    "thompson",
]
