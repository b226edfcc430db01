"""From the texts and numbers of impressions to the columns of a batch, compiled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamrec._compile import compiled
from streamrec._pointers import held, held_rows
from streamrec.hashing import NO_CUTS, end_of, xxh64

__all__ = ["UNKNOWN", "assemble", "assemble_row"]

# A lone surrogate, which no text holds; its bytes, ed b3 bf, are in no UTF-8: "unknown" cannot be somebody's value.
UNKNOWN = "\udcff"


@compiled()
def assemble(
    data: Any,
    cuts: Any,
    numbers: Any,
    counts: Any,
    columns: Any,
    number_columns: Any,
    scales: Any,
    lists: Any,
    field_count: int,
    ids: Any,
    values: Any,
    fields: Any,
    starts: Any,
    ends: Any,
) -> None:
    """Fill the columns of a batch, row after row, from the texts and numbers, field after field."""
    rows = len(starts)
    single = len(columns) + len(number_columns)
    at = 0
    for row in range(rows):
        starts[row] = at
        at += single
        for k in range(len(lists)):
            at += counts[k, row]
        ends[row] = at
    text = 0
    begin = 0
    for k in range(len(columns)):
        for row in range(rows):
            entry = starts[row] + np.int64(columns[k, 2])
            end = end_of(data, begin, cuts, text)
            ids[entry] = np.int64(xxh64(data, begin, end, columns[k, 0]))
            values[entry] = 1.0
            fields[entry] = columns[k, 1]
            begin = end + 1
            text += 1
    for k in range(len(number_columns)):
        for row in range(rows):
            entry = starts[row] + np.int64(number_columns[k, 1])
            x = numbers[k, row]
            fields[entry] = number_columns[k, 0]
            if math.isnan(x):
                fields[entry] += field_count
                ids[entry] = np.int64(number_columns[k, 3])
                values[entry] = 1.0
            else:
                if number_columns[k, 4]:
                    x = math.copysign(math.log1p(abs(x)), x)
                ids[entry] = np.int64(number_columns[k, 2])
                values[entry] = min(max(x / scales[k], -1e30), 1e30)  # so that float32 holds it
    for k in range(len(lists)):
        for row in range(rows):
            entry = starts[row] + single
            for before in range(k):
                entry += counts[before, row]
            for _ in range(counts[k, row]):
                end = end_of(data, begin, cuts, text)
                ids[entry] = np.int64(xxh64(data, begin, end, lists[k, 0]))
                values[entry] = 1.0 / counts[k, row]
                fields[entry] = lists[k, 1]
                begin = end + 1
                text += 1
                entry += 1


@compiled()
def assemble_row(data: Any, pointers: Any) -> bool:
    """`assemble` for one row, from and into the memory of `OneRow`; False where its strings hold zero bytes."""
    numbers, counts = held_rows(pointers, 0, 1, np.float64), held_rows(pointers, 1, 1, np.int64)
    columns, lists = held_rows(pointers, 2, 3, np.uint64), held_rows(pointers, 5, 2, np.uint64)
    strings, zeros = len(columns), 0
    for k in range(len(lists)):
        strings += counts[k, 0]
    for at in range(len(data)):
        zeros += data[at] == 0
    if zeros != max(strings, 1):
        return False
    number_columns, scales = held_rows(pointers, 3, 5, np.uint64), held(pointers, 4, np.float64)
    ids, values, fields = held(pointers, 6, np.int64), held(pointers, 7, np.float32), held(pointers, 8, np.int32)
    starts, ends = held(pointers, 9, np.int64), held(pointers, 10, np.int64)
    known = columns, number_columns, scales, lists, pointers[-1]
    assemble(data, NO_CUTS, numbers, counts, *known, ids, values, fields, starts, ends)
    return True
