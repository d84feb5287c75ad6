import copy
import dataclasses
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from edgekit import formats, target
from edgekit.errors import UsageError


SHIPPED = Path(__file__).parents[2] / "targets"
PROMISED = {
    "android-high", "android-low-4gb", "android-mid-8gb",
    "ipad-m-16gb", "ipad-m-8gb", "iphone-4gb", "iphone-6gb", "iphone-8gb",
    "jetson-orin-nano-8gb",
    "raspberry-pi-4-2gb", "raspberry-pi-4-4gb", "raspberry-pi-4-8gb",
    "raspberry-pi-5-16gb", "raspberry-pi-5-2gb", "raspberry-pi-5-4gb", "raspberry-pi-5-8gb",
    "raspberry-pi-zero-2w",
    "dimensity-8400", "snapdragon-8-elite-gen-5", "snapdragon-8-gen-2",
    "webgpu-android", "webgpu-desktop-discrete", "webgpu-desktop-integrated", "webgpu-ios",
}  # fmt: skip
PI5 = SHIPPED / "raspberry-pi-5-8gb.toml"
ORIGIN = 'basis = "policy", source = "edgekit policy", date = "2026-11-23"'
each_target = pytest.mark.parametrize("name", sorted(PROMISED))


@pytest.fixture(autouse=True)
def _only_shipped_targets(monkeypatch):
    monkeypatch.delenv(target.DIRECTORY_VARIABLE, raising=False)


@pytest.fixture
def edited(tmp_path):
    """Return a function that writes a shipped file with one text replaced, and gives its path."""

    def edit(old, new):
        text = PI5.read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        path = tmp_path / "board.toml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return path

    return edit


def line_of(key):
    """Return the line of the shipped file that sets ``key``."""
    found = re.search(rf"^{key} = .*$", PI5.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found
    return found[0]


def refusal(path):
    with pytest.raises(UsageError) as caught:
        target.load(str(path))
    assert str(path) in str(caught.value)
    return caught.value


def test_every_promised_target_is_shipped():
    assert set(target.names()) == PROMISED


def test_every_title_is_listed_and_differs():
    titles = target.titles()
    assert set(titles) == PROMISED
    assert len(set(titles.values())) == len(PROMISED)
    assert titles["raspberry-pi-5-8gb"] == "Raspberry Pi 5, 8 GB"


@each_target
def test_a_shipped_target_loads_under_its_own_name(name):
    found = target.load(name)
    assert found.name == name
    assert found.formats
    assert set(found.formats) <= set(target.FORMATS)


@each_target
def test_every_number_of_a_shipped_target_has_an_origin(name):
    found = target.load(name)
    numbers = {"cpu_features"} | {
        field.name
        for part in (found, found.budget, found.webgpu)
        if part is not None
        for field in dataclasses.fields(part)
        if isinstance(getattr(part, field.name), int | float)
    } - {"by_app"}
    numbers |= {f"first_token[{limit.prompt_tokens}]" for limit in found.budget.first_token}
    assert set(found.origins) == numbers


@each_target
def test_a_shipped_origin_is_an_address_or_a_policy_and_explains_what_was_not_measured(name):
    origins = target.load(name).origins
    assert {"context_tokens", "memory_bytes"} < origins.keys()
    for field, origin in origins.items():
        assert origin.source.startswith(("https://", "edgekit policy")), field
        assert origin.basis in {"policy", "extrapolated"} or origin.source.startswith("https://")
        assert origin.note or origin.basis != "extrapolated", field


@each_target
def test_a_small_model_can_meet_the_budget_of_a_shipped_target(name):
    """SmolLM2-135M in 4 bits: 106e6 parameters work on a prompt, 92 MiB are read per token."""
    found = target.load(name)
    for limit in found.budget.first_token:
        assert 2 * 106e6 * limit.prompt_tokens / found.prefill_flop_per_s < limit.limit_s
    assert found.decode_bandwidth_bytes_per_s / (92 * 2**20) > found.budget.decode_tokens_per_s
    assert found.budget.artifact_bytes > 92 * 2**20


@pytest.fixture(scope="module")
def schema():
    """What checks a document against the schema, which is itself a sound one."""
    found = target.json_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@each_target
def test_a_shipped_target_matches_the_schema_that_editors_use(name, schema):
    schema.validate(tomllib.loads((SHIPPED / f"{name}.toml").read_text("utf-8")))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("hardware", "memory", "value"), "8"),
        (("hardware", "memory", "value"), "8 s"),
        (("hardware", "memory", "basis"), "hearsay"),
        (("hardware", "memory", "date"), "yesterday"),
        (("hardware", "memory", "colour"), "red"),
        (("hardware", "memory"), "8 GiB"),
        (("budget", "first_token"), []),
        (("formats",), ["tflite"]),
        (("colour",), "red"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(place, value, schema, tmp_path):
    document = tomllib.loads(PI5.read_text(encoding="utf-8"))
    broken = copy.deepcopy(document)
    at = broken
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    assert not schema.is_valid(broken)
    with pytest.raises(UsageError, match=re.escape(place[-1] if value != [] else "first_token")):
        target.Target._from_table(
            "board",
            target._Table(
                tmp_path / "board.toml",
                "",
                broken,
                known=("title", "aliases", "formats", "variants", *target._TABLES),
            ),
        )


def test_the_numbers_of_a_file_arrive_in_base_units():
    found = target.load("raspberry-pi-5-8gb")
    assert found.memory_bytes == 8 * 2**30
    assert found.memory_bandwidth_bytes_per_s == 17.1e9
    assert found.max_spread == 0.05
    assert found.budget.artifact_bytes == 2_800_000_000
    assert [(at.prompt_tokens, at.limit_s) for at in found.budget.first_token] == [
        (128, 5),
        (512, 18),
    ]
    assert found.webgpu is None
    assert found.origins["memory_bytes"].basis == "documented"


def test_only_browsers_have_webgpu_limits():
    for name in PROMISED:
        assert (target.load(name).webgpu is not None) == name.startswith("webgpu-")
    limits = target.load("webgpu-android").webgpu
    assert limits == target.WebGpuLimits(
        max_buffer_bytes=2**28, max_binding_bytes=2**27, has_shader_f16=False
    )


def test_an_app_calls_the_runtimes_of_phones_and_tablets():
    by_app = {name for name in PROMISED if target.load(name).by_app}
    assert by_app == {
        name for name in PROMISED
        if name.startswith(("android-", "iphone-", "ipad-", "snapdragon-", "dimensity-"))
    }  # fmt: skip


def test_a_runner_nobody_knows_is_refused(edited):
    found = refusal(edited('formats = ["gguf"', 'runner = "apps"\nformats = ["gguf"'))
    assert "runner has the unknown value 'apps'" in str(found)


def test_a_target_can_be_a_key_of_a_dictionary():
    assert {target.load("iphone-6gb"): 1}[target.load("iphone-6gb")] == 1


def test_a_misspelt_target_gets_a_suggestion():
    with pytest.raises(UsageError, match="no target named 'raspbery-pi5-8gb'") as caught:
        target.load("raspbery-pi5-8gb")
    assert "did you mean raspberry-pi-5-8gb" in caught.value.hint


def test_a_name_unlike_any_says_how_to_list_them_in_one_line():
    with pytest.raises(UsageError) as caught:
        target.load("zzz")
    assert caught.value.hint.startswith("`edgekit targets` lists all")
    assert len(caught.value.hint) < 100


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("pi-4", ["raspberry-pi-4-2gb", "raspberry-pi-4-4gb", "raspberry-pi-4-8gb"]),
        ("iPad", ["ipad-m-16gb", "ipad-m-8gb"]),
        ("rasberry-pi-5-8gb", ["raspberry-pi-5-8gb"]),
    ],
)
def test_a_part_of_a_name_suggests_the_names_it_stands_in(name, meant):
    with pytest.raises(UsageError) as caught:
        target.load(name)
    assert f"did you mean {', '.join(meant)}" in caught.value.hint
    assert "`edgekit targets` lists all" in caught.value.hint


@each_target
def test_every_number_is_told_for_people_under_the_name_it_has_in_the_file(name):
    document = tomllib.loads((SHIPPED / f"{name}.toml").read_text("utf-8"))
    told = {quantity.key: quantity for quantity in target.quantities(target.load(name))}
    assert len(told) >= 15
    for key, quantity in told.items():
        table, entry = key.split(", ")[0].split(".")
        assert entry in document[table]
        assert not re.search(r"\d{5}", quantity.value), quantity
        assert quantity.origin.source


def test_a_number_is_told_with_its_unit():
    told = {q.key: q.value for q in target.quantities(target.load("raspberry-pi-5-8gb"))}
    assert told["hardware.memory"] == "8 GiB"
    assert told["hardware.memory_bandwidth"] == "17.1 GB/s"
    assert told["hardware.decode_threads"] == "4 threads"
    assert told["measurement.max_spread"] == "5 %"
    assert told["budget.first_token, 128 tokens"] == "5 s"
    assert told["budget.context"] == "4096 tokens"
    assert {q.key: q.value for q in target.quantities(target.load("webgpu-ios"))}[
        "webgpu.shader_f16"
    ] == "no"


def test_what_takes_a_target_takes_it_loaded_too():
    known = target.load(PI5)
    assert target.load(known) is known
    assert target.load(str(PI5)) == known


def test_a_target_file_of_ones_own_is_read_by_its_path(edited):
    path = edited("Raspberry Pi 5, 8 GB", "My board")
    found = target.load(str(path))
    assert (found.name, found.title) == ("board", "My board")


def test_a_file_in_the_folder_of_ones_own_is_enough_to_be_listed_and_loaded(
    tmp_path, edited, monkeypatch
):
    edited("Raspberry Pi 5, 8 GB", "My board")
    monkeypatch.setenv(target.DIRECTORY_VARIABLE, str(tmp_path))
    assert set(target.names()) == PROMISED | {"board"}
    assert target.titles()["board"] == "My board"
    assert target.load("board").title == "My board"


def test_a_file_of_ones_own_hides_the_shipped_one_of_that_name(tmp_path, edited, monkeypatch):
    edited("Raspberry Pi 5, 8 GB", "My board").rename(tmp_path / PI5.name)
    monkeypatch.setenv(target.DIRECTORY_VARIABLE, str(tmp_path))
    assert target.load(PI5.stem).title == "My board"
    assert set(target.names()) == PROMISED


def test_a_folder_that_does_not_exist_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv(target.DIRECTORY_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"EDGEKIT_TARGETS = .*nowhere' is not a directory"):
        target.names()


def test_a_missing_file_is_said_so(tmp_path):
    assert "there is no target file" in str(refusal(tmp_path / "none.toml"))


def test_a_directory_or_bytes_in_place_of_a_file_are_refused(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    assert "is a directory" in str(refusal(tmp_path / "folder.toml"))
    (tmp_path / "bytes.toml").write_bytes(b'title = "\xff"')
    assert "not UTF-8 text: byte 9" in str(refusal(tmp_path / "bytes.toml"))


def test_a_syntax_error_names_its_line(edited):
    assert re.search(r"is not TOML: .*line 1\b", str(refusal(edited("title = ", "title "))))


def test_an_unknown_key_is_refused_with_a_suggestion(edited):
    error = refusal(edited("\nusable_memory = ", "\nusable_memry = "))
    assert "unknown key 'hardware.usable_memry'" in str(error)
    assert "did you mean usable_memory" in error.hint


def test_an_unknown_table_is_refused(edited):
    assert "unknown key 'hardwear'" in str(refusal(edited("[hardware]", "[hardwear]")))


@pytest.mark.parametrize("table", ["cpu", "hardware", "measurement", "budget"])
def test_a_missing_table_is_named(table, tmp_path):
    document = re.sub(rf"(?ms)^\[{table}\].*?(?=^\[[a-z]|\Z)", "", PI5.read_text("utf-8"))
    (tmp_path / "board.toml").write_text(document, encoding="utf-8")
    assert f"{table} is missing" in str(refusal(tmp_path / "board.toml"))


@pytest.mark.parametrize("key", ["memory", "decode_threads", "max_spread", "peak_memory", "load"])
def test_a_missing_number_is_named(key, edited):
    assert f".{key} is missing" in str(refusal(edited(line_of(key) + "\n", "")))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ('"8"', "memory.value = '8' is not a number, a space and a unit"),
        ('"8 Gib"', "memory.value = '8 Gib' has no unit that fits"),
        ('"8 s"', "memory.value = '8 s' has no unit that fits"),
        ("8", "memory.value = 8 is not a text"),
        ('"0 GiB"', "memory.value is zero"),
        ('"0.3 B"', "memory.value is zero"),
    ],
)
def test_a_number_without_its_proper_unit_is_refused(value, complaint, edited):
    path = edited(line_of("memory"), f"memory = {{ value = {value}, {ORIGIN} }}")
    assert f"hardware.{complaint}" in str(refusal(path))


def test_half_a_thread_is_refused(edited):
    path = edited(
        line_of("decode_threads"), f'decode_threads = {{ value = "1.5 threads", {ORIGIN} }}'
    )
    assert "decode_threads.value = 1.5 is not a whole number of threads" in str(refusal(path))


@pytest.mark.parametrize(
    ("origin", "complaint"),
    [
        (ORIGIN.replace("policy", "hearsay", 1), "memory.basis = 'hearsay' is not one of measured"),
        (ORIGIN.replace("2026-11-23", "2026-13-01"), "memory.date = '2026-13-01' is not a date"),
        (ORIGIN.replace("2026-11-23", "20261123"), "memory.date = '20261123' is not a date"),
        (ORIGIN.replace("edgekit policy", " "), "memory.source is empty"),
        ('basis = "policy", date = "2026-11-23"', "memory.source is missing"),
    ],
)
def test_a_number_without_a_proper_origin_is_refused(origin, complaint, edited):
    path = edited(line_of("memory"), f'memory = {{ value = "8 GiB", {origin} }}')
    assert f"hardware.{complaint}" in str(refusal(path))


def test_a_bare_number_is_told_what_a_table_holds(edited):
    error = refusal(edited(line_of("memory"), 'memory = "8 GiB"'))
    assert "hardware.memory = '8 GiB' is not a table of value, basis, source, date" in str(error)


def test_an_unknown_format_is_refused_with_a_suggestion(edited):
    error = refusal(edited('["gguf", "onnx", "executorch"]', '["guff"]'))
    assert "formats has the unknown value 'guff'" in str(error)
    assert "did you mean gguf?" in error.hint


@pytest.mark.parametrize("formats", ["[]", '"gguf"', '["gguf", "gguf"]', "[1]"])
def test_formats_must_be_a_list_of_different_words(formats, edited):
    path = edited('["gguf", "onnx", "executorch"]', formats)
    assert "board.toml: formats" in str(refusal(path))


def first_token(*prompts):
    limits = ", ".join(f'{{ prompt = "{n} tokens", value = "1 s", {ORIGIN} }}' for n in prompts)
    return f"first_token = [{limits}]\n"


@pytest.fixture
def with_first_token(edited):
    whole = re.search(r"(?ms)^first_token = \[.*?^\]\n", PI5.read_text(encoding="utf-8"))
    assert whole
    return lambda text: edited(whole[0], text)


def test_limits_are_ordered_by_the_length_of_the_prompt(with_first_token):
    found = target.load(str(with_first_token(first_token(512, 32, 128))))
    assert [limit.prompt_tokens for limit in found.budget.first_token] == [32, 128, 512]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "budget.first_token is missing"),
        ("first_token = []\n", "budget.first_token = [] is not a list of one or more tables"),
        ('first_token = ["1 s"]\n', "is not a list of one or more tables"),
        (first_token(128, 128), "budget.first_token[1].prompt = 128 tokens appears twice"),
        (
            first_token(128).replace("1 s", "1 token"),
            "budget.first_token[0].value = '1 token' has no unit that fits",
        ),
        (first_token(128).replace("prompt", "promt"), "unknown key 'budget.first_token[0].promt'"),
        (first_token(4000), "budget.context is 4096 tokens, but the longest prompt"),
    ],
)
def test_a_first_token_limit_that_is_no_limit_is_refused(text, complaint, with_first_token):
    assert complaint in str(refusal(with_first_token(text)))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("peak_memory", "7.9 GiB", "budget.peak_memory is 7.9 GiB, more than hardware.usable"),
        ("usable_memory", "9 GiB", "hardware.usable_memory is 9 GiB, more than hardware.memory"),
        ("decode_bandwidth", "18 GB/s", "decode_bandwidth is above hardware.memory_bandwidth"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(key, value, complaint, edited):
    path = edited(line_of(key), f'{key} = {{ value = "{value}", {ORIGIN} }}')
    assert complaint in str(refusal(path))


def test_a_flag_is_true_or_false(tmp_path):
    text = (SHIPPED / "webgpu-ios.toml").read_text(encoding="utf-8")
    (tmp_path / "browser.toml").write_text(
        text.replace("shader_f16 = { value = false", 'shader_f16 = { value = "no"'), "utf-8"
    )
    error = refusal(tmp_path / "browser.toml")
    assert "webgpu.shader_f16.value = 'no' is not true or false" in str(error)


def test_a_target_may_name_the_variants_of_a_format_that_its_programs_take(edited):
    line = line_of("title")
    path = edited(line, f'{line}\nvariants.gguf = ["any", "other"]')
    assert target.load(str(path)).variants["gguf"] == ("any", "other")
    assert "gguf" not in target.load(str(PI5)).variants


@pytest.mark.parametrize("name", target.names())
def test_the_variants_that_a_target_takes_exist(name):
    found = target.load(name)
    for fmt, variants in found.variants.items():
        assert set(variants) <= set(formats.get(fmt).VARIANTS)
    assert ("executorch" in found.formats) == ("executorch" in found.variants)


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ('variants.ggfu = ["x"]', "unknown key 'variants.ggfu'"),
        ("variants.gguf = []", "variants.gguf is empty"),
        ('variants.gguf = [""]', "variants.gguf is empty"),
        ('variants.gguf = "x"', "variants.gguf"),
        ('variants.mlc = ["x"]', "unknown key 'variants.mlc'"),  # the target does not take it
    ],
)
def test_a_variant_that_cannot_be_is_refused(edited, line, finding):
    title = line_of("title")
    assert finding in str(refusal(edited(title, f"{title}\n{line}")))


def test_a_target_is_found_by_the_name_of_a_device():
    assert target.load("pi5").name == "raspberry-pi-5-8gb"
    assert target.load("galaxy-s23").name == "snapdragon-8-gen-2"


def test_no_two_shipped_targets_are_called_alike():
    known = [target.load(name) for name in target.names()]
    called = [name for it in known for name in (it.name, *it.aliases)]
    assert len(set(called)) == len(called)


def test_an_alias_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    text = PI5.read_text("utf-8").replace('aliases = ["pi5"]', 'aliases = ["galaxy-s23"]')
    (tmp_path / "board.toml").write_text(text, "utf-8")
    (tmp_path / "broken.toml").write_text("title = ")
    monkeypatch.setenv("EDGEKIT_TARGETS", str(tmp_path))
    assert target.load("galaxy-s23").name == "board"
