"""How large the inputs of every weight are, column by column, on a broad text of edgekit's own.

An error in a column that is multiplied with large numbers costs more than in one that is hardly
used, so rounding is importance-weighted: by the mean of the squared inputs. One streamed pass of
`interpreter` measures them, with one layer's weights in memory at a time. The result is kept on
disk under a hash of all it depends on.
"""

import contextlib
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import installed
from edgekit.bundle import kept
from edgekit.cache import cache_directory
from edgekit.encodings.files import readable, require_file
from edgekit.encodings.limits import CALIBRATION_BYTES, check_size
from edgekit.errors import EdgekitError, UsageError
from edgekit.model.checkpoint_protocol import Calibration, QuantMethod
from edgekit.model.spec import DecoderSpec
from edgekit.progress import Listener, Silent
from edgekit.proof import interpreter
from edgekit.quant.recipe import split_role
from edgekit.source.checkpoint import Checkpoint
from edgekit.text.tokenizer import Text


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Columns = npt.NDArray[np.float32]


DIRECTORY = Path(__file__).with_name("calibration_texts")
CHAT = "chat"  # this text is turns of a user and a model, pair by pair
TURN = "\n----\n"
PIECE_TOKENS = 512  # as many as llama-imatrix takes
MAX_OWN_TOKENS = 16384  # of a user's text: some minutes for a model of a billion weights
FEW_OWN_TOKENS = 1024  # of a user's text: less than a tenth of all is hardly heard
_FILE = "importance.npz"
VERSION = 1  # counts up when the same text would give other numbers

# Weights that read the same, by the first of them that a decoder has.
_SHARING = {
    "query": ("query", "key", "value", "head_gate"),
    "attention_output": ("attention_output",),
    "gate": ("gate", "up"),
    "up": ("up",),  # without a gate
    "down": ("down",),
    "router": ("router",),
    "expert_gate": ("expert_gate", "expert_up"),  # of all experts together
    "expert_down": ("expert_down",),
    "conv_in": ("conv_in",),
    "conv_output": ("conv_output",),
    "delta_qkv": ("delta_qkv", "delta_gate", "delta_beta", "delta_alpha"),
    "delta_output": ("delta_output",),
    "layer_gate": ("layer_gate",),
    "layer_output": ("layer_output",),
}


def announce(
    checkpoint: Checkpoint, *, own_text: str | None = None, method: QuantMethod = "weighted"
) -> Checkpoint:
    """Return the checkpoint, to be calibrated on a known text: all that a plan needs.

    ``native`` leaves it without a calibration.
    """
    if method == "native":
        return checkpoint
    announced = Calibration(text_sha256=text_sha256(own_text), method=method)
    return replace(checkpoint, calibration=announced)


def measure(
    checkpoint: Checkpoint, *, own_text: str | None = None, listener: Listener | None = None
) -> Checkpoint:
    """Return the checkpoint with the importance of its columns; arguments are `importance`'s."""
    found = importance(checkpoint, own_text=own_text, listener=listener)
    known = checkpoint.calibration or Calibration(text_sha256="")
    measured = replace(known, text_sha256=text_sha256(own_text), importance=found)
    return replace(checkpoint, calibration=measured)


def require() -> None:
    """Check that a calibration is possible here, before slow work.

    Raises:
        MissingDependencyError: If torch is not installed.
    """
    installed.require(
        "torch", purpose="a calibration", extra="gguf", otherwise="go without: --no-calibration"
    )


def importance(
    checkpoint: Checkpoint, *, own_text: str | None = None, listener: Listener | None = None
) -> "Mapping[str, Columns]":
    """Return the mean of the squared inputs of every matrix, column by column.

    Args:
        checkpoint: The model, adapter included.
        own_text: What the model will be used on; it joins edgekit's own text.
        listener: Who is told how far the pass is.

    Returns:
        By role, float32, shape ``(columns,)``. A head that is the embedding has that one's role;
        an embedding that is not a head is multiplied with nothing and is absent.

    Raises:
        UsageError: If a weight holds NaN or infinity.
        MissingDependencyError: If torch or tokenizers is not installed.
    """
    listener = listener or Silent()
    texts = pieces(checkpoint, own_text=own_text)
    out = _cache_path(checkpoint, texts)
    found = _read(out, checkpoint)
    if found is None:
        require()
        found = _measure(checkpoint, texts, listener)
        _write(out, found)
    return dict(_spread(found, checkpoint))


def reads_as(role: str, spec: DecoderSpec) -> str:
    """Return the first of the roles that are multiplied with the same inputs as one of a layer."""
    prefix, dot, part = role.rpartition(".")
    first = next(first for first in _measured(spec) if part in _SHARING[first])
    return f"{prefix}{dot}{first}"


def _measured(spec: DecoderSpec) -> list[str]:
    """Return what stands for all that read the same: ``up`` does without a gate only."""
    return [first for first in _SHARING if first != ("up" if spec.is_gated else "gate")]


def text_sha256(own_text: str | None = None) -> str:
    """Return the hash of all text that `importance` would read."""
    digest = hashlib.sha256()
    for _, text in [*built_in_texts(), ("own", own_text or "")]:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def read_own_text(path: Path) -> str:
    """Return a user's text.

    Raises:
        UsageError: If there is no such file, or it holds no text.
    """
    require_file(path)
    check_size(
        path, CALIBRATION_BYTES, hint=f"pass a part of it: {MAX_OWN_TOKENS} tokens are taken"
    )
    try:
        with readable(path):
            text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error}") from error
    if not text.strip():
        raise UsageError(f"{path} holds no text to calibrate on")
    return text


def note(checkpoint: Checkpoint, own_text: str | None) -> str | None:
    """Return what a user should know of a text that is too short to lead anything; else None."""
    if own_text is None:
        return None
    own = len(checkpoint.text.loaded().encode(own_text))
    if own >= FEW_OWN_TOKENS:
        return None
    built_in = sum(map(len, pieces(checkpoint)))
    return (
        f"--calibration has {own} tokens next to the {built_in} of edgekit's own text, so it "
        f"changes little: {FEW_OWN_TOKENS} or more lead the rounding"
    )


def built_in_texts() -> list[tuple[str, str]]:
    """Return edgekit's own texts with their names: prose, code, tables, chats, many languages."""
    files = sorted(DIRECTORY.glob("*.txt"))
    return [(path.stem, path.read_text(encoding="utf-8")) for path in files]


def pieces(checkpoint: Checkpoint, *, own_text: str | None = None) -> list[list[int]]:
    """Return all text as ids, in pieces that the context can hold."""
    text = checkpoint.text.loaded()
    length = min(PIECE_TOKENS, checkpoint.spec.context_tokens)
    found = [
        piece
        for name, content in built_in_texts()
        for ids in (_chats(text, content) if name == CHAT else [text.encode(content)])
        for piece in _cut(ids, length)
    ]
    own = list(_cut(text.encode(own_text), length)) if own_text else []
    return found + _some(own, max(1, MAX_OWN_TOKENS // length))


def _chats(text: Text, content: str) -> Iterator[list[int]]:
    """Yield each question with its answer as the model's template writes them."""
    turns = content.strip("\n").split(TURN)
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
        try:
            yield text.encode_chat(messages, add_generation_prompt=False)
        except UsageError:  # no template, or one for another use
            yield text.encode(f"{asked}\n\n{answered}\n")


def _cut(ids: list[int], length: int) -> Iterator[list[int]]:
    for first in range(0, len(ids), length):
        yield ids[first : first + length]


def _some(pieces: list[list[int]], count: int) -> list[list[int]]:
    """Return at most ``count`` pieces, from the beginning to the end of the text."""
    if len(pieces) <= count:
        return pieces
    return [pieces[index * len(pieces) // count] for index in range(count)]


def _measure(
    checkpoint: Checkpoint, texts: Sequence[Sequence[int]], listener: Listener
) -> "dict[str, Columns]":
    """Return the means, those that several weights share under the role of the first."""
    tokens = sum(map(len, texts))
    sums: dict[str, torch.Tensor] = {}
    measured = {*_measured(checkpoint.spec)}

    def observe(role: str, x: "torch.Tensor") -> None:
        if split_role(role)[1] in measured:
            squares = x.square().sum(0).double()
            sums[role] = sums[role] + squares if role in sums else squares

    with listener.track("calibrate", tokens * len(checkpoint.spec.layers)) as advance:
        states = interpreter.hidden_states(checkpoint, texts, observe=observe, advance=advance)
    sums[_head(checkpoint)] = sum(x.square().sum(0).double() for x in states)
    return {role: (total / tokens).float().numpy() for role, total in sums.items()}


def _head(checkpoint: Checkpoint) -> str:
    return "token_embedding" if checkpoint.spec.is_tied else "output_head"


def _spread(
    found: "Mapping[str, Columns]", checkpoint: Checkpoint
) -> "Iterator[tuple[str, Columns]]":
    """Yield what was measured once for every weight of a decoder that reads it."""
    roles = {role for role, _ in checkpoint.spec.weights()}
    for role, columns in found.items():
        prefix, dot, part = role.rpartition(".")
        for sharing in _SHARING.get(part, (part,)):
            if (reader := f"{prefix}{dot}{sharing}") in roles:
                yield reader, columns


def _cache_path(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> Path:
    """Return where the result for this model and text is kept; ids say how text was cut, too."""
    adapter = checkpoint.adapter
    identity = [VERSION, checkpoint.sha256, adapter and adapter.sha256, texts]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return cache_directory() / "importance" / digest[:32]


def _read(out: Path, checkpoint: Checkpoint) -> "dict[str, Columns] | None":
    """Return what is kept; None if there is nothing, or it is damaged."""
    import numpy as np

    if not kept.is_whole(out):
        return None
    try:
        with (out / _FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {role: arrays[role] for role in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    shapes_found = {role: columns.shape for role, columns in _spread(found, checkpoint)}
    shapes = dict(checkpoint.spec.weights())
    is_whole = all(shapes[role][-1:] == shape for role, shape in shapes_found.items())
    return found if is_whole and _head(checkpoint) in shapes_found else None


def _write(out: Path, found: "Mapping[str, Columns]") -> None:
    """Keep what was found; where that is not possible it is measured again next time."""
    import numpy as np

    with contextlib.suppress(OSError, EdgekitError):  # a full or read-only disk
        kept.directory(out, lambda work: np.savez(work / _FILE, allow_pickle=False, **found))
