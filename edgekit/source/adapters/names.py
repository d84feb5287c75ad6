"""The names in an adapter's file, next to those that transformers gives the base's modules.

An adapter that was trained through wrappers keeps their attributes in its names, and one that was
trained on a model that also sees has the decoder under a prefix. Neither changes a number.
"""

from collections.abc import Collection
from dataclasses import dataclass

from edgekit.source.names import best_prefix, common_prefix


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What an adapter calls the modules of its base."""

    body: str = ""  # what transformers' names of the decoder's inner modules begin with
    stored_body: str = ""  # what they begin with in the adapter
    head: str = ""
    stored_head: str = ""

    @property
    def is_usual(self) -> bool:
        """Tell whether the adapter has transformers' own names."""
        return self.body == self.stored_body and self.head == self.stored_head

    def own(self, stored: str) -> str | None:
        """Return transformers' name of a module; None if it is of another part of a larger model.

        Args:
            stored: Its name in the adapter, `bare`.
        """
        if stored == self.stored_head:
            return self.head
        if not stored.startswith(self.stored_body):
            return None
        return self.body + stored.removeprefix(self.stored_body)

    def stored(self, own: str) -> str:
        """Return the adapter's name of a module."""
        if own == self.head:
            return self.stored_head
        return self.stored_body + own.removeprefix(self.body)


AS_IT_IS = Naming()


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
