"""The library that WebLLM runs: a module of TVM with the functions it calls, by their names.

Source: ``LLMChatPipeline`` of @mlc-ai/web-llm 0.2.86, which also runs it in 0.2.85.
"""

import json
from typing import TYPE_CHECKING, Any

from edgekit.formats.mlc.compiling import library, web_states, webgpu_sampling_kernels
from edgekit.formats.mlc.compiling.model import Kernels
from edgekit.formats.mlc.libraries import PREFILL_CHUNK_TOKENS


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape


def written(shape: "LibraryShape", kernels: Kernels, target: Any) -> Any:
    """Return the functions as a module of TVM, not compiled yet."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.nn import spec

    vocabulary, width = shape.spec.vocab_size, shape.spec.hidden_size

    def takes(tokens: Any, **more: Any) -> dict[str, Any]:
        embedded = spec.Tensor([1, tokens, width], shape.dtype)
        return {"x": embedded, **more, "cache": library.cache_spec(), "$": library.PACKED}

    def with_states(tokens: Any, **more: Any) -> dict[str, Any]:
        given = takes(tokens, **more)
        weights = given.pop("$")
        return {**given, "states": web_states.spec(), "$": weights}

    def plain(**tensors: tuple[list[Any], str]) -> dict[str, Any]:
        found = {name: spec.Tensor(*tensor) for name, tensor in tensors.items()}
        return found | {"$": library.PLAIN}

    row, named = ([1, vocabulary], "float32"), (["named"], "int32")
    one = ([1], "int32")
    reads = {"prefill": takes("tokens"), "decode": takes(1)}
    if shape.spec.has_states:
        sizes = dict.fromkeys(("max_batch_size", "max_history"), int)
        reads = {
            "batch_prefill": with_states("tokens", positions=spec.Tensor([1], "int32")),
            "batch_decode": with_states(1),
            "create_rnn_state": sizes | {"$": library.PLAIN},
        }
    methods = reads | {
        "embed": {"ids": spec.Tensor(["tokens"], "int32"), "$": library.PACKED},
        "softmax_with_temperature": plain(
            logits=([1, 1, vocabulary], "float32"), temperature=([1], "float32")
        ),
        "argsort_probs": plain(probs=row),
        "sample_with_top_p": plain(
            probs=row, ids=([1, vocabulary], "int32"), uniform=([1], "float32"), rows=one,
            top_p=([1], "float32"),
        ),
        "apply_bitmask_inplace": plain(
            logits=row, rows=one, bits=([1, -(-vocabulary // 32)], "int32")
        ),
        "apply_logit_bias_inplace": plain(
            logits=row, rows=named, tokens=named, bias=(["named"], "float32")
        ),
        "apply_penalty_inplace": plain(
            logits=row, sequences=one, rows=named, tokens=named, times=named,
            penalties=([1, 3], "float32"),
        ),
    }  # fmt: skip
    module = library.exported(_model(shape, kernels, target), methods, shape)
    builder = relax.BlockBuilder()
    with builder.function("_metadata", params=[]):
        builder.emit_func_output(tvm.ir.StringImm(json.dumps(metadata(shape))))
    module.update(builder.get())
    return module


def metadata(shape: "LibraryShape") -> dict[str, Any]:
    """Return what WebLLM reads from a library."""
    return {
        "quantization": shape.scheme_name,
        "model_type": shape.architecture,
        "params": [
            {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
            for tensor in shape.tensors
        ],
        "prefill_chunk_size": PREFILL_CHUNK_TOKENS,
        "kv_state_kind": "hybrid" if shape.spec.has_states else "kv_cache",
    }


def _model(shape: "LibraryShape", kernels: Kernels, target: Any) -> Any:  # noqa: C901 - one class
    from tvm.relax.frontend.nn import Tensor, op

    vocabulary = shape.spec.vocab_size

    def in_place(function: Any, name: str, tensors: list[Any]) -> Any:
        like = Tensor.placeholder(tensors[0].shape, tensors[0].dtype)
        return op.tensor_ir_inplace_op(function, name, tensors, inplace_indices=0, out=like)

    class WebModel(library.model_class(shape, kernels, target)):  # type: ignore[misc]  # untyped
        """The functions by the names that WebLLM calls."""

        def prefill(self, x: Any, cache: Any) -> Any:
            said, _ = self.decoder().hidden(x, cache, [])
            return self.decoder().logits(library.last_token(said)), cache

        def decode(self, x: Any, cache: Any) -> Any:
            said, _ = self.decoder().hidden(x, cache, [])
            return self.decoder().logits(said), cache

        def batch_prefill(self, x: Any, positions: Any, cache: Any, states: Any) -> Any:
            del positions  # of the one text, the last
            said, states = self._read(x, cache, states)
            return self.decoder().logits(library.last_token(said)), cache, states

        def batch_decode(self, x: Any, cache: Any, states: Any) -> Any:
            said, states = self._read(x, cache, states)
            return self.decoder().logits(said), cache, states

        def _read(self, x: Any, cache: Any, states: Any) -> tuple[Any, Any]:
            said, new = self.decoder().hidden(x, cache, web_states.read(shape, states))
            return said, web_states.written(shape, states, new)

        def create_rnn_state(self, max_batch_size: Any, max_history: Any) -> Any:
            return web_states.created(shape, max_batch_size, max_history)

        def softmax_with_temperature(self, logits: Any, temperature: Any) -> Any:
            return op.tensor_ir_op(
                webgpu_sampling_kernels.softmax(vocabulary),
                "softmax",
                [logits, temperature],
                out=Tensor.placeholder(logits.shape, "float32"),
            )

        def argsort_probs(self, probs: Any) -> Any:
            padded = [webgpu_sampling_kernels.padded(vocabulary)]
            out = [Tensor.placeholder(padded, dtype) for dtype in ("float32", "int32")]
            sort = webgpu_sampling_kernels.sort(vocabulary)
            found = op.tensor_ir_op(sort, "sort", [probs], out=tuple(out))
            return tuple(_first(it, vocabulary) for it in found)

        def sample_with_top_p(
            self, probs: Any, ids: Any, uniform: Any, rows: Any, top_p: Any
        ) -> Any:
            return op.tensor_ir_op(
                webgpu_sampling_kernels.sample(vocabulary),
                "sample",
                [probs, ids, uniform, rows, top_p],
                out=Tensor.placeholder([1], "int32"),
            )

        def apply_bitmask_inplace(self, logits: Any, rows: Any, bits: Any) -> Any:
            return in_place(webgpu_sampling_kernels.mask(vocabulary), "mask", [logits, rows, bits])

        def apply_logit_bias_inplace(self, logits: Any, rows: Any, tokens: Any, bias: Any) -> Any:
            add = webgpu_sampling_kernels.add_bias(vocabulary)
            return in_place(add, "add_bias", [logits, rows, tokens, bias])

        def apply_penalty_inplace(  # noqa: PLR0913, PLR0917 - as WebLLM calls it
            self, logits: Any, sequences: Any, rows: Any, tokens: Any, times: Any, penalties: Any
        ) -> Any:
            given = [logits, sequences, rows, tokens, times, penalties]
            return in_place(webgpu_sampling_kernels.penalize(vocabulary), "penalize", given)

    return WebModel()


def _first(x: Any, count: int) -> Any:
    """Return the first numbers as one row."""
    from tvm import te
    from tvm.relax.frontend.nn import op

    def write(x: Any) -> Any:
        return te.compute((1, count), lambda _, k: x[k], name="first")

    return op.tensor_expr_op(write, "first", [x])
