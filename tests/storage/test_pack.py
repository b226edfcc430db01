from __future__ import annotations

import math
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from streamrec.errors import DamagedError, StoreError
from streamrec.storage._pack import pack, unpack

NUMPY_DTYPES = ["?", *"bBhHiIqQefdFD", *(f">{code}" for code in "hHiIqQefdFD")]
TORCH_DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64"]
TORCH_DTYPES += ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn"]


def there_and_back(state: Any) -> Any:
    return unpack(np.frombuffer(b"".join(pack(state)), dtype=np.uint8).copy())


def fingerprint(value: Any) -> Any:
    """What must come back: kinds, dtypes, shapes and bits, byte order and memory layout aside."""
    if isinstance(value, dict):
        return "dict", [(key, fingerprint(each)) for key, each in value.items()]
    if isinstance(value, list):
        return "list", [fingerprint(each) for each in value]
    if isinstance(value, (np.ndarray, np.generic)):
        native = value.astype(value.dtype.newbyteorder("<"))
        return isinstance(value, np.ndarray), native.dtype.str, value.shape, native.tobytes()
    if type(value).__module__ == "torch":
        import torch

        return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    return type(value), value


def bits(dtype: str) -> Any:
    """Arrays of any bits: every nan, both zeros."""
    wanted = np.dtype(dtype)
    if wanted.kind == "b":
        return npst.arrays(wanted, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    unsigned = np.dtype(f"u{wanted.itemsize if wanted.kind != 'c' else wanted.itemsize // 2}")
    pair = (2,) if wanted.kind == "c" else ()
    shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return shapes.flatmap(
        lambda shape: npst.arrays(unsigned, shape + pair).map(
            lambda array: array.reshape(-1).view(wanted).reshape(shape)
        )
    )


def odd_layout(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same values, not contiguous."""
    wide = np.zeros((*array.shape, 2), dtype=array.dtype)
    wide[..., 1] = array
    return wide[..., 1]


arrays = st.sampled_from(NUMPY_DTYPES).flatmap(bits)
scalars = arrays.filter(lambda array: array.size > 0).map(lambda array: array.reshape(-1)[0])
texts = st.text(st.characters(codec="utf-8"), max_size=6)
keys = st.text(st.sampled_from("a/~01_."), max_size=4) | st.sampled_from(["__document__", "__metadata__"]) | texts
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**130), max_value=2**130)
    | st.floats(width=64)
    | st.text(max_size=6)
    | st.binary(max_size=6)
    | arrays
    | arrays.map(odd_layout)
    | arrays.map(lambda array: np.asarray(array.T))
    | scalars
)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(keys, trees, max_size=5))
def test_every_state_comes_back_bit_for_bit(state: dict[str, Any]) -> None:
    back = there_and_back(state)

    assert fingerprint(back) == fingerprint(state)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_tensors_come_back_as_tensors(dtype: str, shape: tuple[int, ...]) -> None:
    import torch

    kind = getattr(torch, dtype)
    size = math.prod(shape) * torch.empty((), dtype=kind).element_size()
    raw = torch.from_numpy(
        np.random.default_rng(0).integers(0, 2, size, dtype=np.uint8) * (1 if dtype == "bool" else 255)
    )
    tensor = raw.view(kind).reshape(shape) if size else torch.empty(shape, dtype=kind)

    back = there_and_back({"model": [tensor, np.zeros(3)]})["model"]

    assert type(back[0]) is torch.Tensor and type(back[1]) is np.ndarray
    assert fingerprint(back[0]) == fingerprint(tensor)


def test_tensors_that_are_views_and_parameters_are_stored_as_what_they_show() -> None:
    import torch

    matrix = torch.arange(12.0).reshape(3, 4)
    state = {
        "column": matrix[:, 1],
        "turned": matrix.T,
        "parameter": torch.nn.Parameter(matrix),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }

    back = there_and_back(state)

    assert torch.equal(back["column"], matrix[:, 1])
    assert torch.equal(back["turned"], matrix.T)
    assert torch.equal(back["parameter"], matrix) and not back["parameter"].requires_grad
    assert torch.equal(back["conjugate"], torch.tensor([1 - 2j]))


def test_what_comes_back_is_writable_aligned_and_apart() -> None:
    import torch

    state: dict[str, Any] = {
        "flag": np.ones(3, bool),
        "wide": np.zeros(5),
        "half": np.zeros(7, np.float16),
        "tensor": torch.zeros(3),
    }

    back = there_and_back(state)

    for name in ("flag", "wide", "half"):
        assert back[name].flags.writeable and back[name].flags.aligned
        back[name][:] = 1
    back["tensor"] += 1
    assert not state["wide"].any() and not state["tensor"].any()
    assert back["flag"].all() and back["wide"].all() and back["half"].all() and back["tensor"].all()


def test_packing_copies_no_plain_array() -> None:
    weights = np.zeros((100, 17), dtype=np.float32)

    chunks = pack({"weights": weights, "step": 3})

    assert any(np.shares_memory(np.frombuffer(chunk, dtype=np.uint8), weights) for chunk in chunks if chunk.nbytes)


def test_the_random_state_of_numpy_fits() -> None:
    rng = np.random.default_rng(7)

    twin = np.random.default_rng()
    twin.bit_generator.state = there_and_back({"rng": rng.bit_generator.state})["rng"]

    assert twin.integers(0, 2**62) == rng.integers(0, 2**62)


def test_any_safetensors_reader_opens_it() -> None:
    state: dict[str, Any] = {
        "model": {"weights": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "a/b": [np.ones(2, bool)],
        "n": 1,
    }

    entries = safetensors.numpy.load(b"".join(pack(state)))

    assert set(entries) == {"/model/weights", "/a~1b/0", "__document__"}
    np.testing.assert_array_equal(entries["/model/weights"], state["model"]["weights"])


def test_a_bfloat16_tensor_is_one_for_safetensors_too() -> None:
    import safetensors.torch
    import torch

    tensor = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    entries = safetensors.torch.load(b"".join(pack({"tensor": tensor})))

    assert torch.equal(entries["/tensor"], tensor)


class Leaf:
    pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"join": {"open": [1, {"ids": {1, 2}}]}}, r"/join/open/1/ids of type set: use a list"),
        ({"at": (1, 2)}, r"/at of type tuple: use a list"),
        ({"raw": bytearray(b"x")}, r"/raw of type bytearray: use bytes"),
        ({"leaf": Leaf()}, r"/leaf of type .*test_pack\.Leaf"),
        ({"z": 1j}, r"/z of type complex"),
        ({"a": np.array(["x"])}, r"/a, an array of dtype <U1"),
        ({"a": np.array([None])}, r"/a, an array of dtype object"),
        ({"a": np.ma.masked_array([1])}, r"/a of type numpy\..*MaskedArray"),
        ({"a": np.longdouble(1)}, r"/a of type numpy\.longdouble"),
        ({"a": np.str_("x")}, r"/a of type numpy\.str_"),
        ({"a": {1: "x"}}, r"/a with the key 1: keys must be str"),
        ({1: "x"}, r"state with the key 1: keys must be str"),
        ({"a": {"\ud800": 1}}, r"/a with the key '\\ud800'"),
        ([1], r"must be a mapping, got list"),
    ],
)
def test_what_cannot_be_held_is_refused_by_path_and_type(state: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        pack(state)


def test_tensors_that_cannot_be_held_are_refused() -> None:
    import torch

    with pytest.raises(StoreError, match=r"/t, a torch.sparse_coo tensor"):
        pack({"t": torch.eye(2).to_sparse()})
    with pytest.raises(StoreError, match=r"/t, a meta tensor"):
        pack({"t": torch.empty(2, device="meta")})


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_broken_bytes_are_damage_or_another_state_and_nothing_else(data: st.DataObject) -> None:
    # the checksum has been passed when `unpack` is called: this is about bytes that somebody made up
    whole = b"".join(pack({"w": np.arange(4.0), "n": [np.float32(1), 2**70, None], "s": "x"}))
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))

    try:
        state = unpack(np.frombuffer(bytes(broken[:cut]), dtype=np.uint8).copy())
    except DamagedError:
        return
    assert isinstance(state, dict)


def test_torch_is_imported_for_tensors_alone() -> None:
    program = """
import sys
import numpy as np
from streamrec.storage import Store
shelf = Store("memory://no-torch").checkpoints
shelf.write({"weights": np.zeros(3), "n": 1})
assert shelf.read() is not None
assert "torch" not in sys.modules, "torch"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
