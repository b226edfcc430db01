"""Judging the scores that were served: metrics, progressive validation over event time, and the report of a run."""

from __future__ import annotations

from streamrec.evaluators.calibration import Isotonic, Platt
from streamrec.evaluators.drift import ADWIN, PageHinkley
from streamrec.evaluators.grouped import GAUC, NDCG, Coverage, Recall
from streamrec.evaluators.metrics import AUC, CTR, Calibration, ConversionRate, LogLoss, NormalizedEntropy
from streamrec.evaluators.off_policy import Estimate, doubly_robust, ips, snips
from streamrec.evaluators.progressive import ProgressiveValidation, Window
from streamrec.evaluators.report import Report
from streamrec.evaluators.sequential import LossDifference
from streamrec.evaluators.slices import Slices
from streamrec.evaluators.stability import PSI, Shift, psi

__all__ = [
    "ADWIN",
    "AUC",
    "CTR",
    "GAUC",
    "NDCG",
    "PSI",
    "Calibration",
    "ConversionRate",
    "Coverage",
    "Estimate",
    "Isotonic",
    "LogLoss",
    "LossDifference",
    "NormalizedEntropy",
    "PageHinkley",
    "Platt",
    "ProgressiveValidation",
    "Recall",
    "Report",
    "Shift",
    "Slices",
    "Window",
    "doubly_robust",
    "ips",
    "psi",
    "snips",
]
