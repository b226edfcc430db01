"""State to bytes and back: one safetensors file, without pickle.

Arrays and tensors are safetensors entries named by their JSON pointer (RFC 6901), such as `/model/weights`, so any
safetensors reader opens the file. All else is one MessagePack document, the entry `__document__`, in which a
MessagePack extension stands where an array stood. Changes of another state hold `Changed` leaves: two arrays each,
`/model/weights/rows` and `/model/weights/values`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamrec.errors import DamagedError, StoreError
from streamrec.protocols import Changed, State

__all__ = ["pack", "pack_changes", "unpack"]

_DOCUMENT = "__document__"  # no pointer begins like this: they begin with a slash
_ALIGN = 16

_INT, _TEXT, _SCALAR, _ARRAY, _CHANGED = 1, 2, 3, 4, 5  # the extensions: written in files, so never renumbered

_ATOMS = frozenset({str, bytes, float, bool, type(None)})
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1  # what MessagePack holds by itself

# dtypes that every safetensors reader knows; others are written as U8 bytes, and the document says what they are
_PLAIN_BYTES = "U8"
_SAFE_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


class _Entry(msgspec.Struct, frozen=True):
    """What the safetensors header says of one array."""

    dtype: str
    shape: Sequence[int]
    data_offsets: tuple[int, int]


class _Reference(msgspec.Struct, frozen=True, array_like=True):
    """What stands in the document for an array: which entry, and what it was."""

    name: str
    library: str
    dtype: str
    shape: tuple[int, ...]


class _Scalar(msgspec.Struct, frozen=True, array_like=True):
    """What stands in the document for a numpy scalar."""

    dtype: str
    value: bytes


_header_decoder = msgspec.json.Decoder(dict[str, _Entry])
_reference_decoder = msgspec.msgpack.Decoder(_Reference)
_scalar_decoder = msgspec.msgpack.Decoder(_Scalar)


def pack(state: State) -> list[memoryview]:
    """The bytes of a safetensors file that holds `state`, as chunks to be written one after the other.

    No array is copied that is contiguous, little-endian and in main memory: its chunk is a view of it.
    Raises `StoreError` for a leaf that cannot be held, with its path and type.

    >>> state = {"bias": 0.5, "weights": np.zeros(3, dtype=np.float32)}
    >>> unpack(np.concatenate(pack(state)))
    {'bias': 0.5, 'weights': array([0., 0., 0.], dtype=float32)}
    """
    chunks, changed = pack_changes(state)
    if changed:
        raise StoreError(
            f"cannot store {changed}, which is Changed, without the version that it changes: pass base=its number"
        )
    return chunks


def pack_changes(state: State) -> tuple[list[memoryview], str | None]:
    """As `pack`, for a state that may hold `Changed` leaves; and the path of one of them, None where it holds none."""
    if not isinstance(state, Mapping):
        raise StoreError(f"state must be a mapping, got {_type_name(state)}")
    writer = _Writer()
    try:
        document = msgspec.msgpack.encode(writer.plain(state, ""))
    except UnicodeEncodeError:  # half of a surrogate pair, in some string: rare, so only then looked for in each
        writer = _Writer(half_pairs=True)
        document = msgspec.msgpack.encode(writer.plain(state, ""))
    return writer.file(document), writer.changed


def unpack(data: NDArray[np.uint8]) -> dict[str, Any]:
    """What `pack` was given. Arrays and tensors are views of `data`, as writable as it is.

    Runs nothing that stands in the bytes. Raises `DamagedError` for what `pack` has not written.
    """
    try:
        size = int.from_bytes(data[:8].tobytes(), "little")
        header = _header_decoder.decode(data[8 : 8 + size].data)
        state = _Reader(header, data[8 + size :]).state()
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"not a state that streamrec wrote: {error}") from error
    return state


class _Writer:
    """Turns a state into what MessagePack can hold, and gathers the arrays on the way."""

    def __init__(self, *, half_pairs: bool = False) -> None:
        self.half_pairs = half_pairs
        self.changed: str | None = None
        self.arrays: list[tuple[str, str, tuple[int, ...], int, memoryview]] = []

    def plain(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return _text(value) if self.half_pairs and kind is str else value
        if kind is int:
            return value if _INT_MIN <= value <= _INT_MAX else _big(value)
        if kind is list:
            return self.sequence(value, path)
        if isinstance(value, Mapping):
            return {_key(key, path): self.plain(each, f"{path}/{_escape(key)}") for key, each in value.items()}
        if kind is np.ndarray or kind is np.memmap:
            return self.array(value, path)
        if isinstance(value, np.generic) and _is_number(value.dtype):
            exact = value.astype(value.dtype.newbyteorder("<"))
            return _extension(_SCALAR, _Scalar(exact.dtype.str, exact.tobytes()))
        if kind is Changed:
            self.changed = path
            parts = (self.plain(value.rows, f"{path}/rows"), self.plain(value.values, f"{path}/values"), value.length)
            return msgspec.msgpack.Ext(_CHANGED, msgspec.msgpack.encode(parts))
        torch = sys.modules.get("torch")  # not imported by anyone: then nothing is a tensor
        if torch is not None and isinstance(value, torch.Tensor):
            return self.tensor(torch, value, path)
        raise StoreError(f"cannot store {path} of type {_type_name(value)}: {_cure(value)}")

    def sequence(self, values: list[Any], path: str) -> list[Any]:
        kinds = set(map(type, values))  # a list of a million ids is not walked one by one in Python
        if not self.half_pairs and kinds <= _ATOMS:
            return values
        if kinds == {int} and min(values) >= _INT_MIN and max(values) <= _INT_MAX:
            return values
        return [self.plain(each, f"{path}/{index}") for index, each in enumerate(values)]

    def array(self, value: NDArray[Any], path: str) -> msgspec.msgpack.Ext:
        if not _is_number(value.dtype):
            raise StoreError(f"cannot store {path}, an array of dtype {value.dtype}: use integers, floats or booleans")
        little = value.dtype.newbyteorder("<")
        flat = np.ascontiguousarray(value).reshape(-1)
        if little != value.dtype:
            flat = flat.byteswap().view(little)
        self.add(path, value.dtype.name, value.shape, value.dtype.itemsize, flat.view(np.uint8).data)
        return _extension(_ARRAY, _Reference(path, "numpy", little.str, value.shape))

    def tensor(self, torch: Any, value: Any, path: str) -> msgspec.msgpack.Ext:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "meta" if value.is_meta else str(value.layout)
            raise StoreError(f"cannot store {path}, a {kind} tensor: store dense tensors that hold data")
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # an empty tensor may have any strides, and then cannot be viewed as bytes
        flat = (dense.reshape(-1) if dense.numel() else torch.empty(0, dtype=dense.dtype)).view(torch.uint8).numpy()
        self.add(path, dtype, shape, value.element_size(), flat.data)
        return _extension(_ARRAY, _Reference(path, "torch", dtype, shape))

    def add(self, name: str, dtype: str, shape: tuple[int, ...], itemsize: int, chunk: memoryview) -> None:
        safe = _SAFE_NAMES.get(dtype, _PLAIN_BYTES)
        whole = shape if dtype in _SAFE_NAMES else (chunk.nbytes,)
        self.arrays.append((name, safe, whole, itemsize, chunk))

    def file(self, document: bytes) -> list[memoryview]:
        # widest items first: every array then begins at a multiple of its item size
        arrays = sorted(self.arrays, key=lambda array: -array[3])
        arrays.append((_DOCUMENT, _PLAIN_BYTES, (len(document),), 1, memoryview(document)))
        header: dict[str, _Entry] = {}
        begin = 0
        for name, dtype, shape, _, chunk in arrays:
            header[name] = _Entry(dtype, shape, (begin, begin + chunk.nbytes))
            begin += chunk.nbytes
        encoded = msgspec.json.encode(header)
        encoded += b" " * (-(8 + len(encoded)) % _ALIGN)
        head = len(encoded).to_bytes(8, "little") + encoded
        return [memoryview(head), *(array[4] for array in arrays)]


class _Reader:
    """Turns the document back, with views of `body` where arrays stood."""

    def __init__(self, header: Mapping[str, _Entry], body: NDArray[np.uint8]) -> None:
        self.header = header
        self.body = body

    def state(self) -> dict[str, Any]:
        state = msgspec.msgpack.decode(self.chunk(_DOCUMENT).data, ext_hook=self.extension)
        if type(state) is not dict:
            raise ValueError(f"a {_type_name(state)} where a mapping should be")
        return state

    def chunk(self, name: str) -> NDArray[np.uint8]:
        begin, end = self.header[name].data_offsets
        if not 0 <= begin <= end <= self.body.size:
            raise ValueError(f"{name} lies outside of the file")
        return self.body[begin:end]

    def extension(self, code: int, data: memoryview) -> Any:
        if code == _ARRAY:
            return self.array(_reference_decoder.decode(data))
        if code == _SCALAR:
            scalar = _scalar_decoder.decode(data)
            return np.frombuffer(scalar.value, dtype=_number_dtype(scalar.dtype))[0]
        if code == _INT:
            return int.from_bytes(data, "little", signed=True)
        if code == _TEXT:
            return bytes(data).decode("utf-8", "surrogatepass")
        if code == _CHANGED:
            return Changed(*msgspec.msgpack.decode(data, ext_hook=self.extension))
        raise ValueError(f"extension {code} is not known")

    def array(self, reference: _Reference) -> Any:
        chunk = self.chunk(reference.name)
        if reference.library == "numpy":
            return chunk.view(_number_dtype(reference.dtype)).reshape(reference.shape)
        if reference.library != "torch":
            raise ValueError(f"arrays of {reference.library!r} are not known")
        import torch

        dtype = getattr(torch, reference.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch {torch.__version__} has no dtype {reference.dtype!r}")
        if chunk.size == 0:
            return torch.empty(reference.shape, dtype=dtype)
        return torch.from_numpy(chunk).view(dtype).reshape(reference.shape)


def _extension(code: int, data: msgspec.Struct) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(data))


def _big(value: int) -> msgspec.msgpack.Ext:
    # numpy's random state holds integers of 128 bits
    return msgspec.msgpack.Ext(_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _text(value: str) -> str | msgspec.msgpack.Ext:
    try:
        value.encode()
    except UnicodeEncodeError:
        return msgspec.msgpack.Ext(_TEXT, value.encode("utf-8", "surrogatepass"))
    return value


def _key(key: Any, path: str) -> str:
    if type(key) is not str:
        raise StoreError(f"cannot store {path or 'state'} with the key {key!r}: keys must be str")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"cannot store {path or 'state'} with the key {key!r}: {error.reason}") from error
    return key


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _is_number(dtype: np.dtype[Any]) -> bool:
    # long doubles are left out: their bytes differ between machines
    return dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def _number_dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if not _is_number(dtype):
        raise ValueError(f"dtype {name!r} is not a number's")
    return dtype


def _cure(value: Any) -> str:
    if isinstance(value, (tuple, set, frozenset)):
        return "use a list"
    if isinstance(value, (bytearray, memoryview)):
        return "use bytes"
    return "use mappings with str keys, lists, numpy arrays, torch tensors, str, bytes, int, float, bool and None"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
