"""The states of delta nets as WebLLM keeps them: in an object of TVM, beside the cache."""

from typing import TYPE_CHECKING, Any

from edgekit.formats.mlc.compiling import webgpu_state_kernels


if TYPE_CHECKING:
    from edgekit.formats.mlc.compiling.shape import LibraryShape
    from edgekit.model.shapes import Shape


def sizes(shape: "LibraryShape") -> "dict[str, Shape]":
    """Return the states of a layer that has any, by name: all such layers have the same."""
    return {name: size for _, name, size in shape.spec.states()}


def spec() -> Any:
    """Return what says that an argument holds the states."""
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn import spec

    return spec.Object(object_type=nn.Object)


def read(shape: "LibraryShape", states: Any) -> list[Any]:
    """Return all states, as `Decoder.hidden` takes them."""
    from tvm import relax
    from tvm.relax.frontend.nn import Tensor, op

    found = []
    for layer, place, size in _places(shape):
        asked = [states._expr, relax.prim_value(layer), relax.prim_value(place)]
        said = relax.call_dps_packed(
            "vm.builtin.rnn_state_get", asked, out_ty=relax.TensorType((1, *size), "float32")
        )
        found.append(op.reshape(Tensor(_expr=relax.BlockBuilder.current().emit(said)), size))
    return found


def written(shape: "LibraryShape", states: Any, new: list[Any]) -> Any:
    """Return the object after all states were put into it."""
    from tvm import relax
    from tvm.relax.frontend.nn import Object, op

    kept = states._expr
    for (layer, place, size), state in zip(_places(shape), new, strict=True):
        kept = relax.BlockBuilder.current().emit(
            relax.call_pure_packed(
                "vm.builtin.rnn_state_set",
                kept,
                relax.prim_value(layer),
                relax.prim_value(place),
                op.reshape(state, (1, *size))._expr,
                ty_args=relax.AnyType(),
            )
        )
    return Object(_expr=kept, _name="states")


def created(shape: "LibraryShape", max_batch_size: Any, max_history: Any) -> Any:
    """Return a new object, whose states are zero."""
    from tvm import relax
    from tvm.relax.frontend.nn import Object

    builder, found = relax.BlockBuilder.current(), sizes(shape)
    functions = [
        relax.Tuple(
            [builder.add_func(make(size), f"{verb}_{name}") for name, size in found.items()]
        )
        for verb, make in (("get", webgpu_state_kernels.get), ("put", webgpu_state_kernels.put))
    ]
    zeros = relax.Tuple([relax.op.zeros(size, "float32") for size in found.values()])
    layers = len({index for index, _, _ in shape.spec.states()})
    return Object(
        _expr=relax.call_pure_packed(
            "vm.builtin.rnn_state_create",
            relax.prim_value(layers),
            max_batch_size,
            max_history,
            *functions,
            zeros,
            ty_args=relax.AnyType(),
        ),
        _name="states",
    )


def _places(shape: "LibraryShape") -> "list[tuple[int, int, Shape]]":
    """Return of each state the layer among those that have any, its place there, and its size."""
    layers = list(dict.fromkeys(index for index, _, _ in shape.spec.states()))
    names = list(sizes(shape))
    return [
        (layers.index(index), names.index(name), size) for index, name, size in shape.spec.states()
    ]
