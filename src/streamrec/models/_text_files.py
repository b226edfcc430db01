"""Where a text encoder's weights and tokenizer come from: a folder, an fsspec URI, or a hub; and whether they fit."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from streamrec.errors import ConfigError

__all__ = ["HUB_SECONDS", "Loaded", "load", "local", "most_tokens", "quiet", "require_fit", "resolved"]

HUB_SECONDS = 5.0
"""How long the hub may take to say whether it has a model."""
ROUNDED = 16
"""An embedding table may have a sixteenth more rows than its tokenizer has tokens: such tables are often rounded up."""

_WANTED = re.compile(r"\.(json|txt|model|safetensors|jinja)$|^(vocab|merges)")
_VOCABULARY = re.compile(r"^tokenizer\.json$|^vocab|\.model$|^spiece")
_HEADS = re.compile(r"(^|\.)(pooler|cls|classifier|lm_head|discriminator_predictions|generator_predictions)\.")


@contextmanager
def local(model: str | os.PathLike[str]) -> Iterator[str]:
    """A folder that holds the files of `model`, or the name of one that the hub has, for the time inside.

    Raises `ConfigError` that names what was looked for where there is none.
    """
    name = os.fspath(model)
    if "://" in name and not name.startswith("file://"):
        with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
            _fetch(name, Path(folder))
            yield folder
        return
    yield resolved(name)


def resolved(name: str) -> str:
    """The folder of that name, else the name, where the hub or its cache on this machine has such a model."""
    folder = Path(name.removeprefix("file://")).expanduser()
    if folder.is_dir():
        there = sorted(path.name for path in folder.iterdir())
        lacks = "" if "config.json" in there else "config.json"
        if not lacks and not any(_VOCABULARY.search(file) for file in there):
            lacks = "file of a tokenizer"
        if lacks:
            raise ConfigError(
                f"no model in {folder.absolute()}: it has no {lacks}, only {', '.join(there[:8]) or 'nothing'}. "
                "Pass a folder into which the model and its tokenizer were saved by save_pretrained."
            )
        return str(folder)
    tried = f"no such folder: {folder.absolute()}"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ConfigError(f"no model {name!r}: {tried}, and it is no name that a hub could have")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    _ask_hub(name, tried)
    return name


def _ask_hub(name: str, tried: str) -> None:
    """Raise `ConfigError` unless the hub has this model: one question, where loading takes minutes of retries."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever HTTP client the hub uses: all of them mean that it cannot be had
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"no model {name!r}: {tried}; none of that name in the hub's cache on this machine; and the hub at "
            f"{api.endpoint} gave none ({said[0]}). "
            "Fetch it where there is a network, and pass its folder."
        ) from error


def _fetch(uri: str, folder: Path) -> None:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(uri)
        names = [str(found["name"]) for found in files.ls(root, detail=True) if found["type"] == "file"]
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"no model at {uri}: {type(error).__name__}: {error}") from error
    wanted = [name for name in names if _WANTED.search(name.rsplit("/", 1)[-1])]
    if not any(name.endswith("/config.json") for name in wanted):
        found = ", ".join(sorted(name.rsplit("/", 1)[-1] for name in names)[:8]) or "nothing"
        raise ConfigError(f"no model at {uri}: it has no config.json, only {found}")
    for name in wanted:
        files.get_file(name, str(folder / name.rsplit("/", 1)[-1]))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what they would warn of is raised here."""
    from transformers.utils import logging as talk

    bars = talk.is_progress_bar_enabled()
    before = talk.get_verbosity()
    talk.disable_progress_bar()  # type: ignore[no-untyped-call]
    talk.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        talk.set_verbosity(before)
        if bars:
            talk.enable_progress_bar()  # type: ignore[no-untyped-call]


class Loaded(NamedTuple):
    """A model in float32 and eval mode, its tokenizer, and the names of the weights that its files lack (a head's) and
    of those in its files that were left."""

    module: Any
    tokenizer: Any
    new: Sequence[str]
    left: Sequence[str]


def load(folder: str, named: str, kind: str, **settings: Any) -> Loaded:
    """By the class `kind` of transformers, with these settings; an `add_pooling_layer` among them is left out where the
    model never had a pooler.

    Raises `ConfigError`, naming them, where weights of the encoder are missing, or where some are left that belong to
    its layers, or where the tokenizer is another model's.
    """
    import torch
    import transformers

    auto = getattr(transformers, kind)
    with quiet(), torch.random.fork_rng([]):
        try:
            try:
                module, report = auto.from_pretrained(folder, output_loading_info=True, **settings)
            except TypeError:
                if settings.pop("add_pooling_layer", None) is None:
                    raise
                module, report = auto.from_pretrained(folder, output_loading_info=True, **settings)
        except Exception as error:  # of whichever library reads the files, of many types
            raise ConfigError(f"the model in {named} cannot be loaded: {error}") from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise ConfigError(f"the tokenizer in {named} cannot be loaded: {error}") from error
    prefix = "" if module.base_model is module else f"{module.base_model_prefix}."  # an encoder alone has no head
    new, left = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    lost = [key for key in new if key.startswith(prefix) and not _HEADS.search(key)]
    if lost:
        raise ConfigError(
            f"the checkpoint in {named} lacks {some(lost)}, which would be random numbers: its config.json is "
            "of another model, or it was not written whole"
        )
    ours = {name for name, _ in (*module.named_children(), *module.base_model.named_children())}
    body = [key for key in left if not _HEADS.search(key) and not key.endswith("position_ids")]
    body = [key for key in body if ours & set(key.split(".")[:2])]
    if body:
        raise ConfigError(
            f"the checkpoint in {named} has {some(body)} that its config.json does not know, such as layers beyond "
            f"its {getattr(module.config, 'num_hidden_layers', 'number')}: it would not be that model"
        )
    require_fit(module, tokenizer, named)
    return Loaded(module.to(torch.float32).eval(), tokenizer, new, left)


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def most_tokens(config: Any) -> int:
    """How many positions the model has for tokens."""
    rows = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    offset = (config.pad_token_id or 0) + 1 if config.model_type in _SHIFTED else 0
    return rows - offset


_SHIFTED = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text", "longformer"}


def require_fit(module: Any, tokenizer: Any, named: str) -> None:
    """Raise `ConfigError` unless the tokenizer is the model's, as far as the number of its tokens tells."""
    rows, tokens = int(module.get_input_embeddings().weight.shape[0]), len(tokenizer)
    if not 0 <= rows - tokens <= rows // ROUNDED:
        raise ConfigError(
            f"the tokenizer in {named} has {tokens:,} tokens and the model has vectors for {rows:,}: "
            "it is another model's. Pass the folder that holds both as they were saved together."
        )
    theirs, ours = tokenizer.pad_token_id, module.config.pad_token_id
    if theirs is not None and ours is not None and theirs != ours:
        raise ConfigError(
            f"the tokenizer in {named} pads with token {theirs} and the model with {ours}: it is another model's"
        )


def inside(precision: str, device: str) -> Any:
    """The autocast that a precision means."""
    import torch

    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()
