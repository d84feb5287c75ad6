"""What the tests of adapters share: a base, and a cache in which none finds another's answers."""

import pytest

from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny import adapters as tiny


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Checkpoint.open(tiny.write_base(tmp_path_factory.mktemp("adapter") / "base"))
