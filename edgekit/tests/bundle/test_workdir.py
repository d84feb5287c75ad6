import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgekit.bundle.workdir import new_directory, refuse_existing
from edgekit.errors import EdgekitError, UsageError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def run_python(script, *arguments, before=()):
    return subprocess.run(
        [*before, sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def dead_pid():
    """Return the id of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_out_appears_only_when_the_work_is_done(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with new_directory(out) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("x")
        assert not out.exists()
        assert work.parent == out.parent  # so that the rename stays on one disk
    assert (out / "sub" / "file").read_text() == "x"
    assert names(out.parent) == ["out"]


def test_a_path_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_directory(Path("out")) as work:
        (work / "file").write_text("x")
    assert (tmp_path / "out" / "file").is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, UsageError("no")])
def test_nothing_is_left_when_the_work_is_interrupted(tmp_path, error):
    def work():
        with new_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("x")
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        work()
    assert names(tmp_path) == []


def test_another_error_of_the_system_stays_what_it_is(tmp_path):
    def work():
        with new_directory(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        work()
    assert names(tmp_path) == []


# OUT that exists


@pytest.mark.parametrize("kind", ["directory", "file", "symlink", "symlink to nowhere"])
def test_what_exists_is_refused_before_the_work(tmp_path, kind):
    out = tmp_path / "out"
    {
        "directory": out.mkdir,
        "file": out.touch,
        "symlink": lambda: out.symlink_to(tmp_path),
        "symlink to nowhere": lambda: out.symlink_to("nowhere"),
    }[kind]()
    with pytest.raises(UsageError, match="exists") as refusal:
        refuse_existing(out)
    assert "-o" in refusal.value.hint
    with pytest.raises(UsageError, match="exists"), new_directory(out):
        pytest.fail("the work began")
    assert names(tmp_path) == ["out"]


def test_what_comes_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def work():
        with new_directory(out):
            out.mkdir()
            (out / "mine").touch()

    with pytest.raises(UsageError, match="exists"):
        work()
    assert names(out) == ["mine"]
    assert names(tmp_path) == ["out"]


def test_the_old_one_is_replaced_at_the_very_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    with new_directory(out, replaces="manifest.json") as work:
        (work / "manifest.json").write_text("new")
        assert (out / "manifest.json").read_text() == "old"
    assert (out / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_the_old_one_stays_when_the_work_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")

    def work():
        with new_directory(out, replaces="manifest.json"):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - ours
        work()
    assert (out / "manifest.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["other directory", "file", "symlink"])
def test_only_its_own_kind_is_replaced(tmp_path, kind):
    out, whole = tmp_path / "out", tmp_path / "whole"
    whole.mkdir()
    (whole / "manifest.json").touch()
    {
        "other directory": out.mkdir,
        "file": out.touch,
        "symlink": lambda: out.symlink_to(whole),
    }[kind]()
    with pytest.raises(UsageError, match="not what would replace it"):
        refuse_existing(out, replaces="manifest.json")


# A place that cannot be written


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UsageError, match="cannot write into"),
        new_directory(tmp_path / "file" / "out"),
    ):
        pytest.fail("the work began")


@pytest.mark.parametrize("replaces", [None, "manifest.json"])
@pytest.mark.parametrize(
    ("out", "said"),
    [("x" * 300, "File name too long"), ("x" * 300 + "/out", "File name too long"),
     ("x/" * 3000 + "out", "File name too long"), ("x/" * 1500 + "out", "recursion"),
     ("nul\0byte", "embedded null"), ("nul\0byte/out", "embedded null")],
    ids=["name", "parent", "path", "levels", "nul", "nul in the parent"],
)  # fmt: skip
def test_a_place_that_there_cannot_be_is_refused(tmp_path, out, said, replaces):
    with (
        pytest.raises(UsageError, match=f"cannot write into .*{said}"),
        new_directory(tmp_path / out, replaces=replaces),
    ):
        pytest.fail("the work began")
    assert names(tmp_path) == []


def test_what_exists_but_cannot_be_looked_into_is_refused(tmp_path):
    """As of a directory of another user: a name within it that is too long stands for that."""
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UsageError, match="is not what would replace it"),
        new_directory(tmp_path / "out", replaces="x" * 300),
    ):
        pytest.fail("the work began")


# What killed processes leave


@pytest.mark.parametrize("name", ["out", "out.v1", "out[1]", "a**b", "*"])
def test_what_a_dead_process_left_is_removed_by_the_next(tmp_path, dead_pid, name):
    orphan = tmp_path / f".{name}.{dead_pid}.part"
    orphan.mkdir()
    (orphan / "half").touch()
    with new_directory(tmp_path / name):
        assert not orphan.exists()
    assert names(tmp_path) == [name]


def test_what_a_living_process_works_in_is_kept(tmp_path):
    living = tmp_path / f".out.{os.getppid()}.part"
    living.mkdir()
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == [living.name, "out"]


def test_a_process_with_the_same_id_in_an_earlier_container_is_dead(tmp_path):
    (tmp_path / f".out.{os.getpid()}.part" / "half").mkdir(parents=True)
    with new_directory(tmp_path / "out") as work:
        assert names(work) == []
    assert names(tmp_path) == ["out"]


def test_a_second_one_in_the_same_process_is_refused_and_the_first_goes_on(tmp_path):
    with new_directory(tmp_path / "out") as work:
        with pytest.raises(UsageError, match="cannot write"), new_directory(tmp_path / "out"):
            pytest.fail("the work began")
        (work / "file").touch()
    assert names(tmp_path / "out") == ["file"]


def test_files_that_only_look_alike_are_kept(tmp_path):
    for name in (".out.part", ".out.abc.part", ".out.1.txt", f".out.{10**30}.parts"):
        (tmp_path / name).touch()
    before = names(tmp_path)
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == [*before, "out"]


def test_an_old_one_whose_replacement_died_between_the_renames_comes_back(tmp_path, dead_pid):
    old = tmp_path / f".out.{dead_pid}.old"
    old.mkdir()
    (old / "manifest.json").touch()
    with pytest.raises(UsageError, match="exists"), new_directory(tmp_path / "out"):
        pytest.fail("the work began")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json"]


def test_an_old_one_whose_replacement_is_in_place_goes(tmp_path, dead_pid):
    for directory in (tmp_path / "out", tmp_path / f".out.{dead_pid}.old"):
        directory.mkdir()
        (directory / "manifest.json").write_text(directory.name)
    with new_directory(tmp_path / "out", replaces="manifest.json") as work:
        (work / "manifest.json").write_text("newest")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_text() == "newest"


def test_every_file_is_on_the_disk_before_the_directory_has_its_name(tmp_path, monkeypatch):
    synced = []

    def remember(descriptor):
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "out").exists()))

    monkeypatch.setattr(os, "fsync", remember)
    with new_directory(tmp_path / "out") as work:
        (work / "deep").mkdir()
        files = [work / "model.bin", work / "deep" / "model.bin"]
        for file in files:
            file.write_bytes(b"x")
        inodes = {file.stat().st_ino for file in files}
    assert {inode for inode, is_there in synced if not is_there} == inodes
    assert synced[-1] == (tmp_path.stat().st_ino, True)  # and then the name


def test_sigkill_leaves_no_out_and_the_next_run_cleans_up(tmp_path):
    killed = run_python(
        """
        import os, signal, sys
        from pathlib import Path
        from edgekit.bundle.workdir import new_directory
        with new_directory(Path(sys.argv[1])) as work:
            (work / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path / "out",
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 1
    with new_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


# A full disk

FILL = """
    import errno, os, subprocess, sys
    from pathlib import Path
    from edgekit.errors import EdgekitError
    from edgekit.bundle.workdir import new_directory
    disk = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        with new_directory(disk / "out") as work:
            (work / "file").write_bytes(bytes(1_000_000))
    except EdgekitError as error:
        print(type(error).__name__, error, [*os.listdir(disk)])
"""


@pytest.fixture
def private_mounts():
    """Return the command that gives a process mounts of its own; skip where that is forbidden."""
    for options in (["--mount"], ["--mount", "--map-root-user"]):
        command = ["unshare", *options]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    return pytest.skip("this system lets nobody mount a small file system")


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, private_mounts):
    found = run_python(FILL, tmp_path, before=private_mounts)
    if "mount" in found.stderr:
        pytest.skip(f"no file system can be mounted here: {found.stderr.strip()[-200:]}")
    assert found.stdout == f"EdgekitError the disk under {tmp_path} is full []\n", found.stderr


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_is_a_full_disk_too(tmp_path, code):
    def work():
        with new_directory(tmp_path / "out"):
            raise OSError(code, os.strerror(code))

    with pytest.raises(EdgekitError, match="is full") as refusal:
        work()
    assert refusal.value.exit_status == 1
    assert names(tmp_path) == []
