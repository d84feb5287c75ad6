"""A real Chromium is started and ends, whatever happens to it or to us."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from edgekit.browser import chromium
from edgekit.errors import MissingDependencyError, ToolchainError


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_end(pids, timeout_s=20):
    limit = time.monotonic() + timeout_s
    while any(map(is_running, pids)):
        assert time.monotonic() < limit, [pid for pid in pids if is_running(pid)]
        time.sleep(0.05)


def ignore(*_):
    """Listen to nothing."""


def test_a_missing_browser_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(chromium.VARIABLE, raising=False)
    monkeypatch.setattr(chromium, "MAC_PATHS", ())
    with pytest.raises(MissingDependencyError, match="no Chromium or Chrome") as refusal:
        chromium.find()
    assert "apt install chromium" in refusal.value.hint


def test_a_named_browser_that_is_no_program_is_refused(monkeypatch):
    monkeypatch.setenv(chromium.VARIABLE, "/nowhere/chrome")
    with pytest.raises(MissingDependencyError, match="'/nowhere/chrome', which is not a program"):
        chromium.find()


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
def test_a_program_that_is_no_browser_does_not_start(monkeypatch):
    monkeypatch.setenv(chromium.VARIABLE, "false")
    with (
        pytest.raises(ToolchainError, match="false does not start: the browser was closed"),
        chromium.running(on_event=ignore),
    ):
        pass


@pytest.mark.toolchain
@pytest.mark.usefixtures("needs_browser")
def test_a_browser_leaves_no_process_and_no_profile(monkeypatch, short_place):
    monkeypatch.setattr(tempfile, "tempdir", str(short_place))
    with chromium.running(on_event=ignore) as browser:
        processes = chromium.tree(browser.process.pid)
        held = browser.held()
        assert browser.version().startswith("Chrome/")
        assert [*short_place.iterdir()]
    assert len(processes) > 2
    assert held is not None
    assert held.pss_bytes > 50 << 20
    wait_for_end(processes)
    assert not [*short_place.iterdir()]


@pytest.mark.toolchain
@pytest.mark.usefixtures("needs_browser")
def test_a_browser_ends_with_a_process_that_was_killed():
    """Whoever is killed puts nothing away: the pipe is closed, and that ends it."""
    script = """
import time
from edgekit.browser import chromium
with chromium.running(on_event=lambda *_: None) as browser:
    print(*chromium.tree(browser.process.pid), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        browser = [int(pid) for pid in process.stdout.readline().split()]
        os.kill(process.pid, signal.SIGKILL)
    assert len(browser) > 2
    wait_for_end(browser)
