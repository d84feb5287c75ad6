import pytest

from edgekit.browser.options import BrowserOptions, is_browser
from edgekit.errors import UsageError


def test_a_browser_is_told_from_other_devices_and_what_is_asked_of_it_is_read():
    assert [is_browser(text) for text in ("browser", "browser?backend=wasm", "this")] == [
        True, True, False,
    ]  # fmt: skip
    assert BrowserOptions.parse("browser") == BrowserOptions()
    found = BrowserOptions.parse("browser?backend=wasm&adapter=software")
    assert (found.backend, found.adapter) == ("wasm", "software")


@pytest.mark.parametrize("text", ["browser?backend=cuda", "browser?speed=high", "browser?backend="])
def test_what_no_browser_knows_is_refused_with_what_one_does(text):
    with pytest.raises(UsageError, match="is unknown") as refusal:
        BrowserOptions.parse(text)
    assert "backend=webgpu|wasm" in refusal.value.hint
