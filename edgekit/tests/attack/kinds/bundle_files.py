"""What a bundle says about itself, and what a device said about it."""

import json
from pathlib import Path

from edgekit.bundle.goldens import ChatGolden, Goldens, LogitGolden, TextGolden
from edgekit.bundle.manifest import MANIFEST, Bundle
from edgekit.encodings.hashing import sha256_of
from edgekit.inspect import inspect, lines
from edgekit.measuring import measure
from edgekit.measuring.report import as_html, as_json, as_junit, as_text
from edgekit.tests.attack import samples
from edgekit.tests.attack.attack import OTHER_PROGRAMS_S, DamagedFiles
from edgekit.tests.tiny.measurements import make_measurement
from edgekit.text.tokenizer import Text
from edgekit.validate import judge_document


class Manifests(DamagedFiles):
    """manifest.json"""

    damaged = MANIFEST
    share = 6.0

    def prepare(self) -> None:
        samples.bundle(self.whole / "bundle")

    def read(self, directory: Path) -> object:
        return list(lines(inspect(directory), lists_tensors=True))


class RehashedFiles(DamagedFiles):
    """template and tokenizer of a bundle, hashes made to match"""

    share = 1.0
    limit_s = OTHER_PROGRAMS_S
    damaged = "[ct]*"

    def prepare(self) -> None:
        samples.bundle(self.whole / "bundle")

    def read(self, directory: Path) -> object:
        rehash(directory)
        bundle = Bundle.load(directory)
        return Text.open(directory, bundle.text)


class GoldenFiles(DamagedFiles):
    """goldens.json"""

    damaged = "goldens.json"

    def prepare(self) -> None:
        directory = self.whole / "bundle"
        directory.mkdir(parents=True)
        logits = LogitGolden(ids=(1, 2), top_ids=((1, 2), (3, 4)),
                             top_log_probabilities=((-0.5, -1.0), (-0.1, -3.0)))  # fmt: skip
        chat = ChatGolden(messages=({"role": "user", "content": "hi"},), rendered="hi", ids=(1,))
        Goldens(
            texts=(TextGolden(text="hello", ids=(1, 2)),), chats=(chat,), logits=(logits,),
            answer_prompt_ids=(1,), answer_ids=(2, 3),
        ).save(directory)  # fmt: skip

    def read(self, directory: Path) -> object:
        return Goldens.load(directory)


class Measurements(DamagedFiles):
    """measurements"""

    damaged = "measurement.json"
    share = 2.0

    def prepare(self) -> None:
        bundle = Bundle.load(samples.bundle(self.place / "bundle"))
        directory = self.whole / "device"
        directory.mkdir(parents=True)
        made = make_measurement(artifact_sha256=measure.artifact_sha256(bundle.artifact))
        (directory / "measurement.json").write_text(made.to_json())

    def read(self, directory: Path) -> object:
        document = directory / "measurement.json"
        result = judge_document(self.place / "bundle", samples.TARGET, document)
        return as_text(result), as_json(result), as_html(result), as_junit(result)


def rehash(directory: Path) -> None:
    """Let a manifest say the sizes and hashes of the files that there are."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name, record in manifest["artifact"]["files"].items():
        if not (directory / name).is_file():
            continue
        path = directory / name
        record |= {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (directory / MANIFEST).write_text(json.dumps(manifest))
