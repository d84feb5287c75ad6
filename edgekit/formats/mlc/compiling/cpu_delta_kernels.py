"""The recurrence of a delta net on a processor: one head's state after the other, in parallel."""

import functools
import math
from typing import Any

from edgekit.model.mixers import DeltaNet


_OPAQUE = 8  # TVM's kOpaque: fused with nothing
_MOST_LANES = 16


@functools.cache
def recurrence(net: DeltaNet) -> Any:
    """Return the function from queries, keys, values, decay, strength and states to both results.

    They are what was read from the states, ``(tokens, value_heads, value_head_dim)``, and the
    states after the last token; all float32.
    """
    from tvm.script import tirx as T

    key_heads, heads, rows, columns = (
        net.key_heads, net.value_heads, net.key_head_dim, net.value_head_dim
    )  # fmt: skip
    shared_by, lanes = net.values_per_key, math.gcd(columns, _MOST_LANES)
    parts = columns // lanes

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
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE})
        tokens = T.int64()
        q = T.match_buffer(var_q, (tokens, key_heads, rows), "float32")
        k = T.match_buffer(var_k, (tokens, key_heads, rows), "float32")
        v = T.match_buffer(var_v, (tokens, heads, columns), "float32")
        decay = T.match_buffer(var_decay, (tokens, heads), "float32")
        strength = T.match_buffer(var_strength, (tokens, heads), "float32")
        old = T.match_buffer(var_old, (heads, rows, columns), "float32")
        out = T.match_buffer(var_out, (tokens, heads, columns), "float32")
        new = T.match_buffer(var_new, (heads, rows, columns), "float32")
        for h in T.parallel(heads):
            with T.sblock("head"):
                head = T.axis.spatial(heads, h)
                T.reads(
                    q[0:tokens, head // shared_by, 0:rows],
                    k[0:tokens, head // shared_by, 0:rows],
                    v[0:tokens, head, 0:columns],
                    decay[0:tokens, head],
                    strength[0:tokens, head],
                    old[head, 0:rows, 0:columns],
                )
                T.writes(out[0:tokens, head, 0:columns], new[head, 0:rows, 0:columns])
                change = T.sblock_alloc_buffer((columns,), "float32")
                for i in T.serial(rows):
                    for b in T.serial(parts):
                        for lane in T.vectorized(lanes):
                            new[head, i, b * lanes + lane] = old[head, i, b * lanes + lane]
                for t in T.serial(tokens):
                    for b in T.serial(parts):
                        for lane in T.vectorized(lanes):
                            change[b * lanes + lane] = T.float32(0)
                            out[t, head, b * lanes + lane] = T.float32(0)
                    for i in T.serial(rows):
                        for b in T.serial(parts):
                            for lane in T.vectorized(lanes):
                                new[head, i, b * lanes + lane] = (
                                    new[head, i, b * lanes + lane] * decay[t, head]
                                )
                                change[b * lanes + lane] = (
                                    change[b * lanes + lane]
                                    + k[t, head // shared_by, i] * new[head, i, b * lanes + lane]
                                )
                    for b in T.serial(parts):
                        for lane in T.vectorized(lanes):
                            change[b * lanes + lane] = strength[t, head] * (
                                v[t, head, b * lanes + lane] - change[b * lanes + lane]
                            )
                    for i in T.serial(rows):
                        for b in T.serial(parts):
                            for lane in T.vectorized(lanes):
                                new[head, i, b * lanes + lane] = (
                                    new[head, i, b * lanes + lane]
                                    + k[t, head // shared_by, i] * change[b * lanes + lane]
                                )
                                out[t, head, b * lanes + lane] = (
                                    out[t, head, b * lanes + lane]
                                    + q[t, head // shared_by, i] * new[head, i, b * lanes + lane]
                                )

    return delta
