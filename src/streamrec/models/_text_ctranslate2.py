"""CTranslate2 as the encoder's backend: the same weights in int8, for processors.

In float32 its vectors differ in their last bits with what they are computed with, even in batches of one length: what
is 14 texts in 160 of all-MiniLM, cut in three. So it is not offered. In int8 none was seen to, alone or in any company:
its products are sums of whole numbers, by a scale of each token's own.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from streamrec.errors import ConfigError
from streamrec.models._text_files import quiet

__all__ = ["CTranslate2"]

WIDTH = "CT2_FORCE_CPU_ISA"


class CTranslate2:
    """The last layer of a model of transformers, computed by CTranslate2.

    The model is converted when this is made, from a copy on the disk that is gone afterwards. Raises `ConfigError`
    where the package is missing, or where it does not know such a model.
    """

    def __init__(self, module: Any, tokenizer: Any, precision: str) -> None:
        try:
            import ctranslate2
            from ctranslate2.converters import TransformersConverter
        except ImportError as error:
            raise ConfigError(
                'backend="ctranslate2" needs the package: pip install "streamrec[ctranslate2]"'
            ) from error
        with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
            source, made = Path(folder) / "source", Path(folder) / "made"
            module.save_pretrained(source)
            tokenizer.save_pretrained(source)
            _complete(source / "config.json")
            try:
                with quiet():
                    TransformersConverter(str(source)).convert(str(made), quantization=precision)
            except ValueError as error:
                kind = type(module).__name__
                raise ConfigError(f'CTranslate2 does not know a {kind}: {error}. Use backend="torch".') from error
            with _widest():
                self._encoder = ctranslate2.Encoder(
                    str(made), device="cpu", compute_type=precision, inter_threads=1, intra_threads=1
                )

    def __call__(self, ids: Any) -> Any:
        """The last layer, a tensor (n, tokens, hidden), of ids (n, tokens) without padding."""
        import torch

        states = np.array(self._encoder.forward_batch(ids.tolist()).last_hidden_state, dtype=np.float32)
        return torch.from_numpy(states)


@contextmanager
def _widest() -> Iterator[None]:
    """The first encoder of a process that is made inside computes by the widest vectors the processor has, and so do
    all after it: CTranslate2 alone chooses AVX2 on those that are not Intel's, a sixth slower in int8. Who has set the
    variable is obeyed."""
    import torch

    if WIDTH in os.environ or torch.backends.cpu.get_cpu_capability() != "AVX512":
        yield
        return
    os.environ[WIDTH] = "AVX512"
    try:
        yield
    finally:
        del os.environ[WIDTH]


def _complete(path: Path) -> None:
    """Say in a config what transformers 5 no longer says, and CTranslate2 asks for: positions are counted from 0."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"position_embedding_type": "absolute", **config}), encoding="utf-8")
