import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

import edgekit
from edgekit.bundle.goldens import GOLDENS, ChatGolden, Goldens, LogitGolden, TextGolden
from edgekit.bundle.manifest import MANIFEST, Bundle
from edgekit.encodings.typed_json import FieldReader
from edgekit.errors import BundleError, UsageError
from edgekit.measuring.measurement import Measurement
from edgekit.tests.bundle.test_manifest import make_bundle
from edgekit.tests.tiny.measurements import make_measurement


OTHERS: tuple[object, ...] = (
    None, True, False, 0, 3, -3, 1 << 63, 10**400, 1.5, float("nan"), float("inf"),
    "", "x", "\ud800", [], [1], ["x"], [[]], [None], {}, {"x": 1}, {"x": "y"}, {"\ud800": {}},
)  # fmt: skip
SCHEMA = Path(edgekit.__file__).parent / "schemas" / "measurement.schema.json"


def places(value, path=()):
    """Yield the way to every value of a document, the first two of a list."""
    yield path
    inner = value if isinstance(value, dict) else {}
    if isinstance(value, list):
        inner = dict(enumerate(value[:2]))
    for key, item in inner.items():
        yield from places(item, (*path, key))


def changed(document, path, value):
    if not path:
        return value
    key, *rest = path
    copied = document.copy()
    copied[key] = changed(document[key], rest, value)
    return copied


def changes(document):
    return [
        (path, changed(document, path, other))
        for path in places(document)
        if path
        for other in OTHERS
    ]


def written(path):
    """Write a path as messages do."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def refusals(document, read):
    """Return the refusal of every changed document, None for one that is read."""
    found: list[tuple[tuple[str | int, ...], object, Exception | None]] = []
    for path, other in changes(document):
        try:
            read(other)
            found.append((path, other, None))
        except (BundleError, UsageError) as error:
            found.append((path, other, error))
    return found


def check_words(found, origin):
    """Each message names the document, and the field or, at the least, what holds it."""
    said = [(path, str(error)) for path, _, error in found if error]
    assert len(said) > 0.6 * len(found) > 100
    unnamed = [
        (path, message)
        for path, message in said
        if str(origin) not in message or (", expected" in message and str(path[0]) not in message)
    ]
    assert unnamed == []


def test_a_manifest_with_any_field_of_any_other_type_is_read_or_refused(tmp_path):
    bundle = make_bundle(tmp_path / "out")
    path = bundle.directory / MANIFEST

    def read(document):
        path.write_text(json.dumps(document))
        loaded = Bundle.load(bundle.directory)
        loaded.save()  # whatever is read can be written, and is the same again
        assert Bundle.load(bundle.directory) == loaded

    document = json.loads(path.read_text())
    found = refusals(document, read)
    check_words(found, bundle.directory)
    accepted = {written(path) for path, _, error in found if error is None}
    assert accepted & {"schema_version", "artifact", "model", "text", "agreement.gates[0]"} == set()
    assert "agreement" in accepted  # null: exported without proof


def test_goldens_with_any_field_of_any_other_type_are_read_or_refused(tmp_path):
    goldens = Goldens(
        texts=(TextGolden(text="tide", ids=(1, 2)),),
        chats=(ChatGolden(messages=({"role": "user"},), rendered="x", ids=(7,)),),
        logits=(LogitGolden(ids=(4,), top_ids=((1, 2),), top_log_probabilities=((-0.5, -1.0),)),),
        answer_prompt_ids=(7, 8),
        answer_ids=(3, 1),
    )

    def read(document):
        (tmp_path / GOLDENS).write_text(json.dumps(document))
        loaded = Goldens.load(tmp_path)
        loaded.save(tmp_path)
        assert Goldens.load(tmp_path) == loaded

    check_words(refusals(json.loads(json.dumps(asdict(goldens))), read), tmp_path / GOLDENS)


@pytest.mark.slow
def test_a_measurement_is_read_when_its_schema_allows_it_and_only_then():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    measured = make_measurement(first_token_s=(0.1, 0.1), token_s=(0.1, 0.1))
    document = json.loads(measured.to_json())

    found = refusals(document, lambda other: Measurement.from_json(json.dumps(other)))
    check_words(found, "the measurement")
    # What JSON schemas do not know: NaN, infinity, 64 bits and Unicode.
    unknown = ("NaN", "Infinity", "9223372036854775808", "0" * 400, "ud800")
    differing = [
        (written(path), str(error))
        for path, other, error in found
        for text in [json.dumps(other)]
        if not any(word in text for word in unknown)
        and validator.is_valid(other) != (error is None)
    ]
    assert differing == []


@dataclass(frozen=True)
class Record:
    names: Mapping[str, str] = field(default_factory=dict)
    ratio: float = 0.0
    count: int = 0


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"ratio": "1"}, "card.json: ratio = '1', expected a number"),
        ({"count": 1.0}, "card.json: count = 1.0, expected an integer"),
        ({"count": True}, "card.json: count = True, expected an integer"),
        ({"count": -1}, "card.json: count = -1, expected a 63-bit integer of at least 0"),
        ({"names": {"a": 1}}, "card.json: names.a = 1, expected text"),
        ({"name": {}}, "card.json has an unknown field 'name'"),
        ([], r"card.json = \[\], expected an object"),
    ],
)
def test_a_refusal_says_where_what_was_found_and_what_was_expected(document, words):
    with pytest.raises(UsageError, match=f"^{words}$"):
        FieldReader(origin="card.json").read(Record, document)


def test_defaults_hold_where_a_field_is_absent_and_whole_numbers_are_numbers():
    reader = FieldReader(origin="card.json")
    assert reader.read(Record, {}) == Record()
    assert reader.read(Record, {"ratio": -1}) == Record(ratio=-1.0)
