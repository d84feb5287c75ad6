"""A ``Modelfile`` next to a GGUF file: what Ollama needs to take it as it is.

Source: parser/parser.go, template/template.go and server/model.go of ollama; what is quoted here
is what that parser reads back.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import MissingDependencyError, UsageError
from edgekit.text.template import ChatTemplate, Message, as_parts


if TYPE_CHECKING:
    from edgekit.model.card import SamplingDefaults
    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.tokenizer_files import TokenizerFiles


MODELFILE = "Modelfile"
_TEMPLATE_NOTE = """\
# There is no TEMPLATE here, since edgekit has not proven a translation of the chat template into
# Ollama's language. Ollama looks at the one inside the GGUF file and takes its own version if it
# knows a very similar one; `ollama show --template NAME` tells which. If it shows {{ .Prompt }},
# it found none and the model gets bare text: then send prompts that `edgekit run` has rendered, or
# run the bundle with edgekit or llama.cpp, which read the template itself.
"""
_NO_TEMPLATE_NOTE = "# The model has no chat template: it continues text.\n"
_MARK = "edgekit-system-mark"


def write(
    checkpoint: "CheckpointProtocol", directory: Path, entry: str, *, context_tokens: int
) -> None:
    """Write the ``Modelfile`` of a GGUF file in ``directory``."""
    text = modelfile(checkpoint, entry, context_tokens=context_tokens)
    (directory / MODELFILE).write_text(text, encoding="utf-8")


def modelfile(checkpoint: "CheckpointProtocol", entry: str, *, context_tokens: int) -> str:
    """Return the text of a ``Modelfile``.

    Args:
        checkpoint: The model.
        entry: The GGUF file next to it.
        context_tokens: How many tokens the bundle was planned for.
    """
    has_template = checkpoint.text.chat_template is not None
    parameters = [("num_ctx", str(context_tokens)), *sampling_parameters(checkpoint.sampling)]
    parameters += [("stop", text) for text in _stop_texts(checkpoint)]
    lines = [
        "# In this directory: ollama create NAME",
        f"FROM ./{entry}",
        "",
        (_TEMPLATE_NOTE if has_template else _NO_TEMPLATE_NOTE).rstrip(),
        *_fixed(checkpoint),
        "",
        *(_instruction(f"PARAMETER {name}", value) for name, value in parameters),
    ]
    system = default_system(checkpoint)
    lines += [] if system is None else [_instruction("SYSTEM", system)]
    licence = checkpoint.licence
    lines += [] if licence is None else [_instruction("LICENSE", licence)]
    return "\n".join(lines) + "\n"


def _fixed(checkpoint: "CheckpointProtocol") -> Iterator[str]:
    fixed = checkpoint.text.rules().template_variables
    if fixed:
        values = ", ".join(f"{name} = {value}" for name, value in fixed.items())
        yield f"# The template inside the file says {values}; a version of Ollama's own does not."


def sampling_parameters(defaults: "SamplingDefaults") -> Iterator[tuple[str, str]]:
    """Yield what the makers of the model state, under Ollama's names."""
    names: Mapping[str, float | None] = {
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "repeat_penalty": defaults.repetition_penalty,
    }
    for name, value in names.items():
        if value is not None:
            yield name, f"{value:g}"


def _stop_texts(checkpoint: "CheckpointProtocol") -> list[str]:
    from edgekit.model.tokenizer_files import added_tokens

    texts = {id: text for text, id in added_tokens(checkpoint.text.tokenizer_json).items()}
    ends = [texts[id] for id in checkpoint.text.declared_stop_ids if id in texts]
    return [*ends, *checkpoint.text.stop_strings]


def default_system(checkpoint: "CheckpointProtocol") -> str | None:
    """Return the system message that the chat template puts in by itself, None if it has none.

    Ollama's versions of templates have none of their own, so a model would miss it.
    """
    files = checkpoint.text
    if files.chat_template is None:
        return None
    try:
        template = ChatTemplate.compile(files.chat_template)
        without = _render(template, files, None)
        before, _, after = _render(template, files, _MARK).partition(_MARK)
        if not (without.startswith(before) and without.endswith(after)):
            return None
        system = without[len(before) : len(without) - len(after)]
        return system if system and _render(template, files, system) == without else None
    except (UsageError, MissingDependencyError):  # Gemma's has no system role
        return None


def _render(template: ChatTemplate, files: "TokenizerFiles", system: str | None) -> str:
    turns: list[Message] = [{"role": "user", "content": "Hi"}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    known = {"tools": None, "documents": None, **files.special_tokens}
    return template.render(
        as_parts(turns, files.template_call.content_parts), {**known, "add_generation_prompt": True}
    )


# The language of Modelfiles


def _instruction(command: str, value: str) -> str:
    quoted = quote(value)
    if quoted is None:
        return f"# {command}: not written, a Modelfile cannot hold {value!r}"
    return f"{command} {quoted}"


def quote(text: str) -> str | None:
    r'''Return ``text`` as a Modelfile states it; None if none can.

    There are no escapes. One quote on each side holds what has none itself, three hold the rest:
    all but a line that ends in three, and characters that do not print, which Ollama drops.

    >>> quote("temperature 1"), quote('say "hi"'), quote("a\x00b")
    ('"temperature 1"', '"""say "hi""""', None)
    '''
    if not _survives(text):
        return None
    if '"' in text or "\n" in text or "\r" in text:
        return f'"""{text}"""'
    return f'"{text}"'


def _survives(text: str) -> bool:
    pieces: Sequence[str] = text.replace("\r", "\n").split("\n")
    ends_early = any(piece.endswith('"""') for piece in pieces[:-1])
    return not ends_early and all(piece.replace("\t", "").isprintable() for piece in pieces)
