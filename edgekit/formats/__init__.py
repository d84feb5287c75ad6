"""Formats: how an artifact is written on a workstation and loaded on a device.

A package in here is one format. Its ``__init__`` is its face: the constants of `Format`, which say
what there is to choose. Its module ``writing`` has the names of `Writing` and is what a workstation
asks; ``running`` has those of `Running` and is all that a device needs. Put a package ``tflite``
here and it is a choice of ``--format``, a line of ``edgekit formats``, and a case of
``tests/formats/test_formats.py``; nothing else needs an edit.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekit.errors import UsageError
from edgekit.progress import Advance
from edgekit.quant.planned import PlannedWeight
from edgekit.quant.recipe import Recipe, TensorType
from edgekit.runtime.session import Session


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.model.checkpoint_protocol import CheckpointProtocol
    from edgekit.model.spec import DecoderSpec


PAGE = Path(__file__).parent / "page"  # what pages of all formats have


@dataclass(frozen=True, kw_only=True)
class GpuBuffer:
    """An array that a GPU must hold and bind as a whole."""

    name: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an artifact will hold, known from headers alone."""

    placements: tuple[PlannedWeight, ...]
    artifact_bytes: int
    is_exact: bool  # whether the file has this size to the byte
    notes: tuple[str, ...] = ()  # what a user should know about the files
    calibration: str | None = None  # SHA-256 of the calibration text, where one is used
    not_on_webgpu: str | None = None  # what browsers' GPUs get wrong in this model, if anything
    variant: str | None = None  # which of the format's builds, where it has several
    largest_buffer: GpuBuffer | None = None  # what a browser must be able to bind
    needs_shader_f16: bool = False  # whether a browser's GPU must know float16
    kernel_kl_nats: float = 0.0  # mean KL that the runtime's own kernels add to any weights
    is_half: bool = False  # whether products are computed and the cache is kept in float16
    overhead_bytes: int = 0  # as many weights take as long as the states that a token changes
    overhead_s: float = 0.0  # the rest of a token's work, which no processor shortens
    reads_by_token: bool = False  # whether a prompt takes a call of the program for each token
    lacks_library: bool = False  # whether a user has to compile something before anything runs it

    @property
    def substituted(self) -> tuple[PlannedWeight, ...]:
        """The weights that are stored otherwise than the recipe asked."""
        return tuple(p for p in self.placements if p.tensor_type != p.wanted)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What a runtime holds while it answers, in bytes, part by part."""

    weights_bytes: int
    cache_bytes: int
    compute_bytes: int
    runtime_bytes: int  # interpreter, libraries, tokenizer

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return self.weights_bytes + self.cache_bytes + self.compute_bytes + self.runtime_bytes


@dataclass(frozen=True, kw_only=True)
class ContextLimit:
    """How far a runtime agrees with a checkpoint, and why no further."""

    tokens: int
    reason: str


class DecoderWeights(Protocol):
    """Weights by role, as a decoder multiplies with them, and the decoder they are for."""

    @property
    def spec(self) -> "DecoderSpec":
        """What to do with them."""
        ...

    def weight(
        self, role: str, first_row: int = 0, rows: int | None = None
    ) -> "npt.NDArray[np.float32]":
        """Return some rows of a weight, or all, in float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What is asked of an artifact, handed on whole to whoever plans and writes it."""

    recipe: Recipe
    context_tokens: int | None = None  # what a runner must hold; None: all that the format can
    split_bytes: int | None = None  # the most that one file may take; None: one file
    variant: str | None = None  # one of the format's `VARIANTS`; None: the usual one
    # Whether to compile what the format's runtime wants besides weights; None: where nobody offers
    # it and the tools are there.
    compiles: bool | None = False


@dataclass(frozen=True, kw_only=True)
class NpmPackage:
    """One version of a package, as npm's registry has it."""

    name: str
    version: str
    integrity: str  # of its tarball: "sha512-…", in base64

    def __str__(self) -> str:
        """Return it as npm names it: ``onnxruntime-web@1.31.0``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class BrowserRequest:
    """What a page must open, and what it needs of the browser's GPU."""

    entry: str  # the file that the runtime opens
    files: tuple[str, ...]  # all that it reads, from the directory of the entry
    features: tuple[str, ...] = ()  # of WebGPU
    largest_buffer: GpuBuffer | None = None  # what the GPU must bind at once
    runs_in_wasm: bool = True  # whether the runtime can do without a GPU
    reads_text: bool = False  # whether the runtime takes text, and not ids
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the format's own module reads
    connects_to: tuple[str, ...] = ()  # other origins that it fetches from


@dataclass(frozen=True, kw_only=True)
class BrowserMemory:
    """What all processes of a browser hold at most while a page answers."""

    base_bytes: int  # with a model of a few layers
    copies: float  # of the artifact's bytes, beyond that

    def peak_bytes(self, artifact_bytes: int) -> int:
        """Return what it takes with an artifact of this size."""
        return round(self.base_bytes + self.copies * artifact_bytes)


class Format(Protocol):
    """The face of a format: what a user chooses from, known without importing anything else."""

    TENSOR_TYPES: Mapping[str, TensorType]  # by name; the support matrix is made from these
    RECIPES: Mapping[str, Recipe]  # the values of --quant, most faithful first
    DEFAULT_RECIPES: tuple[str, ...]  # those a plan considers by default, most faithful first
    MIXES_TENSOR_TYPES: bool  # whether any matrix may have any of them
    ENDING: str  # of the name of the file that `Running.load` opens
    VARIANTS: tuple[str, ...]  # builds for different programs on the device, the usual one first
    COMPILES: str  # what `BuildRequest.compiles` is about; empty where there is no such thing
    RUNTIME: str  # what opens the artifacts, as people call it
    EXTRA: str  # `pip install 'edgekit[EXTRA]'` makes and proves artifacts
    RUN_EXTRA: str  # `pip install 'edgekit[RUN_EXTRA]'` runs them


class Writing(Protocol):
    """What the module ``writing`` of a format offers; for a module, PEP 544 ignores ``self``."""

    def lay_out(self, checkpoint: "CheckpointProtocol", request: BuildRequest) -> Layout:
        """Return what an artifact would hold, from headers alone.

        Raises:
            UsageError: If the format cannot express this decoder, hold this recipe, or be split.
        """
        ...

    def context_limit(
        self, checkpoint: "CheckpointProtocol", *, compiles: bool | None = False
    ) -> ContextLimit:
        """Return the longest context in which the runtime says what the checkpoint says.

        ``compiles`` is that of `BuildRequest`: what is compiled for a model may hold more of it.
        """
        ...

    def memory_use(
        self,
        checkpoint: "CheckpointProtocol",
        layout: Layout,
        *,
        context_tokens: int,
        by_app: bool,
    ) -> MemoryUse:
        """Return what the runtime will hold; ``by_app`` if an app calls it, not edgekit."""
        ...

    def convert(
        self,
        checkpoint: "CheckpointProtocol",
        request: BuildRequest,
        directory: Path,
        *,
        progress: Advance,
    ) -> str:
        """Write the artifact into ``directory``, one tensor in memory at a time.

        Args:
            checkpoint: The model.
            request: How it is stored, and what settings that other programs read must say.
            directory: Where the files go, and what other programs want next to them.
            progress: Told how many weights were just read.

        Returns:
            The name of the file that `Running.load` opens, relative to ``directory``.

        Raises:
            UsageError: If a weight cannot be stored as the recipe asks; it is named.
            MissingDependencyError: If what writes the format is not installed.
        """
        ...


class Running(Protocol):
    """What the module ``running`` of a format offers."""

    def is_run_here(self, variant: str | None) -> bool:
        """Tell whether `load` can start what runs this build; else see `ReadableRunning`."""
        ...

    def runtime_state(self) -> str:
        """Start the runtime without a model, and say which it is and what it computes with.

        Raises:
            MissingDependencyError: If it, or what it is built with, is not installed.
        """
        ...

    def load(
        self,
        path: Path,
        *,
        context_tokens: int,
        threads: int | None = None,
        has_exact_cache: bool = False,
    ) -> Session:
        """Open an artifact in its runtime.

        Args:
            path: The file that `Writing.convert` named.
            context_tokens: How many tokens the cache must hold.
            threads: None takes as many as there are performance cores.
            has_exact_cache: Whether attention keeps float32 where the runtime would round: slower,
                to judge the weights by themselves.

        Raises:
            MissingDependencyError: If the runtime is not installed.
            BundleError: If the runtime refuses the file.
            UsageError: If the artifact is for a runtime that no program here can start, or the
                machine cannot run that many threads.
        """
        ...

    def runtime_ids(self, path: Path, texts: Sequence[str]) -> list[list[int]] | None:
        """Return what the runtime's own tokenizer makes of ``texts``, special tokens parsed.

        None if the runtime has no tokenizer of its own, so that edgekit's is always used.
        """
        ...

    def own_template(self, path: Path) -> str | None:
        """Return the chat template inside an artifact, by which its readers write prompts.

        None if there is none inside, so that the checkpoint's is used.
        """
        ...

    def files(self, path: Path) -> list[Path]:
        """Return every file of the artifact that `load` opens with ``path``, that one included.

        Raises:
            BundleError: If one is missing.
        """
        ...

    def contents(self, path: Path) -> list[tuple[str, tuple[int, ...], str]]:
        """Return ``(tensor, shape, tensor type)`` of everything an artifact really holds.

        Raises:
            BundleError: If the file is damaged; the message names the field and the offset.
        """
        ...


class ReadableRunning(Running, Protocol):
    """Of a format with builds that no program here can start (`Running.is_run_here` is false)."""

    def read_back(self, path: Path, spec: "DecoderSpec") -> DecoderWeights:
        """Return the weights as they are in an artifact, for a proof without its runtime.

        Raises:
            BundleError: If the artifact is damaged.
        """
        ...

    def runs_on(self, variant: str | None) -> str:
        """Return what is needed to run this build, with its article."""
        ...


class Browsing(Protocol):
    """What the module ``browsing`` of a format offers, where a browser opens its artifacts."""

    RUNTIME: str  # as people call it
    PACKAGES: tuple[NpmPackage, ...]  # the runtime first
    IMPORTS: Mapping[str, str]  # what JavaScript imports by name, and which file of a package it is
    MODULE: Path  # JavaScript that opens an artifact; see ``browser/page/device.mjs``
    CHAT: Path | None  # JavaScript of a bundle's page; see ``page/app.mjs``. None: it has its own

    # By back-end, in Chromium 156; on WebGPU with an adapter of software, whose memory is counted.
    MEMORY: Mapping[str, BrowserMemory]

    def request(self, path: Path, *, context_tokens: int) -> BrowserRequest:
        """Return what the page is told to open.

        Args:
            path: The file that `Writing.convert` named.
            context_tokens: How many tokens the cache must hold.

        Raises:
            BundleError: If the artifact is damaged.
            UsageError: If no browser can open this one.
        """
        ...


def names() -> list[str]:
    """Return the names of all formats, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Format:
    """Import the face of a format.

    Raises:
        UsageError: If there is no such format.
    """
    if name not in names():
        raise UsageError(f"no format named {name!r}", hint=f"formats: {', '.join(names())}")
    return cast("Format", importlib.import_module(f"{__name__}.{name}"))


def writing(name: str) -> Writing:
    """Import what writes artifacts of a format; the errors are those of `get`."""
    get(name)
    return cast("Writing", importlib.import_module(f"{__name__}.{name}.writing"))


def running(name: str) -> Running:
    """Import what runs artifacts of a format; the errors are those of `get`."""
    get(name)
    return cast("Running", importlib.import_module(f"{__name__}.{name}.running"))


def browsing(name: str) -> Browsing:
    """Import what opens artifacts of a format in a browser.

    Raises:
        UsageError: If there is no such format, or no browser opens it.
    """
    get(name)
    if importlib.util.find_spec(f"{__name__}.{name}.browsing") is None:
        known = [
            each for each in names() if importlib.util.find_spec(f"{__name__}.{each}.browsing")
        ]
        raise UsageError(
            f"no browser opens {name} bundles", hint=f"browsers open {', '.join(known)}"
        )
    return cast("Browsing", importlib.import_module(f"{__name__}.{name}.browsing"))


def of_file(path: Path) -> str | None:
    """Return the format whose artifacts are opened by files of this name."""
    return next((name for name, fmt in get_all() if path.name.endswith(fmt.ENDING)), None)


def get_all() -> Iterator[tuple[str, Format]]:
    """Yield every format with its name."""
    for name in names():
        yield name, get(name)
