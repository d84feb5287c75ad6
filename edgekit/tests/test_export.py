"""The main job, seen from outside: what lies on the disk afterwards, and what does not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from edgekit.bundle import manifest as manifest_module
from edgekit.bundle.goldens import Goldens
from edgekit.bundle.manifest import Bundle
from edgekit.encodings import hashing
from edgekit.errors import BudgetError, DisagreementError, UsageError
from edgekit.export import default_out, export
from edgekit.plan import Choice, make
from edgekit.run import Runner, answer
from edgekit.source.opening import open_checkpoint
from edgekit.verify import verify


pytestmark = pytest.mark.toolchain


class Lines:
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def track(self, title, total):
        from contextlib import nullcontext

        self.said.append(title)
        assert total > 0
        return nullcontext(lambda _: None)


def test_a_bundle_holds_the_artifact_its_text_its_goldens_and_a_manifest(tiny_bundle):
    assert sorted(path.name for path in tiny_bundle.iterdir()) == [
        "Modelfile", "chat_template.jinja", "goldens.json", "manifest.json", "model.gguf",
        "tokenizer.json",
    ]  # fmt: skip
    bundle = Bundle.load(tiny_bundle)
    assert bundle.artifact.recipe == "F16"
    assert bundle.context_tokens == 128
    assert bundle.agreement is not None
    assert bundle.agreement.passed
    assert {gate.name for gate in bundle.agreement.gates} == {
        "runs", "logits", "token ids", "chat template", "stops", "tensor types", "size",
    }  # fmt: skip
    assert Goldens.load(tiny_bundle).answer_ids


def test_the_manifest_says_what_it_was_made_from_and_with(tiny_bundle, tiny_checkpoint):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert manifest["model"]["name"] == "tiny-llama"
    assert manifest["model"]["sha256"] == open_checkpoint(tiny_checkpoint).sha256
    assert {"edgekit", "llama-cpp-python", "transformers"} <= manifest["tools"].keys()
    assert str(tiny_checkpoint.parent) not in json.dumps(manifest)


def test_every_file_is_hashed_once(tiny_checkpoint, tmp_path, monkeypatch):
    hashed = []

    def sha256_of(path, real=hashing.sha256_of):
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(manifest_module, "sha256_of", sha256_of)
    out = tmp_path / "out"
    export(tiny_checkpoint, "raspberry-pi-5-8gb", quant="F32", context_tokens=64, out=out)
    assert sorted(hashed) == sorted(
        path.name for path in out.iterdir() if path.name != "manifest.json"
    )


def test_the_plan_and_the_proof_are_told_before_the_result(tiny_checkpoint, tmp_path):
    listener = Lines()
    export(
        tiny_checkpoint, "raspberry-pi-5-8gb", quant="F32", context_tokens=64,
        out=tmp_path / "out", listener=listener,
    )  # fmt: skip
    text = "\n".join(listener.said)
    assert text.index("plan for Raspberry Pi 5") < text.index("convert to F32")
    assert text.index("convert to F32") < text.index("prove") < text.index("ok   logits: mean KL")


def test_two_exports_have_the_same_bytes(tiny_checkpoint, tmp_path):
    for name in ("a", "b"):
        export(
            tiny_checkpoint, "raspberry-pi-5-8gb", quant="Q8_0", context_tokens=64,
            out=tmp_path / name, verify=False,
        )  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture
def key(tmp_path):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    words = ["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(tmp_path / "key")]
    subprocess.run(["ssh-keygen", *words], check=True)
    return tmp_path / "key"


def test_a_signed_bundle_differs_by_its_signature_only(tiny_bundle, tiny_checkpoint, key, tmp_path):
    public, out = key.with_suffix(".pub"), tmp_path / "out"
    export(
        tiny_checkpoint, "raspberry-pi-5-8gb", quant="F16", context_tokens=128, out=out, sign=key
    )
    assert Bundle.load(out, trusted=public).agreement is not None
    assert verify(out, tiny_checkpoint, trusted=public).passed
    with Runner.open(out, threads=1, trusted=public) as runner:
        assert "".join(answer(runner, "hello", max_tokens=2))
    (out / "manifest.json.sig").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_bundle.iterdir()
    }


def test_a_signature_that_fails_at_the_end_leaves_nothing(tiny_checkpoint, key, tmp_path):
    class Thief(Lines):
        def track(self, title, total):
            key.unlink(missing_ok=True)
            return super().track(title, total)

    with pytest.raises(UsageError, match="key is missing"):
        export(
            tiny_checkpoint, "raspberry-pi-5-8gb", quant="F32", context_tokens=64, verify=False,
            out=tmp_path / "out", sign=key, listener=Thief(),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]


def test_an_out_that_exists_is_refused_before_the_model_is_even_opened(tmp_path):
    with pytest.raises(UsageError, match="exists"):
        export(tmp_path / "no-model", "raspberry-pi-5-8gb", out=tmp_path)


def test_a_bundle_may_be_replaced_but_nothing_else(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    ask = {"quant": "F32", "context_tokens": 64, "out": out, "verify": False}
    export(tiny_checkpoint, "raspberry-pi-5-8gb", **ask)
    assert Bundle.load(out).artifact.recipe == "F32"
    export(tiny_checkpoint, "raspberry-pi-5-8gb", **(ask | {"quant": "F16"}), replace=True)
    assert Bundle.load(out).artifact.recipe == "F16"
    (out / "manifest.json").unlink()
    with pytest.raises(UsageError, match="is not what would replace it"):
        export(tiny_checkpoint, "raspberry-pi-5-8gb", **ask, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_artifact_that_disagrees_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    from edgekit.formats.gguf import conversion

    monkeypatch.setattr(conversion, "interleave_halves", lambda rows, _width: rows)
    with pytest.raises(DisagreementError, match="logits: mean KL"):
        export(
            tiny_checkpoint, "raspberry-pi-5-8gb", quant="F32", context_tokens=64,
            out=tmp_path / "out",
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_without_proof_the_manifest_says_so(tiny_checkpoint, tmp_path):
    bundle = export(
        tiny_checkpoint, "raspberry-pi-5-8gb", quant="F32", context_tokens=64,
        out=tmp_path / "out", verify=False,
    )  # fmt: skip
    assert bundle.agreement is None


def test_a_model_that_cannot_fit_is_refused_by_arithmetic(tiny_checkpoint, tmp_path):
    small = tmp_path / "thimble.toml"
    from edgekit.target import names

    assert "raspberry-pi-zero-2w" in names()
    text = _target_text("raspberry-pi-zero-2w")
    small.write_text(text.replace('artifact = { value = "150 MB"', 'artifact = { value = "1 kB"'))
    with pytest.raises(BudgetError, match=r"gguf Q2_K: .* > 1.* to download"):
        export(tiny_checkpoint, str(small), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _target_text(name):
    from edgekit import target

    return target._files()[name].read_text()


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_that_ends_an_export_leaves_nothing(tiny_checkpoint, tmp_path, name, status):
    """A real signal to a real process, while it converts."""
    program = (
        "import signal, sys, time, edgekit.formats.gguf.tensor_types as tensor_types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may ignore them
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from edgekit.cli import main\n"
        "slow = tensor_types.quantize_each\n"
        "def crawl(blocks, **kw):\n"
        "    for item in slow(blocks, **kw):\n"
        "        print('block', flush=True); time.sleep(0.2); yield item\n"
        "tensor_types.quantize_each = crawl\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "export", str(tiny_checkpoint), "--target",
         "raspberry-pi-5-8gb", "--quant", "F32", "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "block\n"
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "interrupted" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(tiny_checkpoint, tmp_path):
    program = (
        "import sys, time, edgekit.bundle.workdir as w\n"
        "from pathlib import Path\n"
        "with w.new_directory(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').write_text('x'); print('here', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    time.sleep(0)
    export(
        tiny_checkpoint, "raspberry-pi-5-8gb", quant="F32", context_tokens=64,
        out=tmp_path / "out", verify=False,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bundle_is_named_after_what_is_in_it(tiny_checkpoint, pi):
    checkpoint = open_checkpoint(tiny_checkpoint)
    made = make(checkpoint, pi, Choice(quant="Q4_0"))
    assert default_out(checkpoint, made, pi).as_posix() == (
        "bundles/tiny-llama-raspberry-pi-5-8gb-gguf-Q4_0"
    )


@pytest.mark.slow
def test_the_demo_model_says_paris(demo_bundle):
    from edgekit.run import run

    assert "Paris" in "".join(run(demo_bundle, "Name the capital of France.", max_tokens=24))


# Templates as people have them

SAID = "{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
DONE = "<|eot_id|>{% endfor %}"
FOR_TOOLS = "{% for tool in tools %}{% endfor %}" + SAID + "{{ m.content }}" + DONE
MORE = {"more": {"b": None, "a": [1]}, "brief": True}  # in an order of its own
# The setting, what is fixed, what transformers is told, the form of a message's content.
TEMPLATES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "for tools only": (
        [{"name": "tool_use", "template": FOR_TOOLS}], {}, {"tools": []}, "text",
    ),
    "parts": (
        SAID + "{% for p in m.content %}{{ p.text }}{% endfor %}" + DONE, {}, {}, "parts",
    ),
    "a variable": (
        "{% if brief %}{{ more | tojson }}{% endif %}" + SAID + "{{ m.content }}" + DONE,
        MORE, MORE, "text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_proven_and_run_as_transformers_calls_it(tiny_checkpoint, tmp_path, name):
    from transformers import AutoTokenizer

    setting, variables, called_with, form = TEMPLATES[name]
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": setting}))
    bundle = export(
        model, "raspberry-pi-5-8gb", quant="F16", context_tokens=128, out=tmp_path / "out",
        template_variables=variables,
    )  # fmt: skip
    assert verify(bundle.directory, model).passed
    content = "Hi" if form == "text" else [{"type": "text", "text": "Hi"}]
    asked = [{"role": "user", "content": content}]
    prompt = AutoTokenizer.from_pretrained(model).apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True, **called_with
    )
    assert "Hi" in prompt
    with Runner.open(bundle.directory) as runner:
        reply = answer(runner, "Hi", max_tokens=1)
        read = runner.text.tokenizer.decode(
            list(reply.generation.prompt_ids), skip_special_tokens=False
        )
    assert read == prompt


def test_a_stop_string_ends_answers_where_transformers_ends_them(tiny_checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def continued(**options):
        """Return what transformers says, with a stop string as the last of it if there is one."""
        said = network.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=40,
            do_sample=False,
            **options,
        )
        return tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    network = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    asked = torch.tensor([ids])
    whole = continued()
    stop = whole[len(whole) // 2 :][:3]
    ended = continued(stop_strings=[stop], tokenizer=tokenizer)
    assert stop in ended
    assert len(ended) < len(whole)

    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"stop_strings": stop}))
    bundle = export(
        model, "raspberry-pi-5-8gb", quant="F32", context_tokens=128, out=tmp_path / "out",
        verify=False,
    )  # fmt: skip
    assert bundle.text.stop_strings == (stop,)
    with Runner.open(bundle.directory) as runner:
        record = answer(runner, "Hi", max_tokens=40).answer
    assert (record.text, record.finish_reason) == (ended[: ended.index(stop)], "stop")
