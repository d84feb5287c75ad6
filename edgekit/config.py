"""A ``config.json`` that notices what nobody read.

A field that is silently ignored is how an export goes wrong without an error: a window, a scale, a
bias. So a family reads every field through `Config`, names the ones that cannot change the logits,
and `Config.refuse_unread` stops at the rest.
"""

from typing import Any, TypeVar, cast

from edgekit.errors import UsageError


T = TypeVar("T")

# Written by every transformers model and without effect on the logits of a decoder at inference.
NEUTRAL = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "hidden_dropout", "id2label", "initializer_range", "is_encoder_decoder", "is_llama_config",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "rope_interleaved", "torch_dtype",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
    "use_cache",
})  # fmt: skip


class Config:
    """Fields of one JSON object, with a memory of which were read."""

    def __init__(self, fields: dict[str, Any], *, origin: str) -> None:
        self._fields = fields
        self._origin = origin
        self._read = set(NEUTRAL)

    @property
    def origin(self) -> str:
        """The file the fields came from, for messages."""
        return self._origin

    def get(self, name: str, default: T) -> T:
        """Return a field, or ``default`` where it is absent or null.

        Raises:
            UsageError: If the field has another type than ``default``.
        """
        self._read.add(name)
        value: Any = self._fields.get(name)
        if value is None:
            return default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not None and not isinstance(value, type(default)):
            expected = type(default).__name__
            raise UsageError(f"{self._origin}: {name} = {value!r}, expected {expected}")
        return cast("T", value)

    def integer(self, name: str) -> int:
        """Return a positive integer that must be there.

        Raises:
            UsageError: If it is absent, no integer, or not between 1 and 2**31.
        """
        self._read.add(name)
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise UsageError(f"{self._origin}: {name} = {value!r}, expected a positive integer")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Return a positive integer, or None where the field is absent or null."""
        if self._fields.get(name) is None:
            self._read.add(name)
            return None
        return self.integer(name)

    def expect(self, **fields: object) -> None:
        """Accept fields whose other values this family does not implement.

        Raises:
            UsageError: If one is present with another value.
        """
        for name, only in fields.items():
            self._read.add(name)
            value = self._fields.get(name)
            if value is not None and value != only:
                raise UsageError(
                    f"{self._origin}: {name} = {value!r} is not supported",
                    hint=f"edgekit knows this family with {name} = {only!r} only",
                )

    def ignore(self, *names: str) -> None:
        """Name fields that cannot change what this family's models say."""
        self._read.update(names)

    def refuse_unread(self) -> None:
        """Stop at fields that nobody read: they might change what the model says."""
        unread = sorted(self._fields.keys() - self._read)
        if unread:
            raise UsageError(
                f"{self._origin} has fields this family does not know: {', '.join(unread)}",
                hint="remove them if they cannot change the logits, or report the model",
            )
