"""A process that learns for another: a `Learning` at the other end of two pipes, without an interpreter's lock, or
threads of torch, that both would wait for.

A message is its length and a MessagePack map; arrays and tensors are their type, shape and bytes. Nothing is pickled.
The process ends when the pipe to it closes, as it does whatever becomes of the one at the other end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from streamrec.errors import StreamrecError
from streamrec.models._text_learning import Example, Learning
from streamrec.models.text_encoder import TextEncoder, normalised
from streamrec.models.tuning import AdamW, LoRA

__all__ = ["Stopped", "TextProcess"]

NICE = 10
"""How far behind the stream it stands for a core that both want, as `nice` counts."""
TRIES = 3
"""How often what is asked is asked of a new process, where the one before died of it."""
ORPHANED = 1.0
"""Seconds until it sees that its parent is gone, where a copy of that (by fork) holds the pipe open."""

_START = "import sys; sys.path[:] = sys.argv[1:]; from streamrec.models._text_process import main; main()"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_ARRAY, _TENSOR = 1, 2


class Stopped(Exception):
    """Raised in the thread that waits for an answer when the process is stopped."""


class TextProcess:
    """A `Learning` in a process of its own, which begins with the first question and goes on from the `cut` here.

    One thread asks; `stop` may be called from any. A process that died is replaced by another that goes on from the
    last cut, and asked again; `restarts` counts them.
    """

    def __init__(self, here: Learning) -> None:
        self._here, self._encoder = here, here.first.twin()  # which is written down in another thread
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self._owner = 0
        self._stopped = False
        self.cut = here.cut
        self.restarts = 0

    def step(self, some: Sequence[Example]) -> int:
        """As `Learning.step`."""
        longest = self._encoder.longest
        texts = [normalised(one.text[:longest]) for one in some]
        answer = self._ask({"texts": texts, "numbers": [one[1:] for one in some]})
        self.cut = answer["cut"]
        return int(answer["learned"])

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Learning.embed`."""
        vectors: NDArray[np.float32] = self._ask({"texts": texts})["vectors"]
        return vectors

    def load(self, adapters: torch.Tensor, state: Any) -> None:
        """As `Learning.load`. Nothing may be asked meanwhile."""
        self.stop()
        self._here.load(adapters, state)
        self.cut = self._here.cut

    def go_on(self) -> None:
        """Let it be asked again after `stop`."""
        self._stopped = False

    def stop(self) -> None:
        """End the process, at once: all that it had told is here. Who waits for it has `Stopped`."""
        with self._turn:
            self._stopped = True
            process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():  # not a copy of it by fork
            _end(process)

    def _ask(self, question: Mapping[str, Any]) -> Any:
        for left in reversed(range(TRIES)):
            try:
                answer = _exchange(self._running(), question)
                break
            except (OSError, EOFError) as error:
                with self._turn:
                    if self._stopped:
                        raise Stopped from error
                    process, self._process = self._process, None
                self.restarts += 1
                status = "none could be started" if process is None else f"exit status {_end(process)}"
                if not left:
                    raise StreamrecError(
                        f"the process that learns died {TRIES} times in a row of the same question ({status}): is "
                        "there memory for a second copy of the encoder? TextLearner(background=False) needs none"
                    ) from error
        if "error" in answer:
            raise StreamrecError(f"in the process that learns: {answer['error']}")
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        encoder = self._encoder
        with tempfile.TemporaryDirectory(prefix="streamrec-") as folder:
            encoder.save_pretrained(folder)
            with self._turn:
                if self._stopped:
                    raise Stopped
                self._owner = os.getpid()
                process = self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, **_ONE_THREAD},
                )
            begin = {
                "parent": os.getpid(),
                "folder": folder,
                "device": str(next(encoder.module.parameters()).device),
                "tune": msgspec.to_builtins(self._here.tune),
                "optimizer": msgspec.to_builtins(self._here.optimizer),
                "cut": self.cut,
            }
            _exchange(process, begin)
        return process


def _exchange(process: subprocess.Popen[bytes], question: Mapping[str, Any]) -> Any:
    assert process.stdin is not None and process.stdout is not None
    _write(process.stdin, question)
    return _read(process.stdout)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Its exit status: whatever it does, it ends."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what is left to write has no reader
            assert pipe is not None
            pipe.close()
    return process.wait()


# -- messages ----------------------------------------------------------------------------------------------------------


def _told(value: Any) -> msgspec.msgpack.Ext:
    array = value.numpy() if isinstance(value, torch.Tensor) else np.ascontiguousarray(value)
    code = _TENSOR if isinstance(value, torch.Tensor) else _ARRAY
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode((array.dtype.str, array.shape, array.tobytes())))


def _heard(code: int, data: memoryview) -> Any:
    kind, shape, numbers = msgspec.msgpack.decode(data)
    array = np.frombuffer(bytearray(numbers), dtype=kind).reshape(shape)
    return torch.from_numpy(array) if code == _TENSOR else array


def _write(pipe: BinaryIO | Any, message: Mapping[str, Any]) -> None:
    data = msgspec.msgpack.encode(message, enc_hook=_told)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _read(pipe: BinaryIO | Any) -> Any:
    """Raises `EOFError` where the other end has closed."""
    size = pipe.read(8)
    data = pipe.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    if len(size) < 8 or len(data) < int.from_bytes(size, "little"):
        raise EOFError("the pipe was closed")
    return msgspec.msgpack.decode(data, ext_hook=_heard)


# -- the process -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Learn for the process at the other end of standard input and output, until it closes them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, which closes the pipe
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is none of the answers
    torch.set_num_threads(1)
    begin = _read(questions)
    threading.Thread(target=_end_with, args=[begin["parent"]], daemon=True).start()
    encoder = TextEncoder.from_pretrained(begin["folder"])
    encoder.module.to(begin["device"])
    tune, optimizer = msgspec.convert(begin["tune"], LoRA), msgspec.convert(begin["optimizer"], AdamW)
    learning = Learning(encoder, tune, optimizer)
    learning.load(torch.zeros(0), begin["cut"])
    if hasattr(os, "nice"):  # not before, or where all cores are busy it takes minutes to begin
        os.nice(NICE)
    answer: Mapping[str, Any] = {}
    while True:
        try:
            _write(answers, answer)
            question = _read(questions)
        except (OSError, EOFError):
            os._exit(0)
        try:
            answer = _answer(learning, question)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHANED)
    os._exit(0)


def _answer(learning: Learning, question: Mapping[str, Any]) -> Mapping[str, Any]:
    if "numbers" not in question:
        return {"vectors": learning.embed(question["texts"])}
    some = [Example(text, *both) for text, both in zip(question["texts"], question["numbers"], strict=True)]
    return {"learned": learning.step(some), "cut": learning.cut}
