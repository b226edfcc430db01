"""What compiled loops do with addresses: ask for memory before it is needed, and take arrays that do not change from
call to call as one argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

from streamrec._compile import compiled

__all__ = ["held", "held_rows", "pointers_to", "touch"]


def _touch_line(typing: Any, array: Any, row: Any, column: Any) -> Any:
    """Ask for the line of the cache that holds array[row, column], of a two-dimensional array; do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = make_array(signature.args[0])(context, builder, arguments[0])  # type: ignore[no-untyped-call]
        stride = cgutils.unpack_tuple(builder, held.strides)[0]  # type: ignore[no-untyped-call]
        here = builder.add(builder.mul(arguments[1], stride), builder.mul(arguments[2], held.itemsize))
        address = builder.gep(builder.bitcast(held.data, cgutils.voidptr_t), [here])
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[cgutils.int32_t] * 3])
        name = "llvm.prefetch.p0"
        prefetch = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        builder.call(prefetch, [address, *(cgutils.int32_t(number) for number in (0, 3, 1))])  # to read, L1, data
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


touch: Any = intrinsic(_touch_line)


def _as_pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


_pointer: Any = intrinsic(_as_pointer)


def pointers_to(arrays: Sequence[NDArray[Any]], *numbers: int) -> NDArray[np.int64]:
    """int64: address and length of each of these arrays, then the numbers.

    To be passed to a compiled function in their stead: taking an array in costs it some 0.1 us, which is much where it
    is called for a single event. The caller keeps the arrays alive; they are C-contiguous, since nobody checks.
    """
    described = [(array.__array_interface__["data"][0], len(array)) for array in arrays]
    return np.array([*(number for pair in described for number in pair), *numbers], dtype=np.int64)


@compiled(inline=True)
def held(pointers: Any, number: int, kind: Any) -> Any:
    """The one-dimensional array that was the `number`-th of `pointers_to`."""
    return carray(_pointer(pointers[2 * number]), pointers[2 * number + 1], kind)


@compiled(inline=True)
def held_rows(pointers: Any, number: int, columns: int, kind: Any) -> Any:
    """The same of a two-dimensional one."""
    return carray(_pointer(pointers[2 * number]), (pointers[2 * number + 1], columns), kind)
