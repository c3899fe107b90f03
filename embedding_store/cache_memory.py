"""Numbers at byte offsets of a uint8 array, and the few accesses whose order other threads rely on. For kernels only.

A cache keeps ids, owners, versions and rows side by side in one array, so that they share cache lines and pages;
numba's views would need one array per type. Offsets are not checked. Loads give int64, zero-extended below 64 bits.

A sequence lock (Boehm, Can seqlocks get along with programming language memory models?, MSPC 2012) needs fences and not
only volatile accesses: x86 keeps loads and stores in order by itself, ARM does not, and neither does the compiler.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


def _intrinsic(generator: Any) -> Any:
    """Typed as kernels call it, which is without the context."""
    return intrinsic(generator)


def _place(context: Any, builder: Any, signature: Any, args: Any, bits: int) -> Any:
    """Pointer to the integer of `bits` at byte args[1] of the array args[0]."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(bits).as_pointer())


def _loader(bits: int, ordering: str | None = None) -> Any:
    @_intrinsic
    def load(typingctx, memory, at):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            place = _place(context, builder, signature, args, bits)
            value = builder.load_atomic(place, ordering, bits // 8) if ordering else builder.load(place, align=1)
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.int64(memory, types.int64), generate

    return load


def _storer(bits: int, ordering: str | None = None) -> Any:
    @_intrinsic
    def store(typingctx, memory, at, value):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            place = _place(context, builder, signature, args, bits)
            low = builder.trunc(args[2], ir.IntType(bits)) if bits < 64 else args[2]
            if ordering:
                builder.store_atomic(low, place, ordering, bits // 8)
            else:
                builder.store(low, place, align=1)
            return context.get_dummy_value()

        return types.void(memory, types.int64, types.int64), generate

    return store


def _fence(ordering: str) -> Any:
    @_intrinsic
    def fence(typingctx):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            builder.fence(ordering)
            return context.get_dummy_value()

        return types.void(), generate

    return fence


load8, load16, load32, load64 = _loader(8), _loader(16), _loader(32), _loader(64)
store8, store16, store32, store64 = _storer(8), _storer(16), _storer(32), _storer(64)
load32_relaxed, load32_acquire = _loader(32, "monotonic"), _loader(32, "acquire")
store32_relaxed, store32_release = _storer(32, "monotonic"), _storer(32, "release")
fence_acquire, fence_release = _fence("acquire"), _fence("release")


@_intrinsic
def add_atomic(typingctx, numbers, at, amount):  # type: ignore[no-untyped-def]
    """numbers[at] += amount for int64 [n], whoever else adds at the same time."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "monotonic")
        return context.get_dummy_value()

    return types.void(numbers, types.int64, types.int64), generate


@_intrinsic
def prefetch(typingctx, memory, at):  # type: ignore[no-untyped-def]
    """Starts to fetch the cache line of this byte, to be read."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _place(context, builder, signature, args, 8)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        builder.call(
            builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind),
            [place, number(0), number(3), number(1)],
        )  # read, keep in all levels, data
        return context.get_dummy_value()

    return types.void(memory, types.int64), generate


def _splat(builder: Any, value: Any) -> Any:
    """A vector of 8 times the value."""
    undefined = ir.Constant(ir.VectorType(value.type, 8), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), 8), None))


@_intrinsic
def equal8(typingctx, memory, at64, number64, at32, number32):  # type: ignore[no-untyped-def]
    """A bit for each of 8 places: the 64-bit numbers from at64 on and the 32-bit ones from at32 on are both the given
    ones. As vectors by hand, a fifth of the time: the compiler makes single comparisons of a loop."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        wide, narrow = ir.VectorType(ir.IntType(64), 8), ir.VectorType(ir.IntType(32), 8)
        numbers64 = builder.load(builder.bitcast(builder.gep(data, [args[1]]), wide.as_pointer()), align=8)
        numbers32 = builder.load(builder.bitcast(builder.gep(data, [args[3]]), narrow.as_pointer()), align=4)
        low = builder.trunc(args[4], ir.IntType(32))
        same = builder.and_(
            builder.icmp_unsigned("==", numbers64, _splat(builder, args[2])),
            builder.icmp_unsigned("==", numbers32, _splat(builder, low)),
        )
        return builder.zext(builder.bitcast(same, ir.IntType(8)), ir.IntType(64))

    return types.int64(memory, types.int64, types.int64, types.int64, types.int64), generate


@_intrinsic
def lowest_bit(typingctx, number):  # type: ignore[no-untyped-def]
    """Place of the lowest bit that is set; 64 for 0."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.int64(types.int64), generate


@_intrinsic
def count_bits(typingctx, number):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.int64(types.int64), generate


@njit(cache=True, nogil=True, inline="always")
def copy(target, to, source, start, size):  # type: ignore[no-untyped-def]
    """target[to : to + size] = source[start : start + size], by words: rows are short, so a call would cost as much."""
    whole = size & ~7
    for at in range(0, whole, 8):
        store64(target, to + at, load64(source, start + at))
    if size & 4:
        store32(target, to + whole, load32(source, start + whole))
    for at in range(size & ~3, size):
        target[to + at] = source[start + at]
