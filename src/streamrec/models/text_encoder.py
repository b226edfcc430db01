"""TextEncoder: texts to vectors, by a pretrained model of the BERT family; one text, one vector."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from streamrec.errors import ConfigError
from streamrec.models import _text_files
from streamrec.models._text_ctranslate2 import CTranslate2

if TYPE_CHECKING:
    import torch

__all__ = ["TextEncoder", "normalised"]

POOLINGS = ("mean", "cls", "none")
PRECISIONS = {"torch": ("float32", "bfloat16"), "ctranslate2": ("int8",)}
SETTINGS = "streamrec.json"
USUAL_TOKENS = 128
CHARACTERS = 32
"""Of a text, as many characters are read for each token it may have; a megabyte is not tokenized for its first page."""
FEWEST_ROWS = 16
"""In float32, matrix products of fewer rows take other paths, which round differently."""

_DROPPED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]+")
_BLANK = re.compile("[ \t\n\r]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def normalised(text: str) -> str:
    """The text as an encoder reads it: control characters dropped, runs of white space one space, none at the ends,
    lone surrogates U+FFFD. Two texts of the same form have the same vector.

    >>> normalised("  red\\x00 wine\\n\\tglass ")
    'red wine glass'
    """
    if not text.isprintable() and text.isascii():
        text = _DROPPED.sub("", text)
    elif not text.isascii():
        text = _SURROGATE.sub("\ufffd", _DROPPED.sub("", text))
    return _BLANK.sub(" ", text).strip(" ")


class TextEncoder:
    """Vectors of texts by any checkpoint of the BERT family that `transformers.AutoModel` loads.

    `model`: a folder, an fsspec URI of one, or a name on the hub. `pooling`: "mean" or "cls" of the last layer, or
    "none": `states` only. `prefix` is put before every text, as E5 wants ("query: "). Texts are cut at `max_tokens`,
    those of prefix and special tokens among them; None: 128, or what the model has positions for. `backend`:
    "torch", or "ctranslate2", which `pip install "streamrec[ctranslate2]"` brings. `precision`: "float32"
    or, for processors that have it, "bfloat16" with torch, "int8" with ctranslate2; None: the first. `compile`: by
    torch.compile, which takes a minute.
    `threads`: how many batches of `batch_tokens` tokens are computed at a time, each of them by one thread.

    **A text's vector does not depend on the texts it comes with**: `embed([a, b])` is `embed([a])` and `embed([b])`,
    bit for bit, on one machine. So texts are computed with others of exactly their number of tokens, without padding,
    never fewer than 16 tokens at a time, and each product by one thread, for two would share it out by its size. In
    float32 they are what transformers gives for a padded batch, to 1e-5.

    No text at all, an empty one and one of white space have the zero vector, as has one of which the tokenizer keeps
    nothing. Texts are read as `normalised` gives them, 32 characters at most for each of `max_tokens`.

    Raises `ConfigError` where the model cannot be had, where weights are missing or belong to another model, where
    the tokenizer does not fit it, and where an argument cannot work.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        pooling: str = "mean",
        prefix: str = "",
        max_tokens: int | None = None,
        backend: str = "torch",
        precision: str | None = None,
        compile: bool = False,
        threads: int = 1,
        batch_tokens: int = 4096,
    ) -> None:
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if backend not in PRECISIONS:
            raise ConfigError(f"backend must be one of {', '.join(PRECISIONS)}, got {backend!r}")
        precision = PRECISIONS[backend][0] if precision is None else precision
        if precision not in PRECISIONS[backend]:
            known = ", ".join(PRECISIONS[backend])
            raise ConfigError(f'precision must be one of {known} with backend="{backend}", got {precision!r}')
        asked = (
            ("max_tokens", USUAL_TOKENS if max_tokens is None else max_tokens, 3),
            ("batch_tokens", batch_tokens, FEWEST_ROWS),
            ("threads", threads, 1),
        )
        for name, value, least in asked:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of {least} at least, got {value!r}")
        self.model = os.fspath(model)
        self.pooling, self.prefix = pooling, prefix
        self.backend, self.precision, self.compile = backend, precision, compile
        self.threads, self.batch_tokens = threads, batch_tokens
        self._module: torch.nn.Module
        with _text_files.local(model) as folder:
            loaded = _text_files.load(folder, self.model, "AutoModel", add_pooling_layer=False)
        self._module, self.tokenizer, self.ignored_weights = loaded.module, loaded.tokenizer, tuple(loaded.left)
        self._module.requires_grad_(False)
        most = _text_files.most_tokens(self._module.config)
        if max_tokens is not None and max_tokens > most:
            raise ConfigError(f"max_tokens must be {most} at most, the positions of {self.model}, got {max_tokens}")
        self.max_tokens = max_tokens or min(USUAL_TOKENS, most)
        self.hidden = int(self._module.config.hidden_size)  # type: ignore[union-attr,arg-type]
        self._special = len(self.tokenizer("", add_special_tokens=True)["input_ids"])
        self._lent = False
        self._seen: tuple[Any, ...] = ()
        self._version = ""
        self._prepare()
        if backend != "torch":
            _ = self.version  # of the weights that were copied

    def _prepare(self) -> None:
        """Make ready what computes the last layer by the weights as they are now."""
        self._run: Any
        self._fewest = FEWEST_ROWS
        if self.backend == "ctranslate2":
            self._run, self._fewest = CTranslate2(self._module, self.tokenizer, self.precision), 1
            return
        module: Any = self._module
        if self.compile:
            import torch

            module = torch.compile(module, dynamic=True)
        self._run = lambda ids: module(input_ids=ids).last_hidden_state

    @property
    def module(self) -> torch.nn.Module:
        """The model, for those who train it: from the first look at it on, `version` looks at every weight."""
        self._lent = True
        return self._module

    def twin(self, module: torch.nn.Module | None = None, version: str = "") -> Self:
        """Such an encoder: by a copy of the model that shares its weights, and with a tokenizer of its own, so that
        another thread may use it; or by another `module` of its kind, with the same tokenizer, which takes
        milliseconds. `version`: what is to tell its vectors from others'; "": a digest, as ever."""
        made = copy.copy(self)
        if module is None:
            made.tokenizer = copy.deepcopy(self.tokenizer)
            shared = {id(weight): weight for weight in self._module.parameters()}
            module = copy.deepcopy(self._module, shared)
        made._module = module
        made._lent, made._seen, made._version = False, (), version
        made._prepare()
        if made.backend != "torch":
            _ = made.version  # of the weights that were copied
        return made

    def embed(self, texts: Sequence[str | None]) -> NDArray[np.float32]:
        """float32 `(n, hidden)`: the texts' vectors. Each distinct text is computed once."""
        if self.pooling == "none":
            raise ConfigError('an encoder with pooling="none" has no vector for a text: use states, or pooling="mean"')
        found = np.zeros((len(texts), self.hidden), dtype=np.float32)
        for places, states in self._computed(texts):
            with one_thread():
                pooled = states[:, 0] if self.pooling == "cls" else states.mean(1)
            vectors = pooled.float().cpu().numpy()
            for vector, at in zip(vectors, places, strict=True):
                found[at] = vector
        return found

    def states(self, texts: Sequence[str | None]) -> list[NDArray[np.float32]]:
        """For each text float32 `(tokens, hidden)`: its last layer, special tokens among them; no rows for no text."""
        found = [np.zeros((0, self.hidden), dtype=np.float32)] * len(texts)
        for places, states in self._computed(texts):
            for state, at in zip(states.float().cpu().numpy(), places, strict=True):
                for place in at:
                    found[place] = state.copy()
        return found

    def tokens(self, texts: Sequence[str | None]) -> list[list[int]]:
        """The tokens of each text, prefix and special tokens among them; none where there is nothing to read."""
        return self._tokens([normalised(text[: self.longest]) if text else "" for text in texts])

    @property
    def longest(self) -> int:
        """How many characters of a text are read."""
        return CHARACTERS * self.max_tokens

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            [self.prefix + text for text in texts],
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        empty = self._special + len(self.tokenizer(self.prefix, add_special_tokens=False)["input_ids"])
        return [one if text and len(one) > empty else [] for text, one in zip(texts, ids, strict=True)]

    def _computed(self, texts: Sequence[str | None]) -> Iterator[tuple[list[list[int]], torch.Tensor]]:
        """Places among `texts`, and the last layer there: (m, tokens, hidden) for m texts of one number of tokens."""
        import torch

        places: dict[str, list[int]] = {}
        for n, text in enumerate(texts):
            if text:
                places.setdefault(normalised(text[: self.longest]), []).append(n)
        places.pop("", None)
        distinct = list(places)
        tokens = self._tokens(distinct)
        groups: dict[int, list[int]] = {}
        for n, ids in enumerate(tokens):
            if ids:
                groups.setdefault(len(ids), []).append(n)
        if self.backend != "torch":
            _ = self.version  # a copy of the weights follows them
        device = next(self._module.parameters()).device
        parts: list[tuple[list[int], torch.Tensor]] = []
        for length in sorted(groups):
            most, least = max(self.batch_tokens // length, 1), -(-self._fewest // length)
            for start in range(0, len(groups[length]), most):
                part = groups[length][start : start + most]
                rows = [tokens[n] for n in part]
                rows += rows[-1:] * (least - len(rows))  # the same product as if there were more
                parts.append((part, torch.tensor(rows, device=device)))
        for (part, _), states in zip(parts, self._run_all([ids for _, ids in parts]), strict=True):
            yield [places[distinct[n]] for n in part], states[: len(part)]

    def _run_all(self, batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        if self.threads == 1 or len(batches) < 2:
            yield from map(self._run_one, batches)
            return
        with ThreadPoolExecutor(self.threads, thread_name_prefix="streamrec-text") as pool:
            yield from pool.map(self._run_one, batches)

    def _run_one(self, ids: torch.Tensor) -> torch.Tensor:
        """The last layer, (n, tokens, hidden)."""
        import torch

        with one_thread(), torch.inference_mode(), _text_files.inside(self.precision, ids.device.type):
            states: torch.Tensor = self._run(ids)
            return states

    @property
    def version(self) -> str:
        """A digest of all that a text's vector depends on but the machine: 32 hexadecimal digits.

        It is made again when weights of `module` have been changed in place by torch's own operations (not through
        `.data`), or when others have taken their place.
        """
        if self._version and not self._lent:
            return self._version
        seen = tuple((name, weight._version) for name, weight in self._module.state_dict().items())
        if seen != self._seen or not self._version:
            if self._version and self.backend != "torch":
                self._prepare()  # which holds a copy of the weights
            self._version, self._seen = self._digest(), seen
        return self._version

    def _digest(self) -> str:
        digest = hashlib.sha256(b"streamrec text encoder 1")
        made = {
            "pooling": self.pooling,
            "prefix": self.prefix,
            "max_tokens": self.max_tokens,
            "backend": self.backend,
            "precision": self.precision,
            "compile": self.compile,
            "tokenizer": self._tokenizer_text(),
        }
        digest.update(json.dumps(made, sort_keys=True).encode())
        for name, weight in sorted(self._module.state_dict().items()):
            array = weight.detach().cpu().contiguous().view(-1)
            digest.update(f"{name} {array.dtype} {tuple(weight.shape)}".encode())
            digest.update(array.float().numpy().tobytes() if array.dtype.itemsize == 2 else array.numpy().data)
        return digest.hexdigest()[:32]

    def _tokenizer_text(self) -> str:
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:  # one written in Python
            return json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        made = json.loads(fast.to_str())
        made.pop("truncation", None)  # as the last call left them
        made.pop("padding", None)
        return json.dumps(made, sort_keys=True)

    def config(self) -> dict[str, Any]:
        """The arguments that make such an encoder again, where `model` can still be found."""
        return {"model": self.model, **self._settings()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The encoder of a `config()`."""
        return cls(**config)

    def _settings(self) -> dict[str, Any]:
        names = ("pooling", "prefix", "max_tokens", "backend", "precision", "compile", "threads", "batch_tokens")
        return {name: getattr(self, name) for name in names}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model (safetensors) and tokenizer, which plain transformers reads, and these settings beside them."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with _text_files.quiet():
            self._module.save_pretrained(path)  # type: ignore[operator]
            self.tokenizer.save_pretrained(path)
        (path / SETTINGS).write_text(json.dumps(self._settings(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """The encoder that `save_pretrained` wrote: the same version."""
        with _text_files.local(folder) as path:
            try:
                settings = json.loads((Path(path) / SETTINGS).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"no encoder of streamrec in {os.fspath(folder)}: {error}. TextEncoder(folder) takes any model."
                ) from error
            made = cls(path, **settings)
        made.model = os.fspath(folder)
        return made


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, in this thread of Python and inside; as before, after."""
    import torch

    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
