"""Odd files where a model, an adapter, a bundle or a setting is expected: nothing waits."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from edgekit.bundle.goldens import Goldens
from edgekit.bundle.manifest import Bundle
from edgekit.errors import BundleError, UsageError
from edgekit.inspect import inspect
from edgekit.proof import qlora
from edgekit.proof.calibration import read_own_text
from edgekit.source.opening import open_checkpoint
from edgekit.source.writer import write_checkpoint
from edgekit.target import DIRECTORY_VARIABLE
from edgekit.target import load as load_target
from edgekit.tests.tiny import adapters, pretend_format
from edgekit.tests.tiny.random_checkpoints import random_checkpoint
from edgekit.validate import judge_document


LONGEST_S = 5


@pytest.fixture(autouse=True)
def impatience():
    """End what waits: to open a named pipe never returns where nobody writes."""

    def end(_number, _frame):
        raise TimeoutError(f"it hangs for {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def loop(path):
    path.symlink_to(path.with_name(f"{path.name}.2"))
    path.with_name(f"{path.name}.2").symlink_to(path)


def socket_at(path):
    before = Path.cwd()
    os.chdir(path.parent)  # the address of a socket holds about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def linked_pipe(path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


ODD = {
    "a named pipe": os.mkfifo,
    "a link to a named pipe": linked_pipe,
    "a directory": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/null"),
    "a socket": socket_at,
    "a loop": loop,
}
REFUSED = (
    r"{} (is a (named pipe|directory|device|socket), expected a regular file|cannot be read: )"
)
odd = pytest.mark.parametrize("put", ODD.values(), ids=ODD.keys())


def put_instead(put, path):
    """Put something odd where a file is, or would be; return what says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    put(path)
    return REFUSED.format(path.name)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    return write_checkpoint(random_checkpoint(made / "text"), made / "model", precision="f32")


@odd
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "special_tokens_map.json", "README.md", "chat_template.jinja",
        "additional_chat_templates/x.jinja", "processor_config.json",
    ],
)  # fmt: skip
def test_odd_files_in_a_model_are_refused(model_directory, tmp_path, name, put):
    shutil.copytree(model_directory, tmp_path / "model")
    said = put_instead(put, tmp_path / "model" / name)
    with pytest.raises(UsageError, match=said):
        _ = open_checkpoint(tmp_path / "model").card


@odd
def test_odd_files_where_a_way_out_is_looked_for_are_refused(tmp_path, put):
    base = adapters.write_base(tmp_path / "base")
    for name in ("adapter_config.json", "adapter/adapter_config.json"):
        (tmp_path / "no model" / name).parent.mkdir(parents=True, exist_ok=True)
    put(tmp_path / "no model" / "adapter_config.json")
    with pytest.raises(UsageError):
        open_checkpoint(tmp_path / "no model")
    put(tmp_path / "no adapter")
    with pytest.raises(UsageError):
        open_checkpoint(base, adapters=[tmp_path / "no adapter"])


@odd
def test_odd_files_where_an_adapter_says_its_base_is_are_not_opened(tmp_path, put):
    base = adapters.write_base(tmp_path / "base", quantization_config={"load_in_4bit": True})
    adapter = adapters.write_adapter(
        tmp_path / "adapter", adapters.q_proj_updates(), base_model_name_or_path=str(base)
    )
    assert qlora._named_base([adapter]) == base
    put_instead(put, base / "config.json")
    assert qlora._named_base([adapter]) is None


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="only Linux has it")
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_a_regular_file_that_cannot_be_read_is_refused(model_directory, tmp_path, name):
    shutil.copytree(model_directory, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to("/proc/self/mem")  # regular, and an error to read
    with pytest.raises(UsageError, match=f"{name} cannot be read: "):
        open_checkpoint(tmp_path / "model")


def test_a_gguf_model_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "model.gguf").symlink_to("/proc/self/mem")
    with pytest.raises(UsageError, match=r"model\.gguf cannot be read: "):
        open_checkpoint(tmp_path / "model.gguf")


@odd
@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]
)
def test_odd_files_as_shards_are_refused(model_directory, tmp_path, name, put):
    shutil.copytree(model_directory, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    said = put_instead(put, tmp_path / "model" / name)
    with pytest.raises(UsageError, match=said):
        open_checkpoint(tmp_path / "model")


@odd
def test_odd_files_as_a_model_are_refused(tmp_path, put):
    path = tmp_path / "model.gguf"
    put(path)
    with pytest.raises(UsageError):
        open_checkpoint(path)


@odd
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"]
)
def test_odd_files_in_an_adapter_are_refused(tmp_path, name, put):
    base = adapters.write_base(tmp_path / "base")
    adapter = adapters.write_adapter(tmp_path / "adapter", adapters.q_proj_updates())
    open_checkpoint(base, adapters=[adapter])
    said = put_instead(put, adapter / name)
    with pytest.raises(UsageError, match=said):
        _ = open_checkpoint(base, adapters=[adapter]).card


@odd
@pytest.mark.parametrize("name", ["manifest.json", "the artifact", "new.json"])
def test_odd_files_in_a_bundle_are_refused(tmp_path, name, put):
    bundle = pretend_format.make_bundle(tmp_path / "bundle")
    name = bundle.artifact.entry if name == "the artifact" else name
    put_instead(put, bundle.directory / name)
    if name == "new.json" and put is ODD["a directory"]:
        (bundle.directory / name / "x.json").touch()  # an empty one adds no file
    for check_hashes in (True, False):
        with pytest.raises(BundleError, match=name):
            Bundle.load(bundle.directory, check_hashes=check_hashes)


@odd
def test_odd_files_as_goldens_are_refused(tmp_path, put):
    with pytest.raises(BundleError, match=put_instead(put, tmp_path / "goldens.json")):
        Goldens.load(tmp_path)


@odd
def test_odd_files_that_an_option_names_are_refused(model_directory, tmp_path, put):
    said = put_instead(put, tmp_path / "odd.toml")
    with pytest.raises(UsageError, match=said):
        load_target(tmp_path / "odd.toml")
    with pytest.raises(UsageError, match=said):
        read_own_text(tmp_path / "odd.toml")
    with pytest.raises(UsageError, match=said):
        open_checkpoint(model_directory, chat_template=tmp_path / "odd.toml")
    if put is not ODD["a directory"]:
        with pytest.raises(UsageError, match=said):
            inspect(tmp_path / "odd.toml")


@odd
def test_odd_files_as_measurements_are_refused(tmp_path, put):
    bundle = pretend_format.make_bundle(tmp_path / "bundle")
    said = put_instead(put, tmp_path / "phone.json")
    with pytest.raises(UsageError, match=said):
        judge_document(bundle.directory, pretend_format.make_target(), tmp_path / "phone.json")


@pytest.mark.parametrize(
    "name", ["x" * 5_000, "x/" * 5_000, "nul\0byte"], ids=["long", "deep", "nul"]
)
def test_impossible_names_are_refused_in_a_short_sentence(model_directory, tmp_path, name):
    bundle = pretend_format.make_bundle(tmp_path / "bundle")
    asked = [
        lambda: open_checkpoint(name),
        lambda: open_checkpoint(f"{name}.gguf"),
        lambda: open_checkpoint(model_directory, adapters=[name]),
        lambda: open_checkpoint(model_directory, chat_template=name),
        lambda: load_target(f"{name}.toml"),
        lambda: load_target(name),
        lambda: read_own_text(Path(name)),
        lambda: inspect(name),
        lambda: Bundle.load(name),
        lambda: judge_document(bundle.directory, pretend_format.make_target(), name),
    ]
    said = []
    for ask in asked:
        with pytest.raises((UsageError, BundleError)) as caught:
            ask()
        said.append(len(str(caught.value)) + len(caught.value.hint))
    assert len(said) == len(asked)
    assert max(said) < 1_500


def test_a_folder_of_targets_with_an_impossible_name_is_refused(monkeypatch):
    monkeypatch.setenv(DIRECTORY_VARIABLE, "x" * 5_000)
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        load_target("raspberry-pi-5-8gb")


def test_a_link_to_a_regular_file_is_that_file(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)

    linked = open_checkpoint(tmp_path / "model")

    assert linked.tensors.keys() == open_checkpoint(model_directory).tensors.keys()
