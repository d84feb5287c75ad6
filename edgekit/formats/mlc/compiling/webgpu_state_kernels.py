"""How WebLLM reads and writes the states of delta nets: those of one text, step by step."""

import math
from typing import Any

from edgekit.model.shapes import Shape


_THREADS = 256


def _places(size: Shape) -> Any:
    """Return what makes the indices of a number of its place in a row of all."""
    from tvm.script import tirx as T

    def indices(at):
        found = []
        for length in reversed(size):
            found.append(T.truncmod(at, length))  # no place is negative
            at = T.truncdiv(at, length)
        return tuple(reversed(found))

    return indices


def get(size: Shape) -> Any:
    """Return the function that reads the current state."""
    from tvm.script import tirx as T

    count, indices = math.prod(size), _places(size)

    @T.prim_func(private=True, s_tir=True)
    def function(var_kept: T.handle, var_slots: T.handle, var_history: T.handle, var_out: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        slot_count = T.int64()
        history_count = T.int64()
        kept = T.match_buffer(var_kept, (slot_count, history_count, *size), "float32")
        slots = T.match_buffer(var_slots, (1,), "int32")
        history = T.match_buffer(var_history, (1,), "int32")
        out = T.match_buffer(var_out, (1, *size), "float32")
        for bx in T.thread_binding(-(-count // _THREADS), thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("get"):
                    at = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    at[0] = bx * _THREADS + tx
                    if at[0] < count:
                        out[(0, *indices(at[0]))] = kept[(slots[0], history[0], *indices(at[0]))]

    return function


def put(size: Shape) -> Any:
    """Return the function that writes the next state."""
    from tvm.script import tirx as T

    count, indices = math.prod(size), _places(size)

    @T.prim_func(private=True, s_tir=True)
    def function(
        var_kept: T.handle, var_slots: T.handle, var_history: T.handle, var_state: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        slot_count = T.int64()
        history_count = T.int64()
        kept = T.match_buffer(var_kept, (slot_count, history_count, *size), "float32")
        slots = T.match_buffer(var_slots, (1,), "int32")
        history = T.match_buffer(var_history, (1,), "int32")
        state = T.match_buffer(var_state, (1, *size), "float32")
        for bx in T.thread_binding(-(-count // _THREADS), thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with T.sblock("put"):
                    at = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    at[0] = bx * _THREADS + tx
                    if at[0] < count:
                        kept[
                            (
                                slots[0],
                                (T.Cast("int64", history[0]) + 1) % history_count,
                                *indices(at[0]),
                            )
                        ] = state[(0, *indices(at[0]))]

    return function
