from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.models import TextCache, TextEncoder
from tests.models.tiny_bert import CHINESE, WORDS, tiny_bert


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(tiny_bert(tmp_path_factory.mktemp("other"), seed=1))


texts = st.lists(st.sampled_from([*WORDS, *CHINESE, "xyz", "3", "!"]), max_size=6).map(" ".join)


@settings(max_examples=10)
@given(st.lists(st.lists(texts, max_size=8), max_size=8))
def test_a_text_has_one_vector_whatever_was_asked_before(encoder: TextEncoder, calls: list[list[str]]) -> None:
    cache = TextCache(encoder, max_bytes=1 << 16)
    for call in calls:
        alone = TextCache(encoder)
        one_by_one = [alone.vectors([text])[0] for text in call]
        np.testing.assert_array_equal(cache.vectors(call), np.reshape(one_by_one, (len(call), encoder.hidden)))
        np.testing.assert_allclose(cache.vectors(call), encoder.embed(call), rtol=1e-3, atol=1e-3)


def test_hits_and_misses(encoder: TextEncoder) -> None:
    cache = TextCache(encoder)
    assert np.isnan(cache.hit_rate)
    first = cache.vectors(["wine", "tea", None, "wine", "", "  "])
    assert cache.counts["misses"] == 3 and cache.counts["hits"] == 0 and len(cache) == 2
    again = cache.vectors(["tea", "\x00wine ", " wine"])
    assert cache.counts["hits"] == 3 and cache.hit_rate == 0.5
    np.testing.assert_array_equal(again, first[[1, 0, 0]])
    assert not first[[2, 4, 5]].any() and first.dtype == np.float32


def test_a_changed_encoder_never_serves_an_old_vector(encoder: TextEncoder, other: TextEncoder) -> None:
    cache = TextCache(encoder)
    old = cache.vectors(["wine", "tea", "glass"])
    assert cache.renew(other, budget=2) == 2
    np.testing.assert_array_equal(cache.vectors(["wine", "tea", "glass"]), old)
    cache.switch(other)
    new = cache.vectors(["glass", "tea", "wine"])
    assert cache.counts["renewed"] == 2 and cache.counts["misses"] == 4
    np.testing.assert_array_equal(new, TextCache(other).vectors(["glass", "tea", "wine"]))
    assert not np.array_equal(new[::-1], old)


@pytest.mark.parametrize(
    ("arguments", "said"), [({"max_bytes": 10}, "max_bytes"), ({"dtype": "int8"}, "dtype must be")]
)
def test_arguments_that_cannot_work(encoder: TextEncoder, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(sr.ConfigError, match=said):
        TextCache(encoder, **arguments)


def test_vectors_of_another_length(encoder: TextEncoder, tmp_path: Path) -> None:
    longer = TextEncoder(tiny_bert(tmp_path, hidden=48))
    for act in (lambda cache: cache.switch(longer), lambda cache: cache.renew(longer, 1)):
        with pytest.raises(sr.ConfigError, match="48 numbers cannot take the place of 32"):
            act(TextCache(encoder))
