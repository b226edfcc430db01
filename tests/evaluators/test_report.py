from __future__ import annotations

import dataclasses
import math

import pytest

from streamrec.evaluators import Report


def test_it_prints_an_aligned_table_without_zero_drops() -> None:
    counts = {"events": 1_234_567, "learned": 1_234_000, "pending": 0, "duplicate": 567, "late": 0}
    report = Report({"AUC": 0.76186, "NormalizedEntropy": math.nan}, counts, seconds=125.0, interrupted=True)
    assert str(report).splitlines() == [
        "AUC                   0.7619",
        "NormalizedEntropy  undefined",
        "",
        "events             1,234,567",
        "learned            1,234,000",
        "pending                    0",
        "duplicate                567",
        "",
        "2 min 5 s, 9,877 events/s, interrupted",
    ]


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (Report({}, {}), ""),
        (Report({}, {}, interrupted=True), "interrupted"),
        (Report({"CTR": 0.00012}, {}), "CTR  1.200e-04"),
        (
            Report({"CTR": 0.0}, {"events": 3}, seconds=7260.0),
            "CTR     0.0000\n\nevents       3\n\n2 h 1 min, 0 events/s",
        ),
    ],
)
def test_what_is_not_there_is_not_printed(report: Report, text: str) -> None:
    assert str(report) == text


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Report({}, {}).seconds = 1.0  # type: ignore[misc]
