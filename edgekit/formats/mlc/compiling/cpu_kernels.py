"""What TVM's own schedules do slowly on a processor: products with stored matrices, and attention.

A packed word holds codes of neighbouring columns, so the columns of ``x`` are laid out anew: all
that are first in their word, then all that are second. Then a vector register holds words side by
side, and each shift gives codes that meet consecutive numbers of ``x``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from edgekit.formats.mlc.compiling import cpu_delta_kernels
from edgekit.formats.mlc.compiling.model import Kernels
from edgekit.formats.mlc.compiling.shape import StoredWeight
from edgekit.model.mixers import DeltaNet


_OPAQUE = 8  # TVM's kOpaque: fused with nothing
_ROWS = 4  # of x, and of a matrix, whose products are in registers at once
_MOST_LANES = 16


def _lanes(count: int) -> int:
    """Return how many numbers a vector holds where ``count`` is a multiple of it."""
    return math.gcd(count, _MOST_LANES)


class CpuKernels(Kernels):
    """Products in float32, whatever the weights are stored in."""

    def linear(self, x: Any, tensors: list[Any], weight: StoredWeight, *, out_dtype: str) -> Any:
        """Return ``x`` times a stored matrix, transposed, in ``out_dtype``."""
        from tvm.relax.frontend.nn import Tensor, op

        rows, columns = weight.shape
        batch, tokens, _ = x.shape
        count = batch * tokens
        is_single = isinstance(count, int) and count == 1
        padded = 1 if is_single else (count + _ROWS - 1) // _ROWS * _ROWS
        places, words = _places(weight, columns)
        arranged = op.tensor_expr_op(
            _arrange(padded, count, places, words), "arrange", [op.reshape(x, (count, columns))]
        )
        dtypes = [tensor.dtype for tensor in weight.tensors]
        said = op.tensor_ir_op(
            _product(weight, dtypes, out_dtype, is_single=is_single),
            "product",
            [arranged, *tensors],
            out=Tensor.placeholder((count, rows), out_dtype),
        )
        return op.reshape(said, (batch, tokens, rows))

    def rows(self, ids: Any, tensors: list[Any], weight: StoredWeight, *, dtype: str) -> Any:
        """Return the rows of a stored matrix that ``ids`` name."""
        from tvm.relax.frontend.nn import op

        return op.tensor_expr_op(taken_rows(weight, dtype), "rows", [ids, *tensors])

    def recur(self, net: DeltaNet, tensors: list[Any]) -> tuple[Any, Any]:
        """Return what is read from the states of a delta net, and the states after the tokens."""
        from tvm.relax.frontend.nn import Tensor, op

        _, _, value, _, _, states = tensors
        out = [Tensor.placeholder(it.shape, "float32") for it in (value, states)]
        read, new = op.tensor_ir_op(
            cpu_delta_kernels.recurrence(net), "recur", tensors, out=tuple(out)
        )
        return read, new


def taken_rows(weight: StoredWeight, dtype: str) -> Callable[..., Any]:
    """Return what writes the rows that ids name as an expression of TVM."""

    def write(ids: Any, *tensors: Any) -> Any:
        from tvm import te

        columns = weight.shape[1]

        def value(t: Any, k: Any) -> Any:
            return stored_value(weight, tensors, ids(t), k).astype(dtype)

        return te.compute((ids.shape[0], columns), value, name="rows")

    return write


def stored_value(weight: StoredWeight, tensors: tuple[Any, ...], row: Any, column: Any) -> Any:
    """Return one number of a stored matrix, as an expression of float32."""
    groups = weight.groups
    if groups is None:
        return tensors[0](row, column).astype("float32")
    words, scales = tensors
    word, place = column // groups.codes_per_word, column % groups.codes_per_word
    at = (word, row) if weight.is_transposed else (row, word)
    group = column // groups.weights
    of_group = (group, row) if weight.is_transposed else (row, group)
    return _code(words(*at), place, groups) * scales(*of_group).astype("float32")


def _places(weight: StoredWeight, columns: int) -> tuple[int, int]:
    """Return how many codes a word has, and how many words a row."""
    groups = weight.groups
    return (groups.codes_per_word, groups.words(columns)) if groups else (1, columns)


def _arrange(padded: Any, count: Any, places: int, words: int) -> Callable[[Any], Any]:
    """Return what lays ``x`` out as ``(padded, places, words)`` float32, zeros where it ends."""

    def write(x: Any) -> Any:
        from tvm import te, tirx

        columns = x.shape[1]

        def value(t: Any, place: Any, word: Any) -> Any:
            column = word * places + place
            inside = tirx.And(t < count, column < columns)
            return tirx.if_then_else(inside, x(t, column).astype("float32"), 0.0)

        return te.compute((padded, places, words), value, name="arranged")

    return write


def _product(
    weight: StoredWeight, dtypes: Sequence[str], out_dtype: str, *, is_single: bool
) -> Any:
    """Return the function that multiplies with a stored matrix, made once for all of its kind."""
    rows, columns = weight.shape
    groups, is_transposed = weight.groups, weight.is_transposed
    places, words = _places(weight, columns)
    if groups is None:
        make = _single_plain if is_single else _many_plain
        return make(rows, words, dtypes[0], out_dtype)
    if not is_single:
        return _many_packed(rows, places, words, groups, is_transposed, dtypes[1], out_dtype)
    single = _single_transposed if is_transposed else _single_packed
    return single(rows, places, words, groups, dtypes[1], out_dtype)


def _code(word, place, groups):
    """Return the number of a word's code at a place, not scaled yet, as an expression of float32."""
    from tvm.script import tirx as T

    shifted = T.shift_right(word, T.Cast("uint32", place * groups.bits))
    found = T.bitwise_and(shifted, T.uint32(2**groups.bits - 1))
    return T.Cast("float32", T.Cast("int32", found) - groups.zero)


@functools.cache
def _single_packed(rows, places, words, groups, scale_dtype, out_dtype):
    from tvm.script import tirx as T

    lanes, count = _lanes(words), math.gcd(rows, _ROWS)
    quads = lanes // 4  # four words share a scale

    @T.prim_func(private=True, s_tir=True)
    def single(var_x: T.handle, var_w: T.handle, var_s: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE})
        x = T.match_buffer(var_x, (1, places, words), "float32")
        w = T.match_buffer(var_w, (rows, words), "uint32")
        s = T.match_buffer(var_s, (rows, words // 4), scale_dtype)
        out = T.match_buffer(var_out, (1, rows), out_dtype)
        for r in T.parallel(rows // count):
            with T.sblock("rows"):
                row = T.axis.spatial(rows // count, r)
                T.reads(
                    x[0:1, 0:places, 0:words],
                    w[row * count : (row + 1) * count, 0:words],
                    s[row * count : (row + 1) * count, 0 : words // 4],
                )
                T.writes(out[0, row * count : (row + 1) * count])
                total = T.sblock_alloc_buffer((count, lanes), "float32", scope="local")
                part = T.sblock_alloc_buffer((count, lanes), "float32", scope="local")
                scale = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                whole = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        total[i, lane] = T.float32(0)
                for b in T.serial(words // lanes):
                    for i in T.unroll(count):
                        for lane in T.vectorized(lanes):
                            part[i, lane] = T.float32(0)
                    for p in T.unroll(places):
                        for i in T.unroll(count):
                            for lane in T.vectorized(lanes):
                                part[i, lane] = part[i, lane] + x[0, p, b * lanes + lane] * _code(
                                    w[row * count + i, b * lanes + lane], p, groups
                                )
                    for i in T.unroll(count):
                        for q in T.unroll(quads):
                            for lane in T.vectorized(4):
                                scale[q * 4 + lane] = T.Cast(
                                    "float32", s[row * count + i, b * quads + q]
                                )
                        for lane in T.vectorized(lanes):
                            total[i, lane] = total[i, lane] + part[i, lane] * scale[lane]
                for i in T.unroll(count):
                    whole[0] = T.float32(0)
                    for lane in T.serial(lanes):
                        whole[0] = whole[0] + total[i, lane]
                    out[0, row * count + i] = T.Cast(out_dtype, whole[0])

    return single


@functools.cache
def _single_transposed(rows, places, words, groups, scale_dtype, out_dtype):
    from tvm.script import tirx as T

    lanes = _lanes(rows)

    @T.prim_func(private=True, s_tir=True)
    def single(var_x: T.handle, var_w: T.handle, var_s: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE})
        x = T.match_buffer(var_x, (1, places, words), "float32")
        w = T.match_buffer(var_w, (words, rows), "uint32")
        s = T.match_buffer(var_s, (words // 4, rows), scale_dtype)
        out = T.match_buffer(var_out, (1, rows), out_dtype)
        for r in T.parallel(rows // lanes):
            with T.sblock("row"):
                block = T.axis.spatial(rows // lanes, r)
                T.reads(
                    x[0:1, 0:places, 0:words],
                    w[0:words, block * lanes : (block + 1) * lanes],
                    s[0 : words // 4, block * lanes : (block + 1) * lanes],
                )
                T.writes(out[0, block * lanes : (block + 1) * lanes])
                total = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                part = T.sblock_alloc_buffer((4, lanes), "float32", scope="local")
                for lane in T.vectorized(lanes):
                    total[lane] = T.float32(0)
                for g in T.serial(words // 4):
                    for i in T.unroll(4):
                        for lane in T.vectorized(lanes):
                            part[i, lane] = T.float32(0)
                    for p in T.unroll(places):
                        for i in T.unroll(4):
                            for lane in T.vectorized(lanes):
                                part[i, lane] = part[i, lane] + x[0, p, g * 4 + i] * _code(
                                    w[g * 4 + i, block * lanes + lane], p, groups
                                )
                    for lane in T.vectorized(lanes):
                        total[lane] = total[lane] + (
                            part[0, lane] + part[1, lane] + part[2, lane] + part[3, lane]
                        ) * T.Cast("float32", s[g, block * lanes + lane])
                for lane in T.vectorized(lanes):
                    out[0, block * lanes + lane] = T.Cast(out_dtype, total[lane])

    return single


@functools.cache
def _single_plain(rows, columns, dtype, out_dtype):
    from tvm.script import tirx as T

    lanes, count = _lanes(columns), math.gcd(rows, _ROWS)

    @T.prim_func(private=True, s_tir=True)
    def single(var_x: T.handle, var_w: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE})
        x = T.match_buffer(var_x, (1, 1, columns), "float32")
        w = T.match_buffer(var_w, (rows, columns), dtype)
        out = T.match_buffer(var_out, (1, rows), out_dtype)
        for r in T.parallel(rows // count):
            with T.sblock("rows"):
                row = T.axis.spatial(rows // count, r)
                T.reads(x[0:1, 0:1, 0:columns], w[row * count : (row + 1) * count, 0:columns])
                T.writes(out[0, row * count : (row + 1) * count])
                total = T.sblock_alloc_buffer((count, lanes), "float32", scope="local")
                whole = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for i in T.unroll(count):
                    for lane in T.vectorized(lanes):
                        total[i, lane] = T.float32(0)
                for b in T.serial(columns // lanes):
                    for i in T.unroll(count):
                        for lane in T.vectorized(lanes):
                            total[i, lane] = total[i, lane] + x[0, 0, b * lanes + lane] * T.Cast(
                                "float32", w[row * count + i, b * lanes + lane]
                            )
                for i in T.unroll(count):
                    whole[0] = T.float32(0)
                    for lane in T.serial(lanes):
                        whole[0] = whole[0] + total[i, lane]
                    out[0, row * count + i] = T.Cast(out_dtype, whole[0])

    return single


@functools.cache
def _many_packed(rows, places, words, groups, is_transposed, scale_dtype, out_dtype):
    from tvm.script import tirx as T

    lanes = _lanes(words)
    block_rows = math.gcd(rows, _ROWS)
    blocks = rows // block_rows
    stored = (words, rows) if is_transposed else (rows, words)
    scaled = (words // 4, rows) if is_transposed else (rows, words // 4)

    def code(w, row, word, p):
        return _code(w[word, row] if is_transposed else w[row, word], p, groups)

    def scale(s, row, group):
        return T.Cast("float32", s[group, row] if is_transposed else s[row, group])

    @T.prim_func(private=True, s_tir=True)
    def packed(var_x: T.handle, var_w: T.handle, var_s: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE})
        padded = T.int64()
        count = T.int64()
        x = T.match_buffer(var_x, (padded, places, words), "float32")
        w = T.match_buffer(var_w, stored, "uint32")
        s = T.match_buffer(var_s, scaled, scale_dtype)
        out = T.match_buffer(var_out, (count, rows), out_dtype)
        for r in T.parallel(blocks):
            with T.sblock("rows"):
                block = T.axis.spatial(blocks, r)
                T.reads(
                    x[0:padded, 0:places, 0:words],
                    w[0 : stored[0], 0 : stored[1]],
                    s[0 : scaled[0], 0 : scaled[1]],
                )
                T.writes(out[0:count, block * block_rows : (block + 1) * block_rows])
                wide = T.sblock_alloc_buffer((block_rows, places, words), "float32")
                total = T.sblock_alloc_buffer((_ROWS, block_rows, lanes), "float32", scope="local")
                whole = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for i in T.serial(block_rows):
                    for p in T.serial(places):
                        for b in T.serial(words // 4):
                            for lane in T.vectorized(4):
                                wide[i, p, b * 4 + lane] = code(
                                    w, block * block_rows + i, b * 4 + lane, p
                                ) * scale(s, block * block_rows + i, b)
                for t in T.serial(padded // _ROWS):
                    for j in T.unroll(_ROWS):
                        for i in T.unroll(block_rows):
                            for lane in T.vectorized(lanes):
                                total[j, i, lane] = T.float32(0)
                    for p in T.serial(places):
                        for b in T.serial(words // lanes):
                            for j in T.unroll(_ROWS):
                                for i in T.unroll(block_rows):
                                    for lane in T.vectorized(lanes):
                                        total[j, i, lane] = (
                                            total[j, i, lane]
                                            + x[t * _ROWS + j, p, b * lanes + lane]
                                            * wide[i, p, b * lanes + lane]
                                        )
                    for j in T.unroll(_ROWS):
                        for i in T.unroll(block_rows):
                            if t * _ROWS + j < count:
                                whole[0] = T.float32(0)
                                for lane in T.serial(lanes):
                                    whole[0] = whole[0] + total[j, i, lane]
                                out[t * _ROWS + j, block * block_rows + i] = T.Cast(
                                    out_dtype, whole[0]
                                )

    return packed


@functools.cache
def _many_plain(rows, words, dtype, out_dtype):
    from tvm.script import tirx as T

    lanes = _lanes(words)
    block_rows = math.gcd(rows, _ROWS)
    blocks = rows // block_rows

    @T.prim_func(private=True, s_tir=True)
    def plain(var_x: T.handle, var_w: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE})
        padded = T.int64()
        count = T.int64()
        x = T.match_buffer(var_x, (padded, 1, words), "float32")
        w = T.match_buffer(var_w, (rows, words), dtype)
        out = T.match_buffer(var_out, (count, rows), out_dtype)
        for r in T.parallel(blocks):
            with T.sblock("rows"):
                block = T.axis.spatial(blocks, r)
                T.reads(
                    x[0:padded, 0:1, 0:words],
                    w[block * block_rows : (block + 1) * block_rows, 0:words],
                )
                T.writes(out[0:count, block * block_rows : (block + 1) * block_rows])
                wide = T.sblock_alloc_buffer((block_rows, words), "float32")
                total = T.sblock_alloc_buffer((_ROWS, block_rows, lanes), "float32", scope="local")
                whole = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for i in T.serial(block_rows):
                    for b in T.serial(words // lanes):
                        for lane in T.vectorized(lanes):
                            wide[i, b * lanes + lane] = T.Cast(
                                "float32", w[block * block_rows + i, b * lanes + lane]
                            )
                for t in T.serial(padded // _ROWS):
                    for j in T.unroll(_ROWS):
                        for i in T.unroll(block_rows):
                            for lane in T.vectorized(lanes):
                                total[j, i, lane] = T.float32(0)
                    for b in T.serial(words // lanes):
                        for j in T.unroll(_ROWS):
                            for i in T.unroll(block_rows):
                                for lane in T.vectorized(lanes):
                                    total[j, i, lane] = (
                                        total[j, i, lane]
                                        + x[t * _ROWS + j, 0, b * lanes + lane]
                                        * wide[i, b * lanes + lane]
                                    )
                    for j in T.unroll(_ROWS):
                        for i in T.unroll(block_rows):
                            if t * _ROWS + j < count:
                                whole[0] = T.float32(0)
                                for lane in T.serial(lanes):
                                    whole[0] = whole[0] + total[j, i, lane]
                                out[t * _ROWS + j, block * block_rows + i] = T.Cast(
                                    out_dtype, whole[0]
                                )

    return plain
