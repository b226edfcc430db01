"""A BERT small enough to be made by a test: random weights, and a word-piece vocabulary of English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = [
    "red",
    "blue",
    "green",
    "white",
    "wine",
    "glass",
    "bag",
    "box",
    "heart",
    "star",
    "cup",
    "tea",
    "light",
    "lunch",
    "clock",
    "paper",
    "set",
    "of",
    "the",
    "in",
    "with",
    "and",
    "a",
    "to",
    "large",
    "small",
    "metal",
    "vintage",
    "retro",
    "christmas",
    "garden",
]
CHINESE = "红色蓝绿白酒杯茶灯钟纸小大新中国花园圣诞节的和一套"


def tiny_bert(folder: Path, *, hidden: int = 32, layers: int = 2, positions: int = 64, seed: int = 0) -> Path:
    """Write such a model and its tokenizer, as `save_pretrained` does. `layers` layers of 4 heads; returns `folder`."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    letters = [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for mark in ("", "##")]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*specials, *dict.fromkeys([*letters, *"!?.,-'&", *WORDS, *CHINESE, "##s", "##ing"])]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
    )
    before = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = BertModel(config, add_pooling_layer=False)
        for weight in model.parameters():  # the usual start is so small that every text has nearly the same vector
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
    finally:
        torch.random.set_rng_state(before)
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a model whose config.json says something else."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to
