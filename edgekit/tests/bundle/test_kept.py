"""Directories of the cache: believed only as they were written."""

import json
import os
import shutil
import stat
import time

import pytest

from edgekit.bundle import kept
from edgekit.errors import UsageError


SIZE = 100_000


@pytest.fixture
def out(tmp_path):
    return tmp_path / "cache" / "checkpoints" / "one"


class Writer:
    """Fills a directory, and counts how often."""

    def __init__(self):
        self.times = 0

    def __call__(self, work):
        self.times += 1
        (work / "model").mkdir()
        (work / "model" / "model.safetensors").write_bytes(b"\1" * SIZE)
        (work / "model" / "config.json").write_text("{}")


def age(directory, seconds=10):
    """Let the list say that its files are as old as that, which no test waits for."""
    path = directory / kept.LIST
    fields = json.loads(path.read_text())
    for name, entry in fields.items():
        entry["stamp"] = kept._stamp(directory / name)
    path.write_text(json.dumps(fields))


def zero_in_place(path):
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(bytes(40_000))


def zero_and_set_the_time_back(path):
    before = path.stat()
    zero_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_a_link(path):
    path.unlink()
    path.symlink_to(path.with_name("config.json"))


def put_a_fifo(path):
    path.unlink()
    os.mkfifo(path)


def put_a_directory(path):
    path.unlink()
    path.mkdir()


def put_a_file(path):
    shutil.rmtree(path.parent.parent)
    path.parent.parent.touch()


DAMAGE = {
    "zeroed in place": zero_in_place,
    "zeroed in place, its time set back": zero_and_set_the_time_back,
    "truncated": lambda path: os.truncate(path, SIZE // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(b"\1" * (SIZE + 1)),
    "gone": lambda path: path.unlink(),
    "a link": put_a_link,
    "a FIFO": put_a_fifo,
    "a directory": put_a_directory,
    "another file next to it": lambda path: path.with_name("tokenizer.json").touch(),
    "no list": lambda path: (path.parent.parent / kept.LIST).unlink(),
    "an emptied list": lambda path: os.truncate(path.parent.parent / kept.LIST, 0),
    "a list of nothing": lambda path: (path.parent.parent / kept.LIST).write_text("{}"),
    "a list of other things": lambda path: (path.parent.parent / kept.LIST).write_text(
        '{"model/model.safetensors": 1, "model/config.json": []}'
    ),
    "all of it": lambda path: shutil.rmtree(path.parent.parent),
    "a file in its place": put_a_file,
}  # fmt: skip


@pytest.mark.parametrize("is_settled", [False, True], ids=["fresh", "settled"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_differs_in_anything_is_made_again(out, damage, is_settled):
    write = Writer()
    kept.directory(out, write)
    if is_settled:
        age(out)
        time.sleep(0.02)  # longer than a tick of the clock that files are stamped with
    damage(out / "model" / "model.safetensors")

    assert kept.directory(out, write) == out

    assert write.times == 2
    assert (out / "model" / "model.safetensors").read_bytes() == b"\1" * SIZE
    assert sorted(path.name for path in (out / "model").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["one"]


def test_what_is_whole_is_written_once(out):
    write = Writer()
    for _ in range(3):
        kept.directory(out, write)
    assert write.times == 1


def test_a_copy_with_other_times_is_hashed_and_then_believed(out, tmp_path):
    write = Writer()
    kept.directory(out, write)
    shutil.copytree(out, tmp_path / "copy")  # as a restored backup: every time of an entry is new

    assert kept.is_whole(tmp_path / "copy")
    assert write.times == 1


def test_a_settled_file_is_not_hashed_again(out, monkeypatch):
    kept.directory(out, Writer())
    age(out)
    monkeypatch.setattr(kept, "sha256_of", lambda path: pytest.fail(f"hashed {path}"))

    assert kept.is_whole(out)


def test_a_failed_writer_leaves_nothing(out):
    def write(work):
        (work / "half").touch()
        raise UsageError("the model is damaged")

    with pytest.raises(UsageError, match="the model is damaged"):
        kept.directory(out, write)
    assert list(out.parent.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write into") as caught:
        kept.directory(tmp_path / "file" / "one", Writer())
    assert "EDGEKIT_CACHE" in caught.value.hint


# Code


def others_may_write(path):
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


@pytest.mark.parametrize("place", ["..", ".", "model.so"])
@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH], ids=["group", "others"])
def test_code_that_others_could_write_is_made_again_and_closed(out, place, bit):
    times = []

    def write(work):
        times.append(work)
        (work / "model.so").write_bytes(b"code")

    kept.directory(out, write, is_code=True)
    opened = (out / place).resolve()
    opened.chmod(opened.stat().st_mode | bit)

    kept.directory(out, write, is_code=True)
    kept.directory(out, write, is_code=True)

    assert len(times) == 2
    assert not any(map(others_may_write, (out.parent, out, out / "model.so", out / kept.LIST)))


def test_code_is_closed_whatever_the_umask(out):
    before = os.umask(0)
    try:
        kept.directory(out, lambda work: (work / "model.so").write_bytes(b"code"), is_code=True)
    finally:
        os.umask(before)
    assert not any(map(others_may_write, (out.parent, out, out / "model.so", out / kept.LIST)))


def test_code_of_another_user_is_refused(out, monkeypatch):
    write = Writer()
    kept.directory(out, write, is_code=True)
    owner = out.stat().st_uid
    if owner == 0:
        for path in (out, out.parent):
            os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)

    with pytest.raises(UsageError, match="belongs to another user") as caught:
        kept.directory(out, write, is_code=True)
    assert write.times == 1
    assert "EDGEKIT_CACHE" in caught.value.hint
