"""From the shape of a decoder to a module of TVM, and from that to a library."""

from typing import TYPE_CHECKING, Any

from edgekit.formats.mlc.compiling.model import Decoder, Kernels


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape


CREATES_CACHE = "create_tir_paged_kv_cache"
PACKED = {"param_mode": "packed", "effect_mode": "none"}  # takes the weights, as its last argument
PLAIN = {"param_mode": "none", "effect_mode": "none"}


def written(shape: "LibraryShape", kernels: Kernels, target: Any) -> Any:
    """Return the functions of a session's library as a module of TVM, not compiled yet."""
    from tvm.relax.frontend.nn import spec

    states = [spec.Tensor(list(size), "float32") for _, _, size in shape.spec.states()]

    def takes(tokens: Any) -> dict[str, Any]:
        embedded = spec.Tensor([1, tokens, shape.spec.hidden_size], shape.dtype)
        return {"x": embedded, "cache": cache_spec(), "states": states, "$": PACKED}

    methods = {
        "embed": {"ids": spec.Tensor(["tokens"], "int32"), "$": PACKED},
        "prefill": takes("tokens"),
        "decode": takes(1),
        "all_logits": takes("tokens"),
    }
    return exported(model_class(shape, kernels, target)(), methods, shape)


def cache_spec() -> Any:
    """Return what says that an argument is a cache."""
    from tvm.relax.frontend.nn import spec
    from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

    return spec.Object(object_type=PagedKVCache)


def exported(model: Any, methods: dict[str, Any], shape: "LibraryShape") -> Any:
    """Return the methods of a model, and what creates its cache, as a module of TVM."""
    sizes = (
        "max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size",
        "support_sliding_window",
    )  # fmt: skip
    creates = dict.fromkeys(sizes, int) | {"$": PLAIN}
    module, found, _ = model.export_tvm(spec=methods | {CREATES_CACHE: creates}, allow_extern=True)
    assert [name for name, _ in found] == [tensor.name for tensor in shape.tensors]  # noqa: S101
    return module


def model_class(shape: "LibraryShape", kernels: Kernels, target: Any) -> Any:
    """Return the class of a model, whose methods are functions of a library."""
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn.llm import kv_cache

    class Model(nn.Module):  # type: ignore[misc]  # untyped
        """The functions of a session's library."""

        def __init__(self) -> None:
            for tensor in shape.tensors:
                setattr(self, tensor.name, nn.Parameter(tensor.shape, tensor.dtype))

        def decoder(self) -> Decoder:
            return Decoder(shape, vars(self), kernels)

        def embed(self, ids: Any) -> Any:
            return self.decoder().embed(ids)

        def prefill(self, x: Any, cache: Any, states: Any) -> Any:
            said, states = self.decoder().hidden(x, cache, states)
            return self.decoder().logits(last_token(said)), cache, states

        def decode(self, x: Any, cache: Any, states: Any) -> Any:
            said, states = self.decoder().hidden(x, cache, states)
            return self.decoder().logits(said), cache, states

        all_logits = decode  # of any number of tokens

        def create_tir_paged_kv_cache(
            self,
            max_batch_size: Any,
            max_total_seq_len: Any,
            prefill_chunk_size: Any,
            page_size: Any,
            support_sliding_window: Any,
        ) -> Any:
            from tvm import relax

            a, layers = shape.spec.attention, len(list(shape.spec.caches()))
            return kv_cache.TIRPagedKVCache(
                attn_kind="mha",
                max_batch_size=max_batch_size,
                max_total_seq_len=max_total_seq_len,
                prefill_chunk_size=prefill_chunk_size,
                page_size=page_size,
                support_sliding_window=support_sliding_window,
                layer_partition=relax.ShapeExpr([0, layers]),
                num_hidden_layers=layers,
                num_attention_heads=a.heads,
                num_key_value_heads=a.num_kv_heads,
                qk_head_dim=a.head_dim,
                v_head_dim=a.head_dim,
                mla_original_qk_head_dim=0,
                mla_original_v_head_dim=0,
                rope_mode=kv_cache.RopeMode.NONE,
                rope_scale=1,
                rope_theta=10_000,
                rope_scaling={},
                rope_ext_factors=relax.prim_value(0),
                rotary_dim=a.head_dim,
                enable_disaggregation=False,
                dtype=shape.dtype,
                target=target,
            )

    return Model


def last_token(x: Any) -> Any:
    """Return the last token of ``(1, tokens, width)``."""
    from tvm import te
    from tvm.relax.frontend.nn import op

    def write(x: Any) -> Any:
        _, tokens, width = x.shape
        return te.compute((1, 1, width), lambda i, _, k: x[i, tokens - 1, k], name="last")

    return op.tensor_expr_op(write, "last", [x])
