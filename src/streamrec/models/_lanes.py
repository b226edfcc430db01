"""The inner product of long vectors, by the processor's own vectors of numbers.

A compiler makes no vectors of a sum, for that would be to add in another order. Here the order is written down: four
times eight sums, added up in pairs, so that it is fast and the same everywhere.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

__all__ = ["long_dot"]

LANES, SUMS = 8, 4


def _long_dot(typing: Any, these: Any, those: Any, count: Any) -> Any:
    """The inner product of the first `count` numbers of two float32 arrays without gaps."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, index = ir.FloatType(), arguments[2].type
        vector = ir.VectorType(number, LANES)
        sides = [
            make_array(kind)(context, builder, given).data  # type: ignore[no-untyped-call]
            for kind, given in zip(signature.args[:2], arguments[:2], strict=True)
        ]

        def product(at: Any, kind: Any) -> Any:
            places = [builder.bitcast(builder.gep(side, [at]), kind.as_pointer()) for side in sides]
            return builder.fmul(*(builder.load(place, align=4) for place in places))

        def add(to: Any, more: Any) -> None:
            builder.store(builder.fadd(builder.load(to), more), to)

        zeros = ir.Constant(vector, [0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zeros) for _ in range(SUMS)]  # type: ignore[no-untyped-call]
        block = index(LANES * SUMS)
        blocks = builder.sdiv(arguments[2], block)
        with cgutils.for_range(builder, blocks) as loop:
            begin = builder.mul(loop.index, block)
            for n, to in enumerate(sums):
                add(to, product(builder.add(begin, index(n * LANES)), vector))
        left = [builder.load(one) for one in sums]
        while len(left) > 1:
            left = [builder.fadd(a, b) for a, b in zip(left[::2], left[1::2], strict=True)]
        left = [builder.extract_element(left[0], cgutils.int32_t(n)) for n in range(LANES)]
        while len(left) > 1:
            left = [builder.fadd(a, b) for a, b in zip(left[::2], left[1::2], strict=True)]
        whole = cgutils.alloca_once_value(builder, left[0])  # type: ignore[no-untyped-call]
        rest = cgutils.for_range(builder, arguments[2], start=builder.mul(blocks, block))
        with rest as loop:
            add(whole, product(loop.index, number))
        return builder.load(whole)

    return types.float32(these, those, types.intp), generate


long_dot: Any = intrinsic(_long_dot)
