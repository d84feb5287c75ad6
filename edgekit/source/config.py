"""A ``config.json`` that notices what nobody read.

A field that is silently ignored is how an export goes wrong without an error: a window, a scale, a
bias. So a family reads every field through `Config`, names the ones that cannot change the logits,
and `Config.refuse_unread` stops at the rest.
"""

import sys
from typing import Any, Self, TypeVar

from edgekit.errors import UsageError


T = TypeVar("T")

# Written by transformers models, training tools and old versions, and without effect on the logits
# of a decoder at inference. The second block are generation settings that version 4 kept here, the
# third what MLC writes into a config.
NEUTRAL = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
    "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "auto_map",
    "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype", "embd_pdrop",
    "eos_token_id", "finetuning_task", "gradient_checkpointing", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config", "label2id",
    "mask_token_id", "model_type", "num_labels", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict",
    "rope_interleaved", "sep_token_id", "task_specific_params", "tf_legacy_loss", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",

    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",

    "context_window_size", "prefill_chunk_size",
})  # fmt: skip


# Parts that older versions named in every config, and that a decoder has only where they are set.
NEUTRAL_WHEN_OFF = frozenset({
    "add_cross_attention", "cross_attention_hidden_size", "pruned_heads", "tie_encoder_decoder",
})  # fmt: skip


class Config:
    """Fields of one JSON object, with a memory of which were read."""

    def __init__(self, fields: dict[str, Any], *, origin: str) -> None:
        self._fields = fields
        self._origin = origin
        self._read = set(NEUTRAL)
        self._older: dict[str, str] = {}

    @property
    def origin(self) -> str:
        """The file the fields came from, for messages."""
        return self._origin

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def accept(self, **older: str) -> None:
        """Name what fields were called before: the older name counts where the newer is absent.

        Raises:
            UsageError: If both are there and disagree.
        """
        for name, before in older.items():
            if name in self and before in self and self._fields[name] != self._fields[before]:
                raise UsageError(
                    f"{self._origin}: {name} = {self._fields[name]!r} and {before} = "
                    f"{self._fields[before]!r} are the same field and differ"
                )
            self._read.add(before)
        self._older |= older

    def _spelled(self, name: str) -> str:
        """Return the name that a field has here, and take it for read."""
        before = self._older.get(name, name)
        found = before if name not in self._fields and before in self._fields else name
        self._read.add(found)
        return found

    def get(self, name: str, default: T) -> T:
        """Return a field, or ``default`` where it is absent or null.

        Raises:
            UsageError: If the field has another type than ``default``.
        """
        name = self._spelled(name)
        value: Any = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, type(default)):
            expected = type(default).__name__
            raise UsageError(f"{self._origin}: {name} = {value!r}, expected {expected}")
        return value

    def integer(self, name: str, *, most: int = 2**31 - 1) -> int:
        """Return a positive integer that must be there.

        Raises:
            UsageError: If it is absent, no integer, or not between 1 and ``most``.
        """
        name = self._spelled(name)
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise UsageError(
                f"{self._origin}: {name} = {value!r}, expected an integer from 1 to {most}"
            )
        return value

    def optional_integer(self, name: str, *, absent: int | None = None) -> int | None:
        """Return a positive integer, None where it is null, ``absent`` where it is not there."""
        name = self._spelled(name)
        if name not in self._fields:
            return absent
        return None if self._fields[name] is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number, or ``default`` where it is absent or null.

        Raises:
            UsageError: If it is not a finite number above zero, or absent without a default.
        """
        name = self._spelled(name)
        value: Any = self._fields.get(name)
        if value is None:
            value = default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < sys.float_info.max:
            raise UsageError(f"{self._origin}: {name} = {value!r}, expected a positive number")
        return float(value)

    def optional_number(self, name: str, *, absent: float | None = None) -> float | None:
        """Return a positive number, None where it is null, ``absent`` where it is not there."""
        name = self._spelled(name)
        if name not in self._fields:
            return absent
        return None if self._fields[name] is None else self.number(name)

    def text(self, name: str) -> str | None:
        """Return a string, None where the field is absent, null or something else."""
        value = self._fields.get(name)
        return value if isinstance(value, str) else None

    def section(self, name: str) -> Self:
        """Return the object in a field, empty where it is absent or null.

        Whoever reads it calls its `refuse_unread`.
        """
        fields = self.get(name, dict[str, Any]())
        return type(self)(fields, origin=f"{self._origin}: {name}")

    def expect(self, **fields: object) -> None:
        """Accept fields whose other values this family does not implement.

        Raises:
            UsageError: If one is present with another value.
        """
        for name, only in fields.items():
            name = self._spelled(name)  # noqa: PLW2901 - the same field
            value = self._fields.get(name)
            if value is not None and value != only:
                raise UsageError(
                    f"{self._origin}: {name} = {value!r} is not supported",
                    hint=f"edgekit knows this family with {name} = {only!r} only",
                )

    def ignore(self, *names: str) -> None:
        """Name fields that cannot change what this family's models say."""
        self._read.update(names)

    def unread_strings(self) -> tuple[str, ...]:
        """Take strings that nobody read for what tools leave behind: a name, a path, a version.

        Returns:
            A note about them, if there are any.
        """
        strings = {name: value for name, value in self._unread().items() if isinstance(value, str)}
        self._read.update(strings)
        if not strings:
            return ()
        shown = ", ".join(f"{name} = {value!r}" for name, value in sorted(strings.items()))
        return (f"{self._origin} has fields that edgekit does not know, taken for names: {shown}",)

    def refuse_unread(self) -> None:
        """Stop at fields that nobody read: they might change what the model says.

        A null is an absent field.

        Raises:
            UsageError: Naming the fields and what they hold.
        """
        if unread := self._unread():
            shown = (f"{name} = {_short(value)}" for name, value in sorted(unread.items()))
            raise UsageError(
                f"{self._origin} has fields this family does not know: {', '.join(shown)}",
                hint="remove them if they cannot change the logits, or report the model",
            )

    def _unread(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self._fields.items()
            if value is not None
            and name not in self._read
            and (value or name not in NEUTRAL_WHEN_OFF)
        }


def _short(value: Any, *, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
