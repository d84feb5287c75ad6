"""How large a ``.pte`` file gets, before there is a program."""

from collections.abc import Iterable

from edgekit.decoder import DecoderSpec
from edgekit.formats.executorch.storage import Part


def file_bytes(spec: DecoderSpec, parts: Iterable[Part], uses_llm_operators: bool) -> int:
    return sum(p.size_bytes for p in parts)
