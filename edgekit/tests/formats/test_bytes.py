"""The bytes of artifacts stay what they were, whatever becomes of the code that writes them.

The hashes are those of edgekit e1e7a3c, before its modules were moved. Whoever changes what is
written on purpose says so in CHANGELOG.md, and writes them again: the failing test prints them.
"""

import hashlib
import json
from pathlib import Path

import pytest

from edgekit import formats, versions
from edgekit.doctor import _tiny_checkpoint
from edgekit.formats import BuildRequest
from edgekit.tests.formats.test_formats import needs_runtime


pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

EXPECTED = json.loads((Path(__file__).parent / "data" / "artifact_sha256.json").read_text())


def test_every_format_is_held_to_its_bytes():
    assert {case.partition(" ")[0] for case in EXPECTED} == set(formats.names())


@pytest.mark.parametrize("case", EXPECTED)
def test_an_artifact_has_the_bytes_it_had(case, tmp_path, monkeypatch):
    name, recipe, *variant = case.split(" ")
    needs_runtime(name)
    if name == "executorch":
        pytest.importorskip("torch")
    monkeypatch.setattr(versions, "EDGEKIT", "0.1.0")  # GGUF files name who wrote them
    (tmp_path / "text").mkdir()
    (tmp_path / "artifact").mkdir()
    request = BuildRequest(
        recipe=formats.get(name).RECIPES[recipe],
        context_tokens=32,
        variant=next(iter(variant), None),
    )
    entry = formats.writing(name).convert(
        _tiny_checkpoint(tmp_path / "text"), request, tmp_path / "artifact", progress=lambda _: None
    )
    written = formats.running(name).files(tmp_path / "artifact" / entry)
    assert {
        str(path.relative_to(tmp_path / "artifact")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in written
    } == EXPECTED[case]
