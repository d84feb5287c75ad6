"""What a browser is told of an MLC bundle, or why it cannot open one."""

import json

import pytest

from edgekit.errors import BundleError, UsageError
from edgekit.formats.mlc import browsing, web_app


RECORD = {
    "model": f"{web_app.ADDRESS}resolve/main/../../",
    "model_id": "tiny",
    "model_lib": f"{web_app.ADDRESS}{web_app.OWN_LIBRARY}",
    "required_features": ["shader-f16"],
    "overrides": {},
    "buffer_size_required_bytes": 77,
}
KNOWN = {"webllm_version": web_app.PREBUILT_FOR, "largest_buffer": "head"}
PREBUILT = "https://libraries.example/v1/tiny.wasm"


def request(directory, record=RECORD, known=KNOWN):
    settings = {"model_list": [record], "edgekit": known}
    (directory / web_app.SETTINGS).write_text(json.dumps(settings))
    return browsing.request(directory / "tensor-cache.json", context_tokens=64)


def test_a_bundle_without_a_library_is_refused_before_a_browser_is_started(tmp_path):
    with pytest.raises(UsageError, match=r"has no library for WebLLM: model-webgpu\.wasm is"):
        request(tmp_path)


def test_a_library_for_another_webllm_is_refused_with_both_versions(tmp_path):
    known = KNOWN | {"webllm_version": "0.2.80"}
    with pytest.raises(UsageError, match=r"is for WebLLM 0\.2\.80, the browser here gets WebLLM"):
        request(tmp_path, known=known)


def test_settings_that_are_not_edgekits_are_refused(tmp_path):
    with pytest.raises(BundleError, match="is not as edgekit wrote it"):
        request(tmp_path, record={})
