"""Pretrained classifiers and language models in and out: folders and URIs that plain transformers reads and writes."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamrec.errors import ConfigError
from streamrec.models import _text_files
from streamrec.models.tuning import LoRA

__all__ = ["built", "files_of", "head_of", "load", "merged", "tokenizer_of", "with_lora", "write"]


def load(checkpoint: str | os.PathLike[str], kind: str, seed: int, **settings: Any) -> tuple[Any, Any, Sequence[str]]:
    """The model, in float32 and eval mode, its tokenizer, and the names of the weights of a head that is new.

    `kind`: the class of transformers that loads it. A head that the checkpoint does not have begins with random
    weights drawn by `seed`, as wide as the configuration says. Raises `ConfigError` where the checkpoint cannot be
    had, lacks weights of the encoder, has more of them than it should, or does not fit its tokenizer.
    """
    named = os.fspath(checkpoint)
    with _text_files.local(named) as folder:
        module, tokenizer, new, _ = _text_files.load(folder, named, kind, **settings)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if name in new:
            with torch.no_grad():
                if weight.ndim > 1:
                    weight.normal_(std=getattr(module.config, "initializer_range", 0.02), generator=generator)
                elif name.endswith("bias"):
                    weight.zero_()
    return module, tokenizer, new


def head_of(module: Any) -> Sequence[str]:
    """The names of the weights of a model above its encoder's layers."""
    prefix = f"{module.base_model_prefix}."
    names = [name for name, _ in module.named_parameters()]
    return [name for name in names if not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")]


def built(architecture: str, kind: str) -> Any:
    """A model of this configuration, as JSON has it, whose weights are to be loaded."""
    import transformers

    described = json.loads(architecture)
    with torch.random.fork_rng([]), _text_files.quiet():
        module = getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(**described))
    return module.to(torch.float32).eval()


def with_lora(module: Any, settings: LoRA, seed: int) -> None:
    """Put LoRA's matrices beside those of the modules it names. Raises `ConfigError` where there are none such."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError('LoRA needs peft: pip install "streamrec[lora]"') from error
    options: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    config = peft.LoraConfig(target_modules=list(settings.targets), **options)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, module)
        except ValueError as error:
            raise ConfigError(f"LoRA cannot go beside {', '.join(settings.targets)}: {error}") from error


def merged(module: Any) -> Any:
    """The module without LoRA: its products added to the matrices they stood beside. Where there are any it is a copy
    that shares all parts but those matrices and the modules around them."""
    if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
        adapted, base = copy.copy(module), copy.copy(module.get_base_layer())
        base._parameters = {name: _copy_of(weight) for name, weight in base._parameters.items()}
        adapted._modules = {**module._modules, "base_layer": base}
        adapted.merged_adapters = []
        adapted.merge()
        return base
    parts = {name: merged(part) for name, part in module.named_children()}
    if all(parts[name] is part for name, part in module.named_children()):
        return module
    made = copy.copy(module)
    made._modules = {**module._modules, **parts}
    if hasattr(made, "peft_config"):
        del made.peft_config
    if hasattr(made, "_hf_peft_config_loaded"):
        made._hf_peft_config_loaded = False
    return made


def _copy_of(weight: nn.Parameter | None) -> nn.Parameter | None:
    return None if weight is None else nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def files_of(tokenizer: Any) -> Mapping[str, bytes]:
    """The files that `save_pretrained` writes of a tokenizer."""
    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def tokenizer_of(files: Mapping[str, bytes]) -> Any:
    """The tokenizer of these files."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder, _text_files.quiet():
        for name, content in files.items():
            (Path(folder) / Path(name).name).write_bytes(content)
        return AutoTokenizer.from_pretrained(folder)


def write(uri: str | os.PathLike[str], module: nn.Module, tokenizer: Any, more: Mapping[str, str] = {}) -> None:
    """Save model (safetensors), tokenizer and `more` files into a folder or under an fsspec URI.

    Raises `ConfigError` where nothing can be written there.
    """
    import fsspec

    with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
        with _text_files.quiet():
            module.save_pretrained(folder)  # type: ignore[operator]
            tokenizer.save_pretrained(folder)
        for name, content in more.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        try:
            files, root = fsspec.core.url_to_fs(os.fspath(uri))
            files.makedirs(root, exist_ok=True)
            # config.json last: without it, what is there is no model
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == "config.json"):
                files.put_file(str(path), f"{root.rstrip('/')}/{path.name}")
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"cannot write a model to {os.fspath(uri)}: {error}") from error
