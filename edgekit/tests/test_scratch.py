"""Directories for a while: none outlives its process for longer than until the next run."""

import os
import subprocess
import sys
import tempfile
import time

import pytest

from edgekit import scratch
from edgekit.runtime.child import environment


WORK = """
import time
from edgekit import scratch
with scratch.directory("trial") as place:
    (place / "half").write_text("written")
    print(place.parent, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def working():
    """A process that is in the middle of it, and the name of its directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    yield process, process.stdout.readline().strip()
    process.kill()
    process.wait()
    process.stdout.close()


def test_it_goes_with_the_block_however_that_ends(temporary):
    with scratch.directory("trial") as place:
        (place / "deep").mkdir()
        assert list(temporary.iterdir()) == [place.parent]
    with pytest.raises(KeyboardInterrupt), scratch.directory("trial"):
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_run(working, temporary):
    process, left = working
    process.kill()
    process.wait()
    assert [str(path) for path in temporary.iterdir()] == [left]
    with scratch.directory("another"):
        assert not os.path.lexists(left)


def test_what_a_live_process_works_in_stays(working, temporary):
    _, used = working
    with scratch.directory("another") as own:
        assert {str(path) for path in temporary.iterdir()} == {used, str(own.parent)}
        scratch.remove_orphans()
        assert own.exists()


def test_what_is_not_ours_stays(temporary):
    for name in ("edgekit-notes", "edgekit-.scratch", "edgekit-a.scratch", "other-1.scratch"):
        (temporary / name).mkdir()
        (temporary / name / "mine").write_text("keep")
    (temporary / "edgekit-link.scratch").symlink_to("edgekit-notes")
    before = sorted(temporary.rglob("*"))
    scratch.remove_orphans()
    assert sorted(temporary.rglob("*")) == before


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away"
)
def test_what_another_user_left_stays(temporary):
    theirs = temporary / "edgekit-pre-x.scratch"
    (theirs / "w").mkdir(parents=True)
    os.chown(theirs, 12_345, -1)
    scratch.remove_orphans()
    assert theirs.exists()


def test_one_that_is_being_made_stays_for_a_minute(temporary):
    young = temporary / "edgekit-pre-x.scratch"
    young.mkdir()
    scratch.remove_orphans()
    assert young.exists()
    os.utime(young, (time.time() - 61,) * 2)
    scratch.remove_orphans()
    assert not young.exists()
