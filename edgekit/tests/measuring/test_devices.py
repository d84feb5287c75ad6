import io
import os
import subprocess
import sys
import time
import zipfile

import pytest

from edgekit.bundle.manifest import Bundle
from edgekit.errors import MissingDependencyError, ToolchainError, UsageError
from edgekit.measuring import devices
from edgekit.measuring.devices import Finished, SshDevice, ThisMachine, connect, library_zip
from edgekit.measuring.measure import measure_bundle
from edgekit.measuring.measurement import Workload
from edgekit.runtime.child import environment
from edgekit.tests.tiny import pretend_format
from edgekit.tests.witnesses import real_sshd


WORKLOAD = Workload(prompt_lengths_tokens=(4,), answer_tokens=4, context_tokens=64)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if reason := real_sshd.reason_to_skip():
        pytest.skip(reason)
    running = real_sshd.start(tmp_path_factory.mktemp("sshd"))
    yield running
    real_sshd.stop(running)


@pytest.fixture
def remote(server, tmp_path):
    """A device whose Python knows the pretend format; its home starts empty."""
    place = pretend_format.install(tmp_path / "place")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{place}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    url = f"{server.url}?python={python}"
    with connect(url, ssh_config=server.client_config) as reached:
        yield reached


@pytest.fixture
def bundle(tmp_path):
    return pretend_format.make_bundle(tmp_path / "bundle")


def test_this_machine_runs_modules_with_these_sources():
    with connect("this") as here:
        finished = here.run_module("edgekit.measuring.measure", ["--help"])

    assert finished.status == 0
    assert finished.death is None
    assert "edgekit.measuring.measure" in finished.output


@pytest.mark.parametrize(
    ("status", "words"),
    [(132, "newer processor"), (137, "memory"), (139, "segmentation"), (143, "signal 15")],
)
def test_a_death_by_signal_is_said_in_words(status, words):
    assert words in str(Finished(status=status, output="", log="").death)


@pytest.mark.parametrize("text", ["that", "adb:pixel", "ssh:", "pi@pi5"])
def test_an_unknown_kind_of_device_is_refused(text):
    with pytest.raises(UsageError, match="is not a device") as caught:
        connect(text)
    assert "ssh://user@host" in caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "ssh://",
        "ssh://-oProxyCommand=true",
        "ssh://-x@host",
        "ssh://host/directory",
        "ssh://host?shell=zsh",
        "ssh://host:99999",
        "ssh://host:twenty",
        "ssh://[::1",
        "ssh://[pi@host]",
    ],
)
def test_an_address_that_ssh_might_misread_is_refused(url):
    with pytest.raises(UsageError):
        SshDevice.parse(url)


def test_the_library_is_importable_has_no_tests_and_is_the_same_every_time():
    content = library_zip()
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()

    assert "edgekit/measuring/measure.py" in names
    assert "edgekit/formats/__init__.py" in names
    assert not [name for name in names if "tests" in name]
    assert library_zip() == content


def test_a_zip_of_the_sources_runs_where_edgekit_is_not_installed(tmp_path):
    (tmp_path / "edgekit.zip").write_bytes(library_zip())
    code = "import edgekit.measuring.measure, edgekit.formats; print(edgekit.formats.names())"

    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, 'edgekit.zip'); {code}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "gguf" in done.stdout


@pytest.mark.toolchain
def test_a_bundle_is_measured_over_ssh(remote, bundle):
    found = measure_bundle(bundle, remote, WORKLOAD, repetitions=1)

    assert "@127.0.0.1:" in found.device
    assert len(found.generations(4)) == 2


@pytest.mark.toolchain
def test_a_bundle_that_is_there_is_not_sent_again(remote, bundle, server, monkeypatch):
    place = remote.push(bundle.directory)
    other = connect(f"{server.url}?python={remote.python}", ssh_config=server.client_config)
    monkeypatch.setattr(other, "_copy", lambda *_: pytest.fail("sent again"))
    monkeypatch.setattr(other, "_library", remote._library)

    with other:
        assert other.push(bundle.directory) == place


@pytest.mark.toolchain
def test_a_bundle_that_was_damaged_there_is_sent_again(remote, bundle, server):
    place = remote.push(bundle.directory)
    there = server.home / place
    (there / "model.bin").write_bytes(b"damaged")
    remote._pushed.clear()

    assert remote.push(bundle.directory) == place

    assert Bundle.load(there).artifact == bundle.artifact


@pytest.mark.toolchain
def test_a_signature_goes_along(remote, bundle, server, tmp_path):
    key = ["-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")]
    subprocess.run(["ssh-keygen", *key], check=True)
    bundle.sign(tmp_path / "key")
    there = server.home / remote.push(bundle.directory)
    assert Bundle.load(there, trusted=tmp_path / "key.pub").artifact == bundle.artifact


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("signal", "status", "words"),
    [("KILL", 137, "memory"), ("ILL", 132, "processor"), ("SEGV", 139, "segmentation")],
)
def test_a_remote_death_is_told_from_a_lost_connection(remote, signal, status, words):
    finished = remote.run_shell(f"sh -c 'kill -{signal} $$'")

    assert finished.status == status
    assert words in finished.death


@pytest.mark.toolchain
def test_a_remote_command_that_fails_keeps_its_status_and_its_words(remote):
    finished = remote.run_shell("echo 'it is \"broken\"'; echo why >&2; exit 3")

    assert (finished.status, finished.output, finished.log) == (3, 'it is "broken"\n', "why\n")


@pytest.mark.toolchain
def test_no_space_on_the_device_is_an_error_that_names_it(remote, bundle, server):
    cache = server.home / ".cache/edgekit"
    remote.push(bundle.directory)
    remote._pushed.clear()
    subprocess.run(["rm", "-rf", str(cache / "bundles")], check=True)
    (cache / "bundles").write_text("a file in the way")

    try:
        with pytest.raises(ToolchainError, match="failed to run"):
            remote.push(bundle.directory)
    finally:
        (cache / "bundles").unlink()


@pytest.mark.toolchain
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_device_keeps_nothing_of_what_it_could_not_hold(remote, tmp_path, server):
    bundles = server.home / ".cache/edgekit/bundles"
    bundles.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "small", str(bundles)], check=False
    )
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(ToolchainError, match="could not be copied"):
            remote.push(
                pretend_format.make_bundle(tmp_path / "large", size_bytes=900_000).directory
            )
        assert list(bundles.iterdir()) == []
    finally:
        subprocess.run(["umount", str(bundles)], check=True)


@pytest.mark.toolchain
def test_a_copy_that_is_ended_leaves_nothing_on_the_device(server, tmp_path):
    bundle = pretend_format.make_bundle(tmp_path / "large", size_bytes=200_000_000)
    place = pretend_format.install(tmp_path / "place")
    bundles = server.home / ".cache/edgekit/bundles"
    copying = subprocess.Popen(
        [sys.executable, "-m", "edgekit", "validate", str(bundle.directory),
         "--target", "raspberry-pi-5-8gb", "--device", f"{server.url}?python={sys.executable}"],
        env=environment() | {
            "PYTHONPATH": f"{place}:{environment()['PYTHONPATH']}",
            devices.SSH_CONFIG_VARIABLE: str(server.client_config),
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while copying.poll() is None and not list(bundles.glob("*.part")):
        time.sleep(0.001)
    assert copying.poll() is None, copying.communicate()[0]
    copying.terminate()
    said, _ = copying.communicate()
    assert copying.returncode == 143, said
    assert not bundles.exists() or list(bundles.glob("*.part")) == []


@pytest.mark.toolchain
def test_a_part_that_a_killed_copy_left_long_ago_goes(remote, bundle, server):
    bundles = server.home / ".cache/edgekit/bundles"
    (bundles / "old.part").mkdir(parents=True)
    (bundles / "new.part").mkdir()
    os.utime(bundles / "old.part", (time.time() - 2 * 86_400,) * 2)
    remote.push(bundle.directory)
    assert [path.name for path in bundles.glob("*.part")] == ["new.part"]
    (bundles / "new.part").rmdir()


@pytest.mark.toolchain
def test_an_unknown_host_key_is_explained(server):
    with pytest.raises(ToolchainError, match="host key is unknown") as caught:
        connect(server.url, ssh_config=server.distrust())
    assert f"ssh -p {server.port}" in caught.value.hint


@pytest.mark.toolchain
def test_a_refused_key_is_explained(server):
    with pytest.raises(ToolchainError, match="did not accept your key") as caught:
        connect(server.url, ssh_config=server.use_wrong_key())
    assert "ssh-copy-id" in caught.value.hint


@pytest.mark.toolchain
def test_a_port_where_nobody_listens_is_explained(server, monkeypatch):
    monkeypatch.setenv(devices.SSH_CONFIG_VARIABLE, str(server.client_config))
    port = real_sshd._free_port()

    with pytest.raises(ToolchainError, match="nothing listens"):
        connect(f"ssh://127.0.0.1:{port}")


@pytest.mark.toolchain
def test_a_device_without_a_fit_python_is_explained(server, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)

    for python, words in ((old, "is older"), (tmp_path / "missing", "is not there")):
        with pytest.raises(MissingDependencyError, match=words):
            connect(f"{server.url}?python={python}", ssh_config=server.client_config)


def test_a_machine_without_ssh_is_told_to_install_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(MissingDependencyError, match="ssh is not installed"):
        connect("ssh://pi@pi5")


def test_this_machine_needs_no_copy(bundle):
    assert ThisMachine().push(bundle.directory) == str(bundle.directory)
