"""What a browser's GPU computes in kernels of edgekit's own: products, and the states of delta nets.

They are small, for an adapter without a GPU compiles a long shader for minutes. With a single row of
``x``, a few threads share each row of a matrix; many rows take tiles in the workgroup's memory, of
which a thread multiplies four by four.
"""

import functools
from typing import Any

from edgekit.formats.mlc.compiling.cpu_kernels import taken_rows
from edgekit.formats.mlc.compiling.model import Kernels
from edgekit.formats.mlc.compiling.shape import StoredWeight
from edgekit.model.mixers import DeltaNet


_OPAQUE = 8  # TVM's kOpaque: fused with nothing
_ROWS = 8  # of a matrix that a workgroup multiplies with one row of x
_ROW_THREADS = 8  # which share one of them: few sums to add where they wait for each other
_TILE = 32  # rows of x and of the matrix, and columns, in a workgroup's memory at once
_EACH = 4  # rows of both that a thread multiplies
_SIDE = _TILE // _EACH


class WebGpuKernels(Kernels):
    """Sums in float32, whatever the model computes in."""

    def linear(self, x: Any, tensors: list[Any], weight: StoredWeight, *, out_dtype: str) -> Any:
        """Return ``x`` times a stored matrix, transposed, in ``out_dtype``."""
        from tvm.relax.frontend.nn import Tensor, op

        rows, columns = weight.shape
        batch, tokens, _ = x.shape
        count = batch * tokens
        make = _single if isinstance(count, int) and count == 1 else _many
        shapes = tuple(tensor.shape for tensor in weight.tensors)
        dtypes = tuple(tensor.dtype for tensor in weight.tensors)
        said = op.tensor_ir_op(
            make(
                rows, columns, weight.groups, weight.is_transposed, shapes, dtypes, x.dtype,
                out_dtype,
            ),
            "product",
            [op.reshape(x, (count, columns)), *tensors],
            out=Tensor.placeholder((count, rows), out_dtype),
        )  # fmt: skip
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
        read, new = op.tensor_ir_op(_recurrence(net), "recur", tensors, out=tuple(out))
        return read, new


def _code(word, place, groups):
    """Return the number of a word's code at a place, not scaled yet, as an expression of float32."""
    from tvm.script import tirx as T

    shifted = T.shift_right(word, T.Cast("uint32", place * groups.bits))
    code = T.bitwise_and(shifted, T.uint32(2**groups.bits - 1))
    return T.Cast("float32", T.Cast("int32", code) - groups.zero)


def _reader(groups, is_transposed):
    """Return what reads one number of a stored matrix, as an expression of float32."""
    from tvm.script import tirx as T

    def plain(w, _s, row, column):
        return T.Cast("float32", w[row, column])

    def packed(w, s, row, column):
        word, place = column // groups.codes_per_word, column % groups.codes_per_word
        group = column // groups.weights
        found = w[word, row] if is_transposed else w[row, word]
        scale = s[group, row] if is_transposed else s[row, group]
        return _code(found, place, groups) * T.Cast("float32", scale)

    return packed if groups else plain


@functools.cache
def _single(rows, columns, groups, is_transposed, shapes, dtypes, x_dtype, out_dtype):
    """Return the product of one row of ``x``."""
    from tvm.script import tirx as T

    places = groups.codes_per_word if groups else 4  # neighbours that a thread takes: one word
    words = -(-columns // places)
    steps, is_whole = -(-words // _ROW_THREADS), columns % places == 0

    def number(x, column):
        """Return a number of the row, none behind its end."""
        if is_whole:
            return T.Cast("float32", x[0, column])
        inside = T.Cast("float32", x[0, T.min(column, columns - 1)])
        return T.if_then_else(column < columns, inside, T.float32(0))

    @T.macro
    def add_packed(x, w, s, row, word, total, part):
        part[0] = T.float32(0)
        found: T.let[T.uint32] = w[word, row] if is_transposed else w[row, word]
        for p in T.unroll(places):
            part[0] = part[0] + number(x, word * places + p) * _code(found, p, groups)
        total[0] = total[0] + part[0] * T.Cast(
            "float32",
            s[word * places // groups.weights, row]
            if is_transposed
            else s[row, word * places // groups.weights],
        )

    @T.macro
    def add_plain(x, w, _s, row, word, total, _part):
        for p in T.unroll(places):
            total[0] = total[0] + number(x, word * places + p) * T.Cast(
                "float32", w[row, T.min(word * places + p, columns - 1)]
            )

    add = add_packed if groups else add_plain

    @T.macro
    def multiply(x, w, s, out):
        for bx in T.thread_binding(-(-rows // _ROWS), thread="blockIdx.x"):
            for ty in T.thread_binding(_ROWS, thread="threadIdx.y"):
                for tx in T.thread_binding(_ROW_THREADS, thread="threadIdx.x"):
                    with T.sblock("rows"):
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        part = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        parts = T.sblock_alloc_buffer(
                            (_ROWS, _ROW_THREADS), "float32", scope="shared"
                        )
                        row: T.let[T.int64] = T.min(T.Cast("int64", bx * _ROWS + ty), rows - 1)
                        total[0] = T.float32(0)
                        for i in T.serial(steps):
                            word: T.let[T.int64] = T.Cast("int64", i * _ROW_THREADS + tx)
                            if word < words:
                                add(x, w, s, row, word, total, part)
                        parts[ty, tx] = total[0]
                        T.tvm_storage_sync("shared")
                        if T.And(tx == 0, bx * _ROWS + ty < rows):
                            for i in T.serial(1, _ROW_THREADS):
                                total[0] = total[0] + parts[ty, i]
                            out[0, bx * _ROWS + ty] = T.Cast(out_dtype, total[0])

    @T.prim_func(private=True, s_tir=True)
    def packed(var_x: T.handle, var_w: T.handle, var_s: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        x = T.match_buffer(var_x, (1, columns), x_dtype)
        w = T.match_buffer(var_w, shapes[0], dtypes[0])
        s = T.match_buffer(var_s, shapes[-1], dtypes[-1])
        out = T.match_buffer(var_out, (1, rows), out_dtype)
        multiply(x, w, s, out)

    @T.prim_func(private=True, s_tir=True)
    def plain(var_x: T.handle, var_w: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        x = T.match_buffer(var_x, (1, columns), x_dtype)
        w = T.match_buffer(var_w, shapes[0], dtypes[0])
        out = T.match_buffer(var_out, (1, rows), out_dtype)
        multiply(x, w, w, out)

    return packed if groups else plain


@functools.cache
def _many(rows, columns, groups, is_transposed, shapes, dtypes, x_dtype, out_dtype):
    """Return the product of many rows of ``x``, tile by tile."""
    from tvm.script import tirx as T

    read = _reader(groups, is_transposed)
    half = _TILE // 2  # what a thread reads: neighbours in one row

    @T.macro
    def multiply(x, w, s, out, count):
        for by in T.thread_binding((count + _TILE - 1) // _TILE, thread="blockIdx.y"):
            for bx in T.thread_binding((rows + _TILE - 1) // _TILE, thread="blockIdx.x"):
                for ty in T.thread_binding(_SIDE, thread="threadIdx.y"):
                    for tx in T.thread_binding(_SIDE, thread="threadIdx.x"):
                        with T.sblock("tile"):
                            total = T.sblock_alloc_buffer((_EACH, _EACH), "float32", scope="local")
                            xs = T.sblock_alloc_buffer((_TILE, _TILE), "float32", scope="shared")
                            ws = T.sblock_alloc_buffer((_TILE, _TILE), "float32", scope="shared")
                            own = T.sblock_alloc_buffer((2, _EACH), "float32", scope="local")
                            for i in T.unroll(_EACH):
                                for j in T.unroll(_EACH):
                                    total[i, j] = T.float32(0)
                            for k in T.serial((columns + _TILE - 1) // _TILE):
                                for i in T.serial(half):
                                    r: T.let[T.int64] = T.Cast("int64", ty * _EACH + tx // 2)
                                    c: T.let[T.int64] = T.Cast("int64", tx % 2 * half + i)
                                    at: T.let[T.int64] = k * _TILE + c
                                    xs[r, c] = T.if_then_else(
                                        T.And(by * _TILE + r < count, at < columns),
                                        T.Cast(
                                            "float32",
                                            x[
                                                T.min(by * _TILE + r, count - 1),
                                                T.min(at, columns - 1),
                                            ],
                                        ),
                                        T.float32(0),
                                    )
                                    ws[r, c] = T.if_then_else(
                                        T.And(bx * _TILE + r < rows, at < columns),
                                        read(
                                            w,
                                            s,
                                            T.min(bx * _TILE + r, rows - 1),
                                            T.min(at, columns - 1),
                                        ),
                                        T.float32(0),
                                    )
                                T.tvm_storage_sync("shared")
                                for c in T.serial(_TILE):
                                    for i in T.unroll(_EACH):
                                        own[0, i] = xs[ty * _EACH + i, c]
                                        own[1, i] = ws[tx * _EACH + i, c]
                                    for i in T.unroll(_EACH):
                                        for j in T.unroll(_EACH):
                                            total[i, j] = total[i, j] + own[0, i] * own[1, j]
                                T.tvm_storage_sync("shared")
                            for i in T.unroll(_EACH):
                                for j in T.unroll(_EACH):
                                    if T.And(
                                        by * _TILE + ty * _EACH + i < count,
                                        bx * _TILE + tx * _EACH + j < rows,
                                    ):
                                        out[
                                            by * _TILE + ty * _EACH + i,
                                            bx * _TILE + tx * _EACH + j,
                                        ] = T.Cast(out_dtype, total[i, j])

    @T.prim_func(private=True, s_tir=True)
    def packed(var_x: T.handle, var_w: T.handle, var_s: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        count = T.int64()
        x = T.match_buffer(var_x, (count, columns), x_dtype)
        w = T.match_buffer(var_w, shapes[0], dtypes[0])
        s = T.match_buffer(var_s, shapes[-1], dtypes[-1])
        out = T.match_buffer(var_out, (count, rows), out_dtype)
        multiply(x, w, s, out, count)

    @T.prim_func(private=True, s_tir=True)
    def plain(var_x: T.handle, var_w: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        count = T.int64()
        x = T.match_buffer(var_x, (count, columns), x_dtype)
        w = T.match_buffer(var_w, shapes[0], dtypes[0])
        out = T.match_buffer(var_out, (count, rows), out_dtype)
        multiply(x, w, w, out, count)

    return packed if groups else plain


@functools.cache
def _recurrence(net):
    """Return the function that `cpu_delta_kernels.recurrence` also computes: a thread a column."""
    from tvm.script import tirx as T

    key_heads, heads, rows, columns = (
        net.key_heads, net.value_heads, net.key_head_dim, net.value_head_dim
    )  # fmt: skip
    shared_by = net.values_per_key

    @T.prim_func(private=True, s_tir=True)
    def delta(
        var_q: T.handle,
        var_k: T.handle,
        var_v: T.handle,
        var_decay: T.handle,
        var_strength: T.handle,
        var_old: T.handle,
        var_out: T.handle,
        var_new: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": _OPAQUE})
        tokens = T.int64()
        q = T.match_buffer(var_q, (tokens, key_heads, rows), "float32")
        k = T.match_buffer(var_k, (tokens, key_heads, rows), "float32")
        v = T.match_buffer(var_v, (tokens, heads, columns), "float32")
        decay = T.match_buffer(var_decay, (tokens, heads), "float32")
        strength = T.match_buffer(var_strength, (tokens, heads), "float32")
        old = T.match_buffer(var_old, (heads, rows, columns), "float32")
        out = T.match_buffer(var_out, (tokens, heads, columns), "float32")
        new = T.match_buffer(var_new, (heads, rows, columns), "float32")
        for head in T.thread_binding(heads, thread="blockIdx.x"):
            for tx in T.thread_binding(columns, thread="threadIdx.x"):
                with T.sblock("column"):
                    sums = T.sblock_alloc_buffer((2,), "float32", scope="local")
                    for i in T.serial(rows):
                        new[head, i, tx] = old[head, i, tx]
                    for t in T.serial(tokens):
                        sums[0] = T.float32(0)
                        sums[1] = T.float32(0)
                        for i in T.serial(rows):
                            new[head, i, tx] = new[head, i, tx] * decay[t, head]
                            sums[0] = sums[0] + k[t, head // shared_by, i] * new[head, i, tx]
                        sums[0] = strength[t, head] * (v[t, head, tx] - sums[0])
                        for i in T.serial(rows):
                            new[head, i, tx] = (
                                new[head, i, tx] + k[t, head // shared_by, i] * sums[0]
                            )
                            sums[1] = sums[1] + q[t, head // shared_by, i] * new[head, i, tx]
                        out[t, head, tx] = sums[1]

    return delta
