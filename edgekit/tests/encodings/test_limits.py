"""What a stranger's file may cost: one too large is not read, and one that is read stays small."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgekit import target
from edgekit.encodings import limits
from edgekit.encodings.json_files import parse, read_object
from edgekit.errors import BundleError, EdgekitError, UsageError
from edgekit.model import chat_templates
from edgekit.runtime.child import environment
from edgekit.source.checkpoint import read_safetensors
from edgekit.text.tokenizer import open_tokenizer


def read_target(path):
    return target.load(str(path))


def read_calibration(path):
    pytest.importorskip("numpy")
    from edgekit.proof.calibration import read_own_text

    return read_own_text(path)


READERS = {
    "config.json": (limits.SETTINGS_BYTES, read_object),
    "manifest.json": (limits.SETTINGS_BYTES, read_object),
    "vocab.json": (limits.TOKENIZER_BYTES, read_object),
    "tokenizer.json": (limits.TOKENIZER_BYTES, open_tokenizer),
    "my-board.toml": (limits.TARGET_BYTES, read_target),
    "chat_template.jinja": (limits.TEMPLATE_BYTES, chat_templates.of_file),
    "text.txt": (limits.CALIBRATION_BYTES, read_calibration),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_larger_than_any_of_its_kind_is_not_read(name, tmp_path):
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers")
    most_bytes, read = READERS[name]
    path = tmp_path / name
    path.touch()
    os.truncate(path, most_bytes + 1)  # takes no place on the disk
    with pytest.raises((UsageError, BundleError)) as refusal:
        read(path)
    assert str(path) in str(refusal.value)
    assert f"has {most_bytes + 1} bytes, expected at most {most_bytes}" in str(refusal.value)


def test_a_header_larger_than_any_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    length = limits.HEADER_BYTES + 1
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, length + 8)
    with pytest.raises(UsageError, match=f"{length} bytes, expected at most {length - 1}"):
        list(read_safetensors(path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" + "[]," * 2**21 + "0]", "takes more than 192 MiB of memory"),
        ('{"a": "' + "," * 2**22 + '"}', "takes more than 192 MiB of memory"),
        ('{"a": -' + "1" * 5000 + "}", "5000 digits"),
        ("[" * 201 + "]" * 201, "nested too deeply"),
        ("[" * 50_000 + "]" * 50_000, "nested too deeply"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        (r'{"a": "\ud800"}', "half a surrogate pair"),
        (r'{"\uDFFF": 1}', "half a surrogate pair"),
        (r'["\ude80\ud83d"]', "half a surrogate pair"),
    ],
)
def test_json_that_costs_more_than_it_looks_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse(text)


def test_what_programs_write_is_within_the_limits():
    no_limit = 1000000000000000019884624838656  # int(1e30), as transformers writes it
    text = json.dumps({"model_max_length": no_limit, "emoji": "🚀", "a": [1.5e300, -(2**63)]})
    assert parse(text) == json.loads(text)  # the emoji is a whole pair, escaped
    assert r"\ud83d\ude80" in text
    nested = '{"a": [' * 100 + "1" + "]}" * 100
    assert parse(nested) == json.loads(nested)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "9" * 5000, "is not TOML"),
        ("a = " + "[" * 2000 + "]" * 2000, "nested too deeply"),
        ("a." * 3000 + "a = 1", "my-board.toml"),
        ("[" + "a." * 3000 + "a]", "my-board.toml"),
        ("a = {" + "a = {" * 2000, "my-board.toml"),
    ],
    ids=["digits", "brackets", "dotted key", "dotted table", "inline tables"],
)
def test_hostile_toml_is_refused_by_its_name(text, reason, tmp_path):
    path = tmp_path / "my-board.toml"
    path.write_text(text)
    with pytest.raises(EdgekitError, match=reason) as refusal:
        target.load(str(path))
    assert len(str(refusal.value)) < 1000


# Memory

DENSE = {  # what Python takes the most memory for, a byte
    "lists": lambda: "[" + ",".join(["[]"] * 1_390_000) + "]",
    "objects": lambda: "[" + ",".join(['{"":0}'] * 400_000) + "]",
    "keys": lambda: "{" + ",".join(f'"{i}":0' for i in range(770_000)) + "}",
    "texts": lambda: "[" + ",".join(f'"{i % 10}é"' for i in range(1_390_000)) + "]",
    "numbers": lambda: "[" + ",".join(["1.5"] * 2_090_000) + "]",
    "integers": lambda: "[" + ",".join(["999"] * 2_090_000) + "]",
    "letters beyond": lambda: '["' + "😀" * 2_000_000 + '"]',
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("kind", DENSE)
def test_no_json_that_is_read_takes_more_than_a_refusal_may(kind, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(DENSE[kind](), encoding="utf-8")
    assert path.stat().st_size <= limits.SETTINGS_BYTES
    code = """\
        import re, sys
        from pathlib import Path
        from edgekit.encodings.json_files import read_object
        try:
            read_object(Path(sys.argv[1]))
        except Exception as error:
            assert "holds a list" in str(error), error  # so it was parsed
        status = Path("/proc/self/status").read_text()  # ru_maxrss begins with the parent's
        print(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        capture_output=True, text=True, check=True, env=environment(), timeout=60,
    )  # fmt: skip
    assert int(done.stdout) < 256 * 1024


# The page


@pytest.mark.parametrize(
    ("row", "stated"),
    [
        (
            "settings",
            [f"{limits.SETTINGS_BYTES >> 20} MiB,", f"{limits.SETTINGS_MEMORY_BYTES >> 20} MiB of"],
        ),
        (
            "tokenizer",
            [
                f"{limits.TOKENIZER_BYTES >> 20} MiB,",
                f"{limits.VOCABULARY_MEMORY_BYTES >> 20} MiB of",
            ],
        ),
        ("header", [f"{limits.HEADER_BYTES >> 20} MiB", f"{limits.TENSORS:,} tensors"]),
        (
            "chat template",
            [
                f"{limits.TEMPLATE_BYTES >> 10} KiB", f"{limits.TEMPLATE_CPU_S} s",
                f"{limits.CHILD_MEMORY_BYTES >> 20} MiB", f"{limits.TEMPLATE_CHARACTERS:,} char",
            ],
        ),
        (
            "trial",
            [
                f"{limits.TOKENIZER_CPU_S} s", f"{limits.CHILD_MEMORY_BYTES >> 20} MiB",
                f"{limits.TEXT_GROWTH} times",
            ],
        ),
        ("target", [f"{limits.TARGET_BYTES >> 10} KiB"]),
        ("text to calibrate", [f"{limits.CALIBRATION_BYTES >> 20} MiB"]),
    ],
)  # fmt: skip
def test_the_page_on_security_states_the_limits_that_hold(row, stated):
    page = Path(__file__).parents[3] / "SECURITY.md"
    if not page.is_file():
        pytest.skip("the pages are not installed")
    rows = page.read_text(encoding="utf-8").splitlines()
    [line] = [line for line in rows if line.startswith(f"| {row}")]
    assert [number for number in stated if number not in line] == []
