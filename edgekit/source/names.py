"""The names of stored tensors, next to those that transformers gives a decoder's.

Training tools wrap modules, and a wrapper's attribute stays in every name that is saved through it:
``module.`` of data parallelism, ``_orig_mod.`` of torch.compile, ``base_model.model.`` of PEFT,
``language_model.`` of models that see. Others save a part without the name of what holds it. None
of this changes a number: one prefix is found for all tensors of the decoder, or none.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from edgekit.errors import UsageError


# Attributes of wrappers that may stand around any module: torch.compile, FullyShardedDataParallel,
# and the checkpoint wrapper of torch.distributed (torch 2.13).
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_DEEPEST = 6  # model, layer, block, module: no tool wraps one tensor's modules more often
# Prefixes that whole models are wrapped with: DataParallel, and PEFT without its ``model.``.
_OUTER = ("module.", "base_model.model.")


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How the names in a file differ from transformers' own."""

    wrappers: tuple[str, ...] = ()  # those of `WRAPPERS` that occur
    body: str = ""  # what transformers' names of the decoder's inner tensors begin with
    stored_body: str = ""  # what those in the file begin with instead
    head: str = ""  # transformers' name of the output head
    stored_head: str = ""
    # Which names the decoder has, where a stored one without a prefix may be another's; None: all.
    wanted: frozenset[str] | None = field(default=None, repr=False)

    @property
    def is_usual(self) -> bool:
        """Tell whether the file has transformers' own names."""
        return not self.wrappers and self.body == self.stored_body and self.head == self.stored_head

    def own(self, stored: str) -> str | None:
        """Return transformers' name of a stored tensor, None if it is not the decoder's."""
        name = unwrapped(stored)
        if name == self.stored_head:
            return self.head
        if not name.startswith(self.stored_body):
            return None
        own = self.body + name.removeprefix(self.stored_body)
        is_the_decoders = self.stored_body or self.wanted is None or own in self.wanted
        return own if is_the_decoders else None

    def stored(self, own: str) -> str:
        """Return the stored name, without wrappers, of what transformers calls so."""
        if own == self.head:
            return self.stored_head
        return self.stored_body + own.removeprefix(self.body)

    def patterns(self) -> dict[str, str]:
        """Return regular expressions that make transformers' names of the stored ones.

        They are for ``key_mapping`` of ``from_pretrained``, which replaces each once in a name.
        """
        found = _within(self.wrappers)
        if self.head != self.stored_head:
            found[f"^{re.escape(self.stored_head)}$"] = self.head
        if self.stored_body.endswith(f".{self.body}"):  # around whatever name the body has
            found[f"^{re.escape(self.stored_body.removesuffix(self.body))}"] = ""
        elif self.body != self.stored_body:
            found[f"^{re.escape(self.stored_body)}"] = self.body
        return found


USUAL = Naming()


def outer_patterns() -> dict[str, str]:
    """Return regular expressions that take off what is around a whole model, whichever it is."""
    return {**_within(WRAPPERS), f"^(?:{'|'.join(map(re.escape, _OUTER))})+": ""}


def _within(wrappers: Collection[str]) -> dict[str, str]:
    """Return regular expressions for wrappers within wrappers; an empty group makes another one."""
    return {
        re.escape(wrapper) + "(?:)" * depth: "" for wrapper in wrappers for depth in range(_DEEPEST)
    }


def bare(name: str) -> str:
    """Return a name also without what was around the whole model, as often as it was.

    >>> bare("module.base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.lora_A")
    'model.layers.0.mlp.up_proj.lora_A'
    """
    name = unwrapped(name)
    while outer := next((it for it in _OUTER if name.startswith(it)), None):
        name = name.removeprefix(outer)
    return name


def unwrapped(name: str) -> str:
    """Return a name without the attributes of wrappers, wherever they stand."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def find(stored: Collection[str], *, inner: Collection[str], head: str, origin: str) -> Naming:
    """Find the one prefix under which a file holds a decoder.

    Args:
        stored: The names in the file.
        inner: Transformers' names of the decoder's tensors without the output head.
        head: Transformers' name of the output head.
        origin: The file, for messages.

    Raises:
        UsageError: If two tensors have one name without their wrappers, or some of the decoder is
            there under a prefix and the rest is not.
    """
    body = common_prefix(inner)
    names = {unwrapped(name) for name in stored}
    if len(names) < len(stored):
        raise UsageError(f"{origin} holds a tensor twice, with and without a wrapper in its name")
    tails = [name.removeprefix(body) for name in inner]
    stored_body = best_prefix(names, tails, body)
    if stored_body is None:  # nothing fits; the missing tensors will be named
        stored_body = body
    naming = Naming(
        wrappers=tuple(w for w in WRAPPERS if any(w in name for name in stored)),
        body=body,
        stored_body=stored_body,
        head=head,
        stored_head=_stored_head(names, head, body=body, stored_body=stored_body),
        wanted=frozenset(inner),
    )
    _refuse_a_part(naming, names, tails, origin)
    return naming


def common_prefix(names: Collection[str]) -> str:
    """Return the dotted beginning of all names, with its dot."""
    first, last = min(names).split("."), max(names).split(".")
    parts = takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))
    return "".join(f"{part}." for part, _ in parts)


def best_prefix(names: Collection[str], tails: Collection[str], body: str) -> str | None:
    """Return the prefix under which most of the tensors are found; transformers' own if equal."""
    found: Counter[str] = Counter()
    by_last = _by_last_parts(tails)
    for name in names:
        for tail in by_last.get(_last_parts(name), ()):
            prefix = name.removesuffix(tail)
            if prefix != name and (not prefix or prefix.endswith(".")):
                found[prefix] += 1
    if not found:
        return None
    return max(found, key=lambda prefix: (found[prefix], prefix == body, -len(prefix)))


def _by_last_parts(tails: Collection[str]) -> dict[str, list[str]]:
    by_last: dict[str, list[str]] = {}
    for tail in tails:
        by_last.setdefault(_last_parts(tail), []).append(tail)
    return by_last


def _last_parts(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _stored_head(names: Collection[str], head: str, *, body: str, stored_body: str) -> str:
    """Return the stored name of the output head: next to the body, or the only one there is."""
    is_nested = stored_body == body or stored_body.endswith(f".{body}")
    outer = stored_body.removesuffix(body) if is_nested else ""
    if outer + head in names:
        return outer + head
    found = [name for name in names if name.endswith(f".{head}")]
    return found[0] if len(found) == 1 else head


def _refuse_a_part(
    naming: Naming, names: Collection[str], tails: Collection[str], origin: str
) -> None:
    if naming.body == naming.stored_body:
        return
    missing = sorted(tail for tail in tails if naming.stored_body + tail not in names)
    if missing:
        raise UsageError(
            f"{origin} holds tensors under {naming.stored_body!r}, where transformers has "
            f"{naming.body!r}; without that prefix {len(missing)} are missing, the first is "
            f"{naming.stored_body}{missing[0]}",
            hint=f"the file holds {listed(names)}",
        )


def listed(names: Collection[str], *, most: int = 4) -> str:
    """Return some names for a message, and how many there are."""
    shown = ", ".join(sorted(names)[:most])
    return f"{len(names)} tensors: {shown}{', …' if len(names) > most else ''}"


def groups(names: Collection[str]) -> Iterator[str]:
    """Yield what tensors belong to, by the beginning of their names, and how many each has."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts[".".join(parts[: 2 if parts[0] == "model" else 1])] += 1
    for group, count in sorted(counts.items()):
        yield f"{group} ({count} tensor{'' if count == 1 else 's'})"


def notes(naming: Naming) -> Iterator[str]:
    """Yield what was left out of the names."""
    if naming.wrappers:
        yield f"{' and '.join(map(repr, naming.wrappers))} in the names of tensors is left out"
    if naming.body != naming.stored_body:
        yield (
            f"tensors are stored under {naming.stored_body!r}"
            if naming.stored_body
            else "tensors are stored without a prefix"
        ) + f", and read as {naming.body!r}"
