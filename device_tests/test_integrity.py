"""The bundle is the one that was exported, proven, and refused where a byte of it is not."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.bundle.manifest import MANIFEST, SCHEMA_VERSION, Bundle
from edgekit.errors import BundleError
from edgekit.measuring.devices import Device, ThisMachine
from edgekit.run import Runner


def test_every_file_is_the_one_that_was_exported(bundle_directory: Path, device: Device):
    Bundle.load(bundle_directory)
    place = device.push(bundle_directory)
    checked = device.run_module("edgekit.measuring.measure", [place, "--check"])
    said = checked.output.strip() or checked.log
    assert checked.status == 0, f"status {checked.status}, expected 0, on {device.label}: {said}"


def test_it_was_proven_to_say_what_its_checkpoint_says(bundle: Bundle):
    assert bundle.agreement is not None, (
        "exported with --no-verify; expected a proof: export it again without"
    )
    failed = [f"{gate.name}: {gate.finding}" for gate in bundle.agreement.gates if not gate.passed]
    assert not failed, f"gates that do not hold: {failed}, expected none"


@pytest.fixture
def copy(on_this_machine: None, bundle: Bundle, tmp_path: Path) -> Iterator[Path]:  # noqa: ARG001 - it may skip
    """A copy to damage; its files are hard links where that is possible, see `_detach`."""
    directory = tmp_path / "copy"
    for name in (*bundle.artifact.files, MANIFEST):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        _link(bundle.directory / name, directory / name)
    yield directory
    shutil.rmtree(directory)  # pytest keeps temporary directories, and models are large


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source.resolve(), copy)
    except OSError:  # another file system, or another owner's file
        _copy(source, copy)


def _copy(source: Path, copy: Path) -> None:
    needed, free = source.stat().st_size, shutil.disk_usage(copy.parent).free
    if free < needed:
        pytest.skip(
            f"{copy.parent} has {free} free bytes, a copy of {source.name} needs {needed}: "
            f"pass --basetemp=DIR"
        )
    shutil.copyfile(source, copy)


def _detach(path: Path) -> None:
    """Give the file bytes of its own: those of a hard link are the bundle's."""
    own = path.with_name(f"{path.name}.own")
    _copy(path, own)
    own.replace(path)


def _flip_a_bit(path: Path) -> None:
    _detach(path)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _refusal(directory: Path, *, damage: str) -> str:
    """Return why a damaged copy is refused, or fail since it is not."""
    try:
        Runner.open(directory, threads=1).close()
    except BundleError as error:
        refusal = error
    else:
        pytest.fail(f"opened in spite of {damage}; expected a refusal with exit status 6")
    assert refusal.exit_status == 6, f"exit status {refusal.exit_status}, expected 6"
    return str(refusal)


def _assert_names(refusal: str, expected: str) -> None:
    assert expected in refusal, f"the refusal says {refusal!r}, expected it to name {expected!r}"


def test_an_unharmed_copy_opens(copy: Path, bundle: Bundle):
    found = Bundle.load(copy).artifact
    assert found == bundle.artifact, f"the copy holds {found}, expected {bundle.artifact}"


def test_a_copy_with_one_bit_flipped_is_refused(copy: Path, bundle: Bundle):
    for name in bundle.artifact.files:
        _flip_a_bit(copy / name)
        _assert_names(_refusal(copy, damage=f"a flipped bit in {name}"), name)
        (copy / name).unlink()
        _link(bundle.directory / name, copy / name)


def test_a_truncated_copy_is_refused(copy: Path, bundle: Bundle):
    entry = copy / bundle.artifact.entry
    with entry.open("rb") as file:
        head = file.read(min(1 << 20, entry.stat().st_size // 2))
    _replace(entry, head)
    _assert_names(_refusal(copy, damage="a truncated artifact"), f"{len(head)} bytes")


def test_a_copy_without_one_of_its_files_is_refused(copy: Path, bundle: Bundle):
    for name in bundle.artifact.files:
        (copy / name).unlink()
        _assert_names(_refusal(copy, damage=f"the lack of {name}"), name)
        _link(bundle.directory / name, copy / name)


def test_a_copy_without_its_manifest_is_refused(copy: Path):
    (copy / MANIFEST).unlink()
    _assert_names(_refusal(copy, damage=f"the lack of {MANIFEST}"), MANIFEST)


def test_a_copy_with_half_a_manifest_is_refused(copy: Path):
    content = (copy / MANIFEST).read_bytes()
    _replace(copy / MANIFEST, content[: len(content) // 2])
    _assert_names(_refusal(copy, damage="half a manifest"), MANIFEST)


def test_a_copy_of_another_schema_is_refused(copy: Path):
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["schema_version"] = SCHEMA_VERSION + 1
    _replace(copy / MANIFEST, json.dumps(manifest).encode())
    _assert_names(_refusal(copy, damage="another schema"), f"schema {SCHEMA_VERSION + 1}")


def test_a_copy_with_a_stray_file_is_refused(copy: Path):
    (copy / "stray.bin").write_bytes(b"?")
    _assert_names(_refusal(copy, damage="a stray file"), "stray.bin")


def test_a_process_that_is_given_a_damaged_copy_ends_with_status_6(copy: Path, bundle: Bundle):
    smallest = min(bundle.artifact.files, key=lambda name: bundle.artifact.files[name].size_bytes)
    _flip_a_bit(copy / smallest)
    checked = ThisMachine().run_module("edgekit.measuring.measure", [str(copy), "--check"])
    said = checked.output.strip() or checked.log
    assert checked.status == 6, f"status {checked.status}, expected 6: {said}"
    _assert_names(checked.output, smallest)
