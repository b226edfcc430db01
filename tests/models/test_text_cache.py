from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import streamrec as sr
from streamrec.hashing import hash_bytes
from streamrec.models import TextCache, TextEncoder
from streamrec.models._text_rows import DIRTY, FREE_PIECES
from streamrec.models.text_encoder import normalised
from tests.models.tiny_bert import CHINESE, WORDS, tiny_bert


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(tiny_bert(tmp_path_factory.mktemp("other"), seed=1))


texts = st.lists(st.sampled_from([*WORDS, *CHINESE, "xyz", "3", "!"]), max_size=6).map(" ".join)


@settings(max_examples=15)
@given(st.lists(st.lists(texts, max_size=8), max_size=8))
def test_a_text_has_one_vector_whatever_was_asked_before(encoder: TextEncoder, calls: list[list[str]]) -> None:
    cache = TextCache(encoder, max_bytes=1 << 15)
    for call in calls:
        alone = TextCache(encoder, max_bytes=1 << 15)
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


def test_into_memory_that_is_given(encoder: TextEncoder) -> None:
    cache = TextCache(encoder)
    texts = ["wine", None, "tea"]
    out = np.full((3, encoder.hidden), 7.0, dtype=np.float32)
    for _ in range(2):  # computed, and found
        assert cache.vectors(texts, out=out) is out
        np.testing.assert_array_equal(out, cache.vectors(texts))
    wrong: list[Any] = [out[:2], out.astype(np.float64), np.asfortranarray(out)]
    for one in wrong:
        with pytest.raises(sr.ConfigError, match=r"out must be float32 of shape \(3, 32\)"):
            cache.vectors(texts, out=one)


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
    ("arguments", "said"),
    [
        ({"max_bytes": 10}, "max_bytes must be .* at least"),
        ({"max_bytes": 1e9}, "whole"),
        ({"dtype": "int8"}, "dtype must be"),
    ],
)
def test_arguments_that_cannot_work(encoder: TextEncoder, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(sr.ConfigError, match=said):
        TextCache(encoder, **arguments)


def test_vectors_of_another_length(encoder: TextEncoder, tmp_path: Path) -> None:
    longer = TextEncoder(tiny_bert(tmp_path, hidden=48))
    for act in (lambda cache: cache.switch(longer), lambda cache: cache.renew(longer, 1)):
        with pytest.raises(sr.ConfigError, match="48 numbers cannot take the place of 32"):
            act(TextCache(encoder))


def test_halves_are_exact(encoder: TextEncoder) -> None:
    cache = TextCache(encoder)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.resize(halves[np.isfinite(halves)], (1984, encoder.hidden))
    out = np.empty(halves.shape, dtype=np.float32)
    cache._memory.vectors[: len(halves)] = halves.view(np.uint16)
    cache._memory.copy(np.arange(len(halves)), out)
    np.testing.assert_array_equal(out, halves.astype(np.float32))


@given(st.lists(st.text(st.characters(max_codepoint=0x10FFFF, categories=None), max_size=8), max_size=6))
def test_the_compiled_normal_form_is_that_of_the_encoder(encoder: TextEncoder, texts: list[str]) -> None:
    data, spans = TextCache(encoder, max_bytes=1 << 15)._read(texts, encoder)
    assert [data[a:b].tobytes().decode() for a, b in spans.tolist()] == [normalised(text) for text in texts]


class Numbered:
    """An encoder whose vectors tell of which text they are, without a model: for tests of many texts."""

    pooling, longest = "mean", 100_000

    def __init__(self, version: str = "1" * 32, hidden: int = 8) -> None:
        self.version, self.hidden, self.asked = version, hidden, list[str]()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += texts
        seeds = range(self.hidden)
        made = [[hash_bytes(f"{text} {self.version}".encode(), n) % 999 for n in seeds] for text in texts]
        return np.array(made, dtype=np.float32).reshape(-1, self.hidden)


def numbered(encoder: Numbered, **options: Any) -> TextCache:
    return TextCache(encoder, **{"max_bytes": 1 << 17, **options})  # type: ignore[arg-type]


@given(
    st.lists(st.lists(st.integers(0, 120), min_size=1, max_size=30), max_size=40),
    st.sampled_from([1, 30, 300]),
)
def test_bounded_and_the_least_recently_used_goes_first(calls: list[list[int]], length: int) -> None:
    cache = numbered(Numbered(), max_bytes=20_000)
    assert cache.bytes <= 20_000
    used: dict[str, int] = {}
    for now, call in enumerate(calls):
        texts = [f"text {n} " + "x" * length for n in call]
        np.testing.assert_array_equal(cache.vectors(texts), Numbered().embed(texts))
        used.update(dict.fromkeys(texts, now))
        memory = cache._memory
        live = np.flatnonzero(memory.rows["live"])
        kept = {memory.text(row) for row in live.tolist()}
        assert len(live) == len(kept) == len(cache) <= cache.capacity and kept <= set(used)
        before = {text: when for text, when in used.items() if when < now}  # of this call's, slices may follow slices
        gone = [when for text, when in before.items() if text not in kept]
        assert max(gone, default=-1) <= min((when for text, when in before.items() if text in kept), default=now)
        pieces = sum(-(-len(text) // 64) for text in kept)
        assert int(memory.header[FREE_PIECES]) == memory.layout.pieces - pieces


def test_a_text_takes_less_than_a_kilobyte() -> None:
    cache = numbered(Numbered(hidden=384), max_bytes=1 << 26)
    texts = [f"a title of some forty or fifty letters, {n}" for n in range(2000)]
    cache.vectors(texts)
    assert len(cache) == 2000 and cache.counts["evicted"] == 0
    assert cache.bytes / cache.capacity < 1000


def test_a_file_is_shared_and_outlives_its_processes(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    first, second = numbered(Numbered(), path=path), numbered(Numbered(), path=path, max_bytes=1 << 20)
    texts = [f"text {n} " + "y" * n for n in range(90)]
    made = first.vectors(texts)
    np.testing.assert_array_equal(second.vectors(texts), made)
    assert second.counts["hits"] == 90 and second.capacity == first.capacity and path.stat().st_size == first.bytes
    second.flush()
    del first, second
    third = numbered(Numbered(), path=path)
    np.testing.assert_array_equal(third.vectors(texts[::-1]), made[::-1])
    assert third.hit_rate == 1.0 and len(third) == 90 and third.counts["damaged"] == 0


def test_what_was_stored_first_is_the_vector(tmp_path: Path) -> None:
    class Slow(Numbered):
        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            numbered(Numbered(), path=tmp_path / "texts").vectors(texts)  # another process is faster
            return super().embed(texts) + 1

    cache = numbered(Slow(), path=tmp_path / "texts")
    np.testing.assert_array_equal(cache.vectors(["a", "b", "a"]), Numbered().embed(["a", "b", "a"]))
    assert len(cache) == 2


def test_many_writers(tmp_path: Path) -> None:
    def work(seed: int) -> None:
        cache = numbered(Numbered(), path=tmp_path / "texts", max_bytes=40_000)
        rng = np.random.default_rng(seed)
        for _ in range(30):
            texts = [f"text {n}" for n in rng.integers(0, 400, 20)]
            found = cache.vectors(texts)
            wrong.extend([] if np.array_equal(found, Numbered().embed(texts)) else texts)
        done.append(seed)

    wrong: list[str] = []
    done: list[int] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) == 3
    cache = numbered(Numbered(), path=tmp_path / "texts")
    assert len(cache) <= cache.capacity < 400 and cache.counts["damaged"] == 0


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.models.test_text_cache import Numbered, numbered
cache = numbered(Numbered(hidden=384), path=sys.argv[1], max_bytes=1 << 19)
for n in range(1_000_000):
    cache.vectors([f"text {n * 40 + k} " + "z" * (k * 9) for k in range(40)])
    if n % 20 == 10:
        print(n, flush=True)
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    path, root = tmp_path / "texts", Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(root)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    beside = None
    for _ in range(3):
        process.stdout.readline()
        beside = beside or numbered(Numbered(hidden=384), path=path)  # which lives on
        beside.vectors(["text 1", "mine"])
    process.kill()
    process.wait()
    process.stdout.close()
    assert beside is not None
    for cache in (beside, numbered(Numbered(hidden=384), path=path)):
        memory = cache._memory
        with memory.reading():
            texts = [memory.text(row) for row in np.flatnonzero(memory.rows["live"]).tolist()]
        assert len(texts) > 100
        before = cache.counts["misses"]
        np.testing.assert_array_equal(cache.vectors(texts), Numbered(hidden=384).embed(texts))
        assert cache.counts["misses"] == before and cache.counts["damaged"] <= 1


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=60), st.booleans())
def test_torn_files_never_give_a_wrong_vector(
    tmp_path_factory: pytest.TempPathFactory, torn: list[tuple[float, int]], marked: bool
) -> None:
    path = tmp_path_factory.mktemp("torn") / "texts"
    texts = [f"text {n} " + "w" * (n % 90) for n in range(200)]
    cache = numbered(Numbered(), path=path, max_bytes=60_000)
    truth = cache.vectors(texts)
    del cache
    data = bytearray(path.read_bytes())
    for where, byte in torn:
        data[4096 + int(where * (len(data) - 4097))] = byte
    if marked:
        data[512 + 8 * DIRTY] = 1
    path.write_bytes(data)
    again = numbered(Numbered(), path=path)
    for _ in range(2):
        np.testing.assert_array_equal(again.vectors(texts), truth)
        again.vectors([f"other {n}" for n in range(100)])


@pytest.mark.parametrize("content", [b"hello", b"x" * 10_000])
def test_files_that_are_no_cache(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "texts").write_bytes(content)
    with pytest.raises(sr.StoreError, match="no text cache"):
        numbered(Numbered(), path=tmp_path / "texts")
    assert (tmp_path / "texts").read_bytes() == content


def test_files_for_other_vectors(tmp_path: Path) -> None:
    numbered(Numbered(), path=tmp_path / "texts")
    with pytest.raises(sr.StoreError, match="8 numbers of 2 bytes, not of 16 of 2"):
        numbered(Numbered(hidden=16), path=tmp_path / "texts")
    with pytest.raises(sr.StoreError, match="not of 8 of 4"):
        numbered(Numbered(), path=tmp_path / "texts", dtype="float32")
    with open(tmp_path / "texts", "r+b") as file:
        file.truncate(9000)
    with pytest.raises(sr.StoreError, match="9,000 bytes"):
        numbered(Numbered(), path=tmp_path / "texts")
    with pytest.raises(sr.StoreError, match="cannot keep texts"):
        numbered(Numbered(), path=tmp_path / "none" / "texts")


def test_renewing_is_gradual_newest_and_most_used_first() -> None:
    old, new = Numbered("1" * 32), Numbered("2" * 32)
    cache = numbered(old)
    texts = [f"text {n}" for n in range(50)]
    for n in range(50):
        cache.vectors(texts[n:])  # the last is used last, and most
    cache.vectors(["long " * 1000])  # is not kept as a text
    assert cache.renew(new, 10) == 10 and sorted(new.asked) == texts[40:]  # type: ignore[arg-type]
    while cache.renew(new, 16):  # type: ignore[arg-type]
        cache.vectors(texts[:3])
    assert sorted(new.asked) == sorted(texts) and cache.counts["renewed"] == 50
    np.testing.assert_array_equal(cache.vectors(texts), old.embed(texts))
    before = cache.counts["misses"]
    cache.switch(new)  # type: ignore[arg-type]
    np.testing.assert_array_equal(cache.vectors(texts), new.embed(texts))
    assert cache.counts["misses"] == before and cache.encoder is new
    with pytest.raises(sr.ConfigError, match="budget"):
        cache.renew(new, 0)  # type: ignore[arg-type]


def test_renewing_on_a_thread_while_texts_are_asked_for() -> None:
    old, new = Numbered("1" * 32), Numbered("2" * 32)
    cache = numbered(old, max_bytes=30_000)
    texts = [f"text {n}" for n in range(60)]
    truth = cache.vectors(texts)
    thread = threading.Thread(target=lambda: [None for _ in iter(lambda: cache.renew(new, 3), 0)])  # type: ignore[arg-type]
    thread.start()
    while thread.is_alive():
        np.testing.assert_array_equal(cache.vectors(texts), truth)
    thread.join()
    cache.switch(new)  # type: ignore[arg-type]
    np.testing.assert_array_equal(cache.vectors(texts), new.embed(texts))


def test_weights_that_learn_in_place_make_new_vectors(tmp_path: Path) -> None:
    encoder = TextEncoder(tiny_bert(tmp_path))
    cache = TextCache(encoder, max_bytes=1 << 17)
    before = cache.vectors(["wine", "tea"])
    with torch.no_grad():
        for weight in encoder.module.parameters():
            weight.mul_(1.1)
    after = cache.vectors(["wine", "tea"])
    assert cache.counts["misses"] == 4
    np.testing.assert_array_equal(after, encoder.embed(["wine", "tea"]).astype(np.float16).astype(np.float32))
    assert not np.array_equal(after, before)
