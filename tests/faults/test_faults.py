"""What goes wrong in production, done to real runs: nothing is lost, nothing learned twice, nothing unaccounted for.

`make soak` has the long one, with a minute of ten times the load; it prints the table in docs/faults.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults import scenarios


@pytest.fixture(name="before", scope="module")
def _before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], Any]:
    folder, events = tmp_path_factory.mktemp("faults"), scenarios.stream(1_500)
    row, whole = scenarios.undisturbed(folder, events)
    assert row.learned == 1_500 and row.waiting == 1 and row.positives > 200 and row.dropped == {"dead_letter": 20}
    return folder, events, whole


@pytest.mark.parametrize("fault", list(scenarios.FAULTS))
def test_a_fault_changes_nothing(before: tuple[Path, list[Any], Any], fault: str) -> None:
    folder, events, whole = before
    row = scenarios.FAULTS[fault](folder, events, whole)
    assert row.same and row.learned == 1_500, row


def test_ten_times_the_load(before: tuple[Path, list[Any], Any]) -> None:
    row = scenarios.overload(before[0], before[1], seconds=0.5)
    assert row.learned + row.waiting == row.events > 0, row


@pytest.mark.soak
def test_all_of_it_for_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        rows = scenarios.main()
    assert len(rows) == 10 and all(row.same is not False for row in rows)
