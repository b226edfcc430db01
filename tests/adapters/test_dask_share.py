"""What copies learn of a data set, put together: each row once an epoch, in blocks that are read once and kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part

_share = pytest.importorskip("streamrec.adapters.dask._share")

SCHEMA = sr.Schema(sr.Id("user"))
MANY = 1 << 30


def written(uri: str, count: int, files: int) -> sr.EncodedRows:
    """Row n has the label n."""
    shown = [sr.Impression(f"i{n}", 1000.0 + n, f"u{n}", "p1") for n in range(count)]
    labels = np.arange(count, dtype=np.float32)
    rows = LabeledRows(encode(SCHEMA, shown).batch, labels, np.ones_like(labels))
    cuts = [count * n // files for n in range(files + 1)]
    parts = [write_part(uri, f"part-{n}", [rows.take(slice(cuts[n], cuts[n + 1]))]) for n in range(files)]
    commit_rows(uri, SCHEMA, parts)
    return sr.EncodedRows(uri)


class Counted(sr.EncodedRows):
    """Counts the rows that are read of it."""

    read_rows = 0

    def read(self, limit: int) -> LabeledRows | None:
        found = super().read(limit)
        self.read_rows += 0 if found is None else len(found.labels)
        return found


def epoch(share: _share.Share, window: int, *, first: bool) -> tuple[list[float], list[int]]:
    """The labels that were read, and how many rows lay between two merges."""
    share.first = first
    labels: list[float] = []
    merges = [0]
    while (part := share.read(window)) is not None:
        assert len(part.labels) <= window
        np.testing.assert_array_equal(part.batch.times, part.labels.astype(np.float64) + 1000.0)
        labels += part.labels.tolist()
        if share.merges:
            merges.append(len(labels))
    share.load_state_dict({"row": 0})
    return labels, np.diff(merges).tolist()


@given(
    count=st.integers(1, 200),
    copies=st.integers(1, 4),
    window=st.integers(1, 60),
    apart=st.integers(1, 300),
    keep=st.sampled_from([0, 700, MANY]),
)
def test_each_row_is_learned_once_an_epoch_by_one_copy(
    count: int, copies: int, window: int, apart: int, keep: int
) -> None:
    rows = written("memory://share", count, files=3)
    cuts = _share.Cuts(count, copies, window, apart)
    shares = [_share.Share(rows.only(range(len(rows.parts))), cuts, copy, keep=keep) for copy in range(copies)]
    for first in (True, False):
        learned = [epoch(share, window, first=first) for share in shares]
        assert sorted(label for labels, _ in learned for label in labels) == [*range(count)]
        assert all(labels == sorted(labels) for labels, _ in learned)
        assert len({len(merges) for _, merges in learned}) == 1  # all merge equally often
        if copies > 1:
            assert max(most for _, merges in learned for most in merges) <= max(apart * 3 // 2 + 1, 1)


def test_blocks_are_decoded_once_and_kept() -> None:
    uri, window = "memory://blocks", 100
    written(uri, 6000, files=2)
    cuts = _share.Cuts(6000, 2, window, 1 << 20)
    read = {}
    for keep in (0, MANY):
        rows = Counted(uri)
        share = _share.Share(rows, cuts, 1, keep=keep)
        first, merges = epoch(share, window, first=True)
        assert first == [*range(3000, 6000)] and merges == [500, 1000, 1500]
        assert rows.read_rows == 3000  # though the first epoch cuts its windows elsewhere
        again, merges = epoch(share, window, first=False)
        assert again == first and merges == [3000]
        read[keep] = rows.read_rows
    assert read == {0: 6000, MANY: 3000}
    # beside what is kept, one block
    assert share._held is None and len(share._kept) == 30
