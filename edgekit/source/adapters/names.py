"""The names in an adapter's file, next to those that transformers gives the base's modules.

An adapter that was trained through wrappers keeps their attributes in its names, and one that was
trained on a model that also sees has the decoder under a prefix. Neither changes a number.
"""

from collections.abc import Collection

from edgekit.source.names import Naming, best_prefix, common_prefix


def find(modules: Collection[str], *, base: Collection[str], head: str) -> Naming:
    """Find the prefix under which an adapter has most of its modules; usually that of the base.

    Args:
        modules: The adapter's names, `bare`.
        base: Transformers' names of the base's modules, without the output head.
        head: Transformers' name of the output head.
    """
    inner = {f"{name}.weight" for name in base}
    body = common_prefix(inner)
    tails = [name.removeprefix(body) for name in inner]
    stored_body = best_prefix([f"{name}.weight" for name in modules], tails, body)
    ends = [module for module in modules if module == head or module.endswith(f".{head}")]
    return Naming(
        body=body,
        stored_body=body if stored_body is None else stored_body,
        head=head,
        stored_head=ends[0] if len(ends) == 1 else head,
    )
