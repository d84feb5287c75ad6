"""The names in an adapter's file, next to those that transformers gives the base's modules.

An adapter that was trained through wrappers keeps their attributes in its names, and one that was
trained on a model that also sees has the decoder under a prefix. Neither changes a number.
"""

import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass


# torch.compile, FullyShardedDataParallel, torch.distributed's checkpoint wrapper (torch 2.13).
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# PEFT wraps a model twice, DataParallel once; some tools do either more than once, or not at all.
_OUTER = re.compile(r"(?:base_model\.model\.|module\.)+")


def unwrapped(key: str) -> str:
    """Return a name without the attributes of what was around the model or its modules.

    >>> unwrapped("base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.lora_A")
    'model.layers.0.mlp.up_proj.lora_A'
    """
    name = _WRAPPERS.sub("", key)
    match = _OUTER.match(name)
    return name[match.end() :] if match else name


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
            stored: Its name in the adapter, `unwrapped`.
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
        modules: The adapter's names, `unwrapped`.
        base: Transformers' names of the base's modules, without the output head.
        head: Transformers' name of the output head.
    """
    body = os.path.commonprefix([f"{name}." for name in base])  # noqa: RUF071 - of characters
    body = body[: body.rfind(".") + 1]
    tails = {name.removeprefix(body) for name in base}
    counts: Counter[str] = Counter()
    for module in modules:
        parts = module.split(".")
        for first in range(len(parts)):
            if ".".join(parts[first:]) in tails:
                counts["".join(f"{part}." for part in parts[:first])] += 1
                break
    stored_body = max(counts, key=lambda it: (counts[it], it == body), default=body)
    ends = [module for module in modules if module == head or module.endswith(f".{head}")]
    return Naming(
        body=body,
        stored_body=stored_body,
        head=head,
        stored_head=ends[0] if len(ends) == 1 else head,
    )
