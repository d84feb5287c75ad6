"""What is installed, what works, and how to fix the rest: a tiny model through each back-end."""

import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from edgekit import formats, installed, scratch
from edgekit.browser import chromium
from edgekit.browser.packages import npm
from edgekit.errors import EdgekitError, MissingDependencyError
from edgekit.formats import BuildRequest
from edgekit.model.mixers import Attention
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.shapes import Shape
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.progress import Listener, Silent
from edgekit.source.checkpoint import Checkpoint


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.formats import ReadableRunning
    from edgekit.model.checkpoint_protocol import Tensor


_VERSION_S = 20  # for a program to say its version
State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    state: State
    found: str
    way_out: str = ""


def doctor(*, listener: Listener | None = None) -> list[Finding]:
    """Look at everything; nothing is changed and nothing leaves this machine.

    Args:
        listener: Who is told what happens.
    """
    findings = [*_system(), *_packages()]
    names = formats.names()
    with (listener or Silent()).track("try the back-ends", len(names)) as advance:
        for name in names:
            findings.append(_backend(name))
            advance(1)
    return findings


def _system() -> Iterator[Finding]:
    yield Finding(
        name="python",
        state="ok",
        found=f"{platform.python_version()} on {platform.platform(terse=True)}",
    )
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    yield Finding(
        name="C++ compiler",
        state="ok" if compiler else "missing",
        found=compiler or "none; llama.cpp is compiled when installed, ExecuTorch's shim when used",
        way_out="" if compiler else "apt install g++ (Debian), xcode-select --install (macOS)",
    )
    emscripten = shutil.which("em++")
    yield Finding(
        name="Emscripten",
        state="ok" if emscripten else "missing",
        found=emscripten or "none; it links the libraries that WebLLM runs MLC bundles with",
        way_out=""
        if emscripten
        else "apt install emscripten (Debian), brew install emscripten (macOS)",
    )
    yield _program("browser", chromium.find, "for `--device browser`")
    yield _program("npm", npm, "for what runs in browsers")


def _program(name: str, find: Callable[[], str | Path], purpose: str) -> Finding:
    """Return where a program is and which version, or what installs it."""
    try:
        path = str(find())
    except MissingDependencyError as error:
        return Finding(name=name, state="missing", found=f"{error}; {purpose}", way_out=error.hint)
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=_VERSION_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(
            name=name, state="broken", found=f"{path}: {error}", way_out="install it again"
        )
    return Finding(name=name, state="ok", found=f"{path}, {done.stdout.strip() or 'no version'}")


def _packages() -> Iterator[Finding]:
    """Yield one finding for each extra: all of its packages, or those that are missing."""
    for extra, packages in installed.extras().items():
        present = installed.versions(packages)
        missing = [name for name in packages if name not in present]
        versions = ", ".join(f"{name} {version}" for name, version in present.items())
        yield Finding(
            name=f"edgekit[{extra}]",
            state="missing" if missing else "ok",
            found=f"missing: {', '.join(missing)}" if missing else versions,
            way_out=f"pip install 'edgekit[{extra}]'" if missing else "",
        )


def _backend(name: str) -> Finding:
    """Convert a tiny model, load it and ask it for a token."""
    try:
        with scratch.directory("doctor") as directory:
            answer = _try_out(name, directory)
    except MissingDependencyError as error:
        return Finding(
            name=f"{name} back-end", state="missing", found=str(error), way_out=error.hint
        )
    except (EdgekitError, ImportError, OSError) as error:
        return Finding(
            name=f"{name} back-end",
            state="broken",
            found=f"{type(error).__name__}: {error}",
            way_out=f"pip install --force-reinstall 'edgekit[{formats.get(name).RUN_EXTRA}]'",
        )
    return Finding(name=f"{name} back-end", state="ok", found=answer)


def _try_out(name: str, directory: Path) -> str:
    fmt, running = formats.get(name), formats.running(name)
    state = running.runtime_state()
    recipe = next(iter(fmt.RECIPES.values()))  # the most faithful
    installed.require("numpy", purpose="a tiny model", extra=fmt.RUN_EXTRA)
    tiny = _tiny_checkpoint(directory)
    try:
        request = BuildRequest(recipe=recipe)
        writing = formats.writing(name)
        entry = writing.convert(tiny, request, directory, progress=lambda _: None)
    except MissingDependencyError as error:  # on a device, which only runs what was made elsewhere
        return f"{state}; bundles run here but cannot be exported: {error} ({error.hint})"
    if not running.is_run_here(None):
        read = cast("ReadableRunning", running).read_back(directory / entry, tiny.spec)
        norm = read.weight("final_norm")
        return (
            f"{state}; a tiny model, {len(norm)} wide, was written as {recipe.name} and read back"
        )
    session = running.load(directory / entry, context_tokens=32, threads=1)
    try:
        token = int(session.prefill([1, 2, 3]).argmax())
    finally:
        session.close()
    return f"{state}; a tiny model, written as {recipe.name}, ran and produced token {token}"


@dataclass(frozen=True)
class _RandomTensor:
    """Weights that need no file."""

    shape: Shape
    seed: int

    @property
    def size_bytes(self) -> int:
        return 4 * self.shape[0] * (self.shape[1] if self.shape[1:] else 1)

    def read(self, first_row: int = 0, rows: int | None = None) -> "npt.NDArray[np.float32]":
        import numpy as np

        values = np.random.default_rng(self.seed).normal(0, 0.1, self.shape).astype(np.float32)
        return values[first_row : None if rows is None else first_row + rows]


def _tiny_checkpoint(directory: Path) -> Checkpoint:
    """Return a Llama of two layers that reads single bytes."""
    from edgekit.source import families

    spec = DecoderSpec(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        context_tokens=64,
        layers=(Layer(rope=Rope(width=16, theta=10_000.0)),) * 2,
        attention=Attention(heads=4, num_kv_heads=2, head_dim=16, softmax_scale=0.25),
        norm=Norm(kind="rms", epsilon=1e-5),
        is_tied=True,
    )
    family = families.get("llama")
    tensors: Mapping[str, Tensor] = {
        family.source(role, spec).tensor: _RandomTensor(shape, seed)
        for seed, (role, shape) in enumerate(spec.weights())
    }
    return Checkpoint(
        directory=directory / "tiny",
        architecture="llama",
        spec=spec,
        tensors=tensors,
        text=_byte_tokenizer(directory),
    )


def _byte_tokenizer(directory: Path) -> TokenizerFiles:
    """Write a byte-level tokenizer without merges: 256 letters and an end token."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]  # fmt: skip
    letters = [chr(code) for code in printable]
    letters += [chr(0x100 + index) for index in range(256 - len(letters))]
    end = {"id": 256, "content": "<|end|>", "special": True, "single_word": False,
           "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": [end],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {letter: index for index, letter in enumerate(letters)} | {"<|end|>": 256},
            "merges": [],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return TokenizerFiles.open(directory, config={"eos_token_id": 256})
