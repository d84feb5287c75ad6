"""The child process in which strangers' templates run and their tokenizers are tried first.

``python -m edgekit.text.guarded`` is that child. Whatever a template does, and whatever a file
makes the tokenizers library do, costs no more than the limits of `edgekit.encodings.limits`.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgekit.encodings import limits
from edgekit.runtime.limited import Allowance, Worker, work


TEMPLATE = Allowance(cpu_s=limits.TEMPLATE_CPU_S, memory_bytes=limits.CHILD_MEMORY_BYTES)
_KEPT_BYTES = 1 << 20  # a child that has opened a larger file has less memory left for others
_WORKER = Worker(__name__)


def start() -> None:
    """Start the child while something else is done, which takes a tenth of a second."""
    _WORKER.start()


def ask(kind: str, question: Mapping[str, Any], allowance: Allowance) -> dict[str, Any]:
    """Return the child's answer to a question of a kind, ``"template"`` or ``"tokenizer"``.

    Raises:
        OverLimitError: If it takes more than its allowance, or ends the child.
        TypeError: If JSON cannot hold the question.
    """
    return _WORKER.ask({"kind": kind, **question}, allowance)


def try_tokenizer(tokenizer_json: Path, texts: Sequence[str]) -> str | None:
    """Have the child open a tokenizer and use it once, and return what is wrong with it.

    Args:
        tokenizer_json: The file.
        texts: What it reads and writes.

    Raises:
        OverLimitError: If it takes more than a file of its size may, or ends the child.
    """
    size = tokenizer_json.stat().st_size
    allowance = Allowance(
        cpu_s=limits.TOKENIZER_CPU_S + size // limits.TOKENIZER_BYTES_PER_CPU_S,
        memory_bytes=limits.CHILD_MEMORY_BYTES + size * limits.TOKENIZER_MEMORY_PER_BYTE,
    )
    try:
        found = ask("tokenizer", {"path": str(tokenizer_json), "texts": list(texts)}, allowance)
    finally:
        if size > _KEPT_BYTES:
            _WORKER.close()
    wrong: str | None = found["wrong"]
    return wrong


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    if question["kind"] == "template":
        from edgekit.text import sandbox

        return sandbox.answer(question)
    return {"wrong": _wrong_with(question["path"], question["texts"])}


def _wrong_with(path: str, texts: Sequence[str]) -> str | None:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for text in texts:
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    except BaseException as error:
        if isinstance(error, MemoryError):
            raise
        if type(error) is not Exception and not is_panic(error):
            raise
        return re.sub(r"\s+", " ", str(error))[:300]
    return None


def is_panic(error: BaseException) -> bool:
    """Tell whether the Rust code of a library has panicked."""
    return type(error).__name__ == "PanicException"


if __name__ == "__main__":
    with suppress(ImportError):  # where only tokenizers are tried
        from edgekit.text import sandbox

        sandbox.prepare()
    work(_answer)
