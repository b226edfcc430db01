from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from streamrec.hashing import hash_bytes, hashes, xxh64

SEEDS = [0, 1, 2**31, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_length_up_to_200(seed: int) -> None:
    data = np.random.default_rng(seed % 1000).integers(0, 256, 200, dtype=np.uint8).tobytes()
    for length in range(201):
        assert hash_bytes(data[:length], seed) == xxhash.xxh64_intdigest(data[:length], seed)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_any_bytes_and_seed(data: bytes, seed: int) -> None:
    assert hash_bytes(data, seed) == xxhash.xxh64_intdigest(data, seed)


@given(st.binary(max_size=120), st.integers(0, 120), st.integers(0, 120))
def test_a_part_of_a_buffer(data: bytes, start: int, end: int) -> None:
    start, end = sorted((min(start, len(data)), min(end, len(data))))
    found = xxh64(np.frombuffer(data, dtype=np.uint8), start, end, np.uint64(7))
    assert int(found) == xxhash.xxh64_intdigest(data[start:end], 7)


def test_a_megabyte() -> None:
    data = b"abcdefg" * 150_000
    assert hash_bytes(data, 3) == xxhash.xxh64_intdigest(data, 3)


@given(st.lists(st.text(max_size=20), max_size=8), st.integers(0, 2**64 - 1))
def test_many_strings_at_once(strings: list[str], seed: int) -> None:
    expected = [xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"), seed) for text in strings]
    assert hashes(strings, seed).view(np.uint64).tolist() == expected
