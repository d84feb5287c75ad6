"""Damaged programs, and programs for other runtimes: each is refused in a sentence."""

import json
import random
import struct
from collections import Counter
from contextlib import suppress

import pytest

from edgekit.bundle.manifest import Artifact, Bundle, ModelRecord
from edgekit.encodings.flatbuffer import Table
from edgekit.errors import BundleError, ToolchainError, UsageError
from edgekit.formats.executorch import program, running, shim_build
from edgekit.formats.executorch.runtime import ExecutorchSession
from edgekit.model.tokenizer_files import TokenizerFiles
from edgekit.proof import load_probe
from edgekit.run import Runner
from edgekit.tests.needs import needs
from edgekit.tests.tiny.executorch_artifacts import python, tiny
from edgekit.text.tokenizer import Text


# torch makes the programs that run without it here.
pytestmark = [pytest.mark.toolchain, needs("torch", "tokenizers")]
np = pytest.importorskip("numpy")
if shim_build.installed_version() is None:
    pytest.skip("pip install 'edgekit[executorch]'", allow_module_level=True)
if shim_build.compiler() is None:
    pytest.skip(shim_build.INSTALL_COMPILER, allow_module_level=True)

HEADER_BYTES = 40
FLIPS = 300


@pytest.fixture(scope="module")
def content():
    return (tiny() / "model.pte").read_bytes()


@pytest.fixture(scope="module")
def head_bytes(content):
    """How long the program is, without weights."""
    (size,) = struct.unpack("<Q", content[16:24])
    assert HEADER_BYTES < size < len(content)
    return size


def open_(path, content):
    path.write_bytes(content)
    session = ExecutorchSession(path, context_tokens=8, threads=1)
    said = session.prefill([1, 2, 3]).copy()
    session.close()
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory, content):
    said = open_(tmp_path_factory.mktemp("whole") / "model.pte", content)
    assert said.std() > 0.01
    return said


def test_a_program_is_cut_off_wherever_it_ends(tmp_path, content, head_bytes):
    ends = [0, 3, 8, 39, 40, 41, head_bytes - 1, head_bytes, head_bytes + 1, len(content) - 1]
    for end in [*ends, *random.Random(7).sample(range(len(content)), 40)]:
        with pytest.raises(BundleError, match=r"cut off|ends before its header"):
            open_(tmp_path / "model.pte", content[:end])


def test_what_is_no_program_is_said_to_be_none(tmp_path):
    with pytest.raises(BundleError, match=r"not a \.pte file"):
        open_(tmp_path / "model.pte", b"GGUF" + bytes(100))
    with pytest.raises(BundleError, match="is missing"):
        program.read(tmp_path / "absent.pte")


def test_a_program_of_another_release_is_told_apart(tmp_path, content):
    with pytest.raises(BundleError, match="another release: it says b'ET13'") as refusal:
        open_(tmp_path / "model.pte", content[:4] + b"ET13" + content[8:])
    assert "export again" in refusal.value.hint


@pytest.mark.parametrize("byte", range(HEADER_BYTES))
def test_a_changed_header_is_refused_or_does_not_matter(byte, tmp_path, content, said):
    for bit in range(8):
        changed = bytearray(content)
        changed[byte] ^= 1 << bit
        with suppress(BundleError):
            np.testing.assert_array_equal(open_(tmp_path / "model.pte", changed), said)


def test_what_follows_a_program_is_refused(tmp_path, content):
    with pytest.raises(BundleError, match="is longer than it says"):
        open_(tmp_path / "model.pte", content + b"\0")


@pytest.mark.parametrize(
    ("is_of_method", "field"),
    [(False, 1), (False, 4), (False, 7), (True, 7)],
    ids=["methods", "segments", "weights by name", "delegates"],
)
def test_an_empty_list_is_refused(tmp_path, content, is_of_method, field):
    root = Table.root(content)
    table = next(root.tables(1)) if is_of_method else root
    first, count = table._vector(field, size=4)
    assert count
    path = tmp_path / "model.pte"
    path.write_bytes(content[: first - 4] + bytes(4) + content[first:])
    with pytest.raises(BundleError, match=r"model\.pte"):
        running.contents(path)


def test_an_operator_the_runtime_lacks_is_named(tmp_path, content):
    assert b"aten::index_put" in content
    with pytest.raises(BundleError, match=r"calls aten::index_qut\S+, which ExecuTorch"):
        open_(tmp_path / "model.pte", content.replace(b"aten::index_put", b"aten::index_qut"))


def test_a_back_end_this_machine_lacks_is_named(tmp_path, content):
    assert b"XnnpackBackend" in content
    with pytest.raises(UsageError, match="is for CoreMLBackendX, which this machine has not"):
        open_(tmp_path / "model.pte", content.replace(b"XnnpackBackend", b"CoreMLBackendX"))


def test_a_changed_weight_is_found_by_the_manifest(tmp_path, content, head_bytes):
    directory = tmp_path / "bundle"
    directory.mkdir()
    rules = TokenizerFiles.open(tiny(), config={"eos_token_id": 2}).copy_into(directory)
    (directory / "model.pte").write_bytes(content)
    bundle = Bundle(
        directory=directory,
        model=ModelRecord(name="t", sha256="0" * 64, architecture="llama", parameters=0),
        target="any",
        context_tokens=8,
        text=rules,
        artifact=Artifact.of_directory(directory, "model.pte", format="executorch", recipe="F32"),
        agreement=None,
        predicted={},
        tools={},
    )
    bundle.save()
    runner = Runner.open(directory, threads=1)
    assert isinstance(runner.text, Text)
    runner.close()
    changed = bytearray(content)
    changed[(head_bytes + len(content)) // 2] ^= 1
    (directory / "model.pte").write_bytes(changed)
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        Runner.open(directory, threads=1)


MUTATE = """
import json, os, random, signal, sys
from pathlib import Path
from edgekit.errors import BundleError, ToolchainError, UsageError
from edgekit.formats.executorch.runtime import ExecutorchSession

content, flips, kept = Path(sys.argv[1]).read_bytes(), int(sys.argv[2]), Path(sys.argv[3])
head_bytes = int.from_bytes(content[16:24], "little")
ExecutorchSession(Path(sys.argv[1]), context_tokens=8, threads=1).close()  # compiled, one thread


def try_out(path):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    signal.alarm(20)
    try:
        session = ExecutorchSession(path, context_tokens=8, threads=1)
        session.prefill([1, 2, 3])
        session.decode(4)
        os._exit(0)
    except (BundleError, UsageError, ToolchainError) as error:
        os._exit(10 + [BundleError, UsageError, ToolchainError].index(type(error)))
    finally:
        os._exit(99)  # a traceback


random_, outcomes = random.Random(11), []
for index in range(flips):
    changed = bytearray(content)
    for _ in range(random_.choice((1, 1, 1, 4))):
        changed[random_.randrange(4, head_bytes)] ^= 1 << random_.randrange(8)
    path = kept / f"{index}.pte"
    path.write_bytes(changed)
    child = os.fork()
    if child == 0:
        try_out(path)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    outcomes.append(status)
    if status >= 0:
        path.unlink()
print(json.dumps(outcomes))
"""


def test_a_bent_program_is_refused_or_its_death_is_noticed(tmp_path, content):
    """The runtime itself aborts over a few; a parent that probes says so."""
    source = tiny() / "model.pte"
    outcomes = Counter(json.loads(python(MUTATE, source, FLIPS, tmp_path)))
    assert sum(outcomes.values()) == FLIPS
    assert outcomes[99] == 0, "a traceback"
    assert outcomes[10] > FLIPS / 2  # BundleError
    died = sorted(tmp_path.glob("*.pte"))
    assert len(died) == sum(count for status, count in outcomes.items() if status < 0)
    assert len(died) < FLIPS / 20
    for path in died[:2]:
        with pytest.raises(ToolchainError, match=r"ExecuTorch (\w.+|failed); it was given"):
            load_probe.probe("executorch", path, context_tokens=8)
