"""Skip where a package is missing, without importing it: collecting the quick tests stays quick."""

import pytest

from edgekit.installed import missing


def needs(*packages: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test, or as ``pytestmark`` a module, and names what is missing."""
    lacking = missing(*packages)
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")
