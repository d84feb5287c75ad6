"""What an artifact really contains, read from its own header and not from what we remember."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit import formats
from edgekit.bundle.manifest import Bundle
from edgekit.bundle.signature import Signature
from edgekit.encodings.files import is_directory, is_file
from edgekit.errors import UsageError
from edgekit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One artifact, and the bundle around it if there is one."""

    path: Path
    format: str
    size_bytes: int
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, tensor type
    bundle: Bundle | None = None
    signature: Signature | None = None  # of the bundle, where it has one

    @property
    def tensors_by_storage(self) -> Mapping[str, int]:
        """How many tensors there are of each tensor type, most frequent first."""
        counts: dict[str, int] = {}
        for _, _, tensor_type in self.tensors:
            counts[tensor_type] = counts.get(tensor_type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def inspect(path: str | Path, *, trusted: str | Path | None = None) -> Inspection:
    """Read a bundle, every hash and its signature included, or a single artifact file.

    Args:
        path: The directory or the file.
        trusted: Public keys, or a list of allowed signers, one of whom must have signed the bundle
            (see `Bundle.load`); None: anybody may have made it.

    Raises:
        BundleError: If it is damaged, or not signed as it must be; the message says where.
        UsageError: If it is neither.
        MissingDependencyError: If ``trusted`` is given, and ssh-keygen is not installed.
    """
    path = Path(path)
    if is_directory(path):
        bundle = Bundle.load(path, trusted=trusted)
        inspection = _artifact(bundle.artifact_path, bundle.artifact.format)
        return replace(inspection, bundle=bundle, signature=bundle.signed_by(trusted=trusted))
    if trusted is not None:
        raise UsageError(f"{path} is not a bundle, and only bundles are signed")
    if not is_file(path):
        raise UsageError(f"{path} does not exist")
    name = formats.of_file(path)
    if name is None:
        raise UsageError(
            f"{path} is not an artifact edgekit knows",
            hint=f"formats: {', '.join(formats.names())}",
        )
    return _artifact(path, name)


def _artifact(path: Path, format: str) -> Inspection:
    running = formats.running(format)
    return Inspection(
        path=path,
        format=format,
        size_bytes=sum(file.stat().st_size for file in running.files(path)),
        tensors=tuple(running.contents(path)),
    )


def lines(inspection: Inspection, *, lists_tensors: bool = False) -> Iterator[str]:
    """Yield what a person wants to know, one fact a line."""
    tensor_types = ", ".join(f"{n} {name}" for name, n in inspection.tensors_by_storage.items())
    yield f"{inspection.path}: {inspection.format}, {format_bytes(inspection.size_bytes)}"
    yield f"tensors: {len(inspection.tensors)} ({tensor_types})"
    if inspection.bundle:
        yield from _bundle_lines(inspection.bundle)
        yield _signature_line(inspection.signature)
    if lists_tensors:
        for name, shape, tensor_type in inspection.tensors:
            yield f"  {name:<40} {'x'.join(map(str, shape)):<16} {tensor_type}"


def _bundle_lines(bundle: Bundle) -> Iterator[str]:
    model = bundle.model
    yield f"model: {model.name} ({model.architecture}), licence {model.licence or 'not stated'}"
    if model.adapter:
        yield f"adapter: {model.adapter}"
    built_for = f", variant {bundle.artifact.variant}" if bundle.artifact.variant else ""
    yield f"target: {bundle.target}, recipe {bundle.artifact.recipe}{built_for}"
    text = bundle.text
    before = f", and before {list(text.stop_strings)}" if text.stop_strings else ""
    yield f"context: {bundle.context_tokens} tokens, stops at {list(text.stop_ids)}{before}"
    if text.template_variables:
        fixed = (f"{name} = {value}" for name, value in text.template_variables.items())
        yield f"chat template: with {', '.join(fixed)}"
    if text.thoughts is not None:
        yield f"thoughts: between {text.thoughts.opens!r} and {text.thoughts.closes!r}"
    yield from (f"substituted: {line}" for line in bundle.artifact.substitutions)
    if bundle.artifact.quant_method:
        yield f"quant method: {bundle.artifact.quant_method}"
    if bundle.artifact.calibration:
        yield f"calibrated on a text with SHA-256 {bundle.artifact.calibration[:16]}…"
    if bundle.agreement is None:
        yield "proof: none; it was exported with --no-verify"
    else:
        yield f"proof: outputs computed by {bundle.agreement.said_by}"
        for gate in bundle.agreement.gates:
            yield f"proof: {'ok  ' if gate.passed else 'FAIL'} {gate.name}: {gate.finding}"
    yield "made with " + ", ".join(f"{name} {version}" for name, version in bundle.tools.items())


def _signature_line(signature: Signature | None) -> str:
    if signature is None:
        return "signature: none; the hashes are a checksum only"
    if signature.key is None:
        return "signature: not read, since ssh-keygen is not installed"
    if not signature.is_trusted:
        return f"signature: good, by the key {signature.key}; --trusted FILE checks whose that is"
    of = f" of {signature.signer}" if signature.signer else ""
    return f"signature: good, by the trusted key {signature.key}{of}"
