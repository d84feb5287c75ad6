"""The float32 interpreter against transformers, on every family."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.model.checkpoint_protocol import Tensor
from edgekit.model.rope import LinearScaling, Rope
from edgekit.model.spec import DecoderSpec, Layer
from edgekit.proof import interpreter, mixing
from edgekit.source.checkpoint import Checkpoint
from edgekit.tests.tiny.checkpoints import (
    CONTEXT_TOKENS,
    ORIGINAL_TOKENS,
    TINY,
    WINDOW_TOKENS,
    write_tiny_checkpoint,
)


pytestmark = pytest.mark.toolchain

# Past every window, and on both sides of the context before stretching, to the token.
LENGTHS = (200, 160, 65, 64, 40)


@pytest.fixture(autouse=True)
def _one_thread():
    """Several threads wait for each other longer than these sums take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_texts(vocabulary, lengths=LENGTHS, seed=1):
    import torch

    source = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=source).tolist() for n in lengths]


def ask_transformers(directory, texts):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in texts]


def compare(expected, found):
    """Return mean KL in nats and the share of positions with the same top token."""
    import torch

    p, q = (torch.cat([torch.tensor(x, dtype=torch.float64) for x in part]).log_softmax(-1)
            for part in (expected, found))  # fmt: skip
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    return divergence, (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_the_lengths_reach_past_every_edge():
    assert sum(LENGTHS) >= 500
    assert max(LENGTHS) <= CONTEXT_TOKENS
    assert {ORIGINAL_TOKENS, ORIGINAL_TOKENS + 1} < set(LENGTHS)
    assert max(LENGTHS) > 2 * WINDOW_TOKENS


@pytest.mark.parametrize("name", TINY)
def test_it_says_what_transformers_says(name, tmp_path):
    directory = write_tiny_checkpoint(tmp_path, name)
    checkpoint = Checkpoint.open(directory)
    texts = random_texts(checkpoint.spec.vocab_size)
    found = list(interpreter.logits(checkpoint, texts))
    divergence, agreement = compare(ask_transformers(directory, texts), found)
    assert divergence <= 1e-9  # measured: at most 3e-12
    assert agreement == 1.0


BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
LINEAR: dict[str, Any] = {
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
}
# Options of families that no kind above has.
VARIANTS: dict[str, dict[str, Any]] = {
    "apertus": {"attention_bias": True, "rope_parameters": None},
    "arcee": BIASED,
    "cohere": LINEAR | {"use_qk_norm": True},
    "cohere2": {"attention_bias": True, "sliding_window": 7},
    "ernie4.5": LINEAR | {"num_key_value_heads": 4},
    "exaone": BIASED | {"rope_parameters": None, "tie_word_embeddings": True},
    "exaone4": {
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma-2b": {"attention_bias": True},
    "glm": LINEAR | {"partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": False, "partial_rotary_factor": 0.25, "head_dim": 24},
    "granite4": LINEAR | {"attention_bias": True},
    "helium": BIASED,
    "hunyuan": {"attention_bias": True},
    "hyperclovax": BIASED | {"tie_word_embeddings": True},
    "internlm3": {
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 6.0},
    },
    "jais2": {"attention_bias": False, "mlp_bias": False},
    "ministral3": {"sliding_window": 9, "rope_parameters": None},
    "nemotron": BIASED | {"partial_rotary_factor": 0.75},
    "olmo2": {"attention_bias": True, "num_key_value_heads": 1},
    "olmo3": {"attention_bias": True},
    "phi": {"partial_rotary_factor": 0.4, "hidden_size": 80},
    "seed-oss": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    "starcoder2": {"use_bias": False, "tie_word_embeddings": False},
    "vaultgemma": {"attention_bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_option_of_a_family_counts_as_in_transformers(name, tmp_path):
    directory = write_tiny_checkpoint(tmp_path, name, **VARIANTS[name])
    checkpoint = Checkpoint.open(directory)
    texts = random_texts(checkpoint.spec.vocab_size, lengths=(120,))
    found = list(interpreter.logits(checkpoint, texts))
    divergence, agreement = compare(ask_transformers(directory, texts), found)
    assert divergence <= 1e-9
    assert agreement == 1.0


def test_a_sharded_bfloat16_checkpoint_is_read_in_float32(tmp_path):
    import torch

    directory = write_tiny_checkpoint(tmp_path, "gemma3", dtype=torch.bfloat16, shards=3)
    assert len(list(directory.glob("*.safetensors"))) >= 3
    checkpoint = Checkpoint.open(directory)
    for tensor in checkpoint.tensors.values():
        assert tensor.size_bytes == 2 * math.prod(tensor.shape)
    texts = random_texts(checkpoint.spec.vocab_size)
    found = list(interpreter.logits(checkpoint, texts))
    divergence, agreement = compare(ask_transformers(directory, texts), found)
    assert divergence <= 1e-9
    assert agreement == 1.0


def _without_windows(spec):
    return replace(spec, layers=tuple(replace(x, window_tokens=None) for x in spec.layers))


def _without_scaling(spec):
    ropes = (x.rope and replace(x.rope, scaling=None) for x in spec.layers)
    layers = zip(spec.layers, ropes, strict=True)
    return replace(spec, layers=tuple(replace(x, rope=rope) for x, rope in layers))


def _with_rope_everywhere(spec):
    rope = next(x.rope for x in spec.layers if x.rope)
    return replace(spec, layers=tuple(replace(x, rope=rope) for x in spec.layers))


def _one_token_wider(spec):
    layers = (
        replace(x, window_tokens=x.window_tokens and x.window_tokens + 1) for x in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def _attention(spec, **changes):
    return replace(spec, attention=replace(spec.attention, **changes))


MISTAKES = {
    ("mistral-window", "no window"): _without_windows,
    ("mistral-window", "a window one token wider"): _one_token_wider,
    ("llama3-rope-tied", "no rope scaling"): _without_scaling,
    ("phi3-longrope", "no rope scaling"): _without_scaling,
    ("gemma3-linear-rope", "no rope scaling"): _without_scaling,
    ("gemma3", "one rope for all layers"): _with_rope_everywhere,
    ("smollm3", "positions in every layer"): _with_rope_everywhere,
    ("gemma2", "no score cap"): lambda spec: _attention(spec, attn_logit_softcap=None),
    ("gemma2", "no logit cap"): lambda spec: replace(spec, final_logit_softcap=None),
    ("gemma2", "no embedding scale"): lambda spec: replace(spec, embedding_scale=1.0),
    ("gemma2", "norms without the one"): (
        lambda spec: replace(spec, norm=replace(spec.norm, unit_offset=False))
    ),
    ("gemma2-wide-heads", "scores scaled by the head"): (
        lambda spec: _attention(spec, softmax_scale=spec.attention.head_dim**-0.5)
    ),
    ("gemma2", "silu"): lambda spec: replace(spec, activation="silu"),
    ("llama-bias", "no attention bias"): (
        lambda spec: _attention(spec, has_qkv_bias=False, has_output_bias=False)
    ),
    ("llama-bias", "no mlp bias"): lambda spec: replace(spec, has_mlp_bias=False),
    ("qwen3", "no query and key norm"): lambda spec: _attention(spec, query_key_norm=None),
    ("stablelm-1.6b", "rms norm"): (
        lambda spec: replace(spec, norm=replace(spec.norm, kind="rms"))
    ),
    ("stablelm-1.6b", "no norm bias"): (
        lambda spec: replace(spec, norm=replace(spec.norm, has_bias=False))
    ),
    ("llama-linear-rope", "another factor"): lambda spec: _rescaled(spec, 2.0),
    ("granite-tied", "no embedding multiplier"): lambda spec: _multiplied(spec, embedding=1.0),
    ("granite-tied", "no query multiplier"): lambda spec: _multiplied(spec, query=1.0),
    ("granite-tied", "no residual multiplier"): lambda spec: _multiplied(spec, residual=1.0),
    ("granite-tied", "no logits multiplier"): lambda spec: _multiplied(spec, logits=1.0),
    ("granite", "no embedding multiplier"): lambda spec: _multiplied(spec, embedding=1.0),
    ("hyperclovax", "no residual multiplier"): lambda spec: _multiplied(spec, residual=1.0),
    ("hyperclovax", "no norms after attention and MLP"): (
        lambda spec: replace(spec, has_post_norms=False)
    ),
    ("granite4-nope", "positions"): (
        lambda spec: replace(spec, layers=(Layer(rope=Rope(width=16, theta=1e4)),) * 3)
    ),
    ("hunyuan", "norms before the rope"): lambda spec: _attention(
        spec, normalizes_after_rope=False
    ),
    ("hunyuan", "theta without alpha"): (
        lambda spec: replace(spec, layers=(Layer(rope=Rope(width=24, theta=1e4)),) * 3)
    ),
    ("ministral3", "queries that do not grow"): lambda spec: _attention(spec, query_growth=None),
    ("olmo3-yarn", "no rope scaling"): _without_scaling,
    ("exaone4-windows", "positions in every layer"): _with_rope_everywhere,
    ("cohere2", "positions in every layer"): _with_rope_everywhere,
    ("phi", "no bias of the head"): lambda spec: replace(spec, has_head_bias=False),
    ("nemotron", "norms without the one"): (
        lambda spec: replace(spec, norm=replace(spec.norm, unit_offset=False))
    ),
    ("apertus", "another activation"): lambda spec: replace(spec, activation="relu2"),
    ("arcee", "another activation"): lambda spec: replace(spec, activation="silu"),
}


def _multiplied(spec, **changes):
    return replace(spec, multipliers=replace(spec.multipliers, **changes))


def _rescaled(spec, factor):
    rope = replace(spec.layers[0].rope, scaling=LinearScaling(factor=factor))
    return replace(spec, layers=tuple(replace(layer, rope=rope) for layer in spec.layers))


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_trait_left_out_shows_in_the_logits(name, mistake, tmp_path):
    """So the agreement above proves each trait: nothing in the tiny models is neutral."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, name))
    wrong = replace(checkpoint, spec=MISTAKES[name, mistake](checkpoint.spec))
    texts = random_texts(checkpoint.spec.vocab_size, lengths=(100,))
    right = list(interpreter.logits(checkpoint, texts))
    divergence, _ = compare(right, list(interpreter.logits(wrong, texts)))
    assert divergence > 1e-4


NEIGHBOURS = ["ernie4.5", "ernie4.5-bias", "glm", "glm4", "cohere-norms", "helium"]


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_pairs_that_are_not_put_in_halves_show_in_the_logits(name, tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, name))
    texts = random_texts(checkpoint.spec.vocab_size, lengths=(100,))
    right = list(interpreter.logits(checkpoint, texts))
    monkeypatch.setattr(DecoderSpec, "rotated_pairs", lambda _spec, _role: None)
    divergence, _ = compare(right, list(interpreter.logits(checkpoint, texts)))
    assert divergence > 1e-4


@dataclass(frozen=True)
class Counted:
    """A tensor that tells when it is read."""

    tensor: Tensor
    name: str
    log: list[str] = field(repr=False)

    @property
    def shape(self):
        return self.tensor.shape

    @property
    def size_bytes(self):
        return self.tensor.size_bytes

    def read(self, first_row=0, rows=None):
        self.log.append(self.name)
        return self.tensor.read(first_row, rows)


def test_each_layer_is_read_once_whatever_the_number_of_texts(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, "qwen3"))
    log: list[str] = []
    counted = {name: Counted(tensor, name, log) for name, tensor in checkpoint.tensors.items()}
    texts = random_texts(checkpoint.spec.vocab_size, lengths=(5, 6, 7))
    list(interpreter.logits(replace(checkpoint, tensors=counted), texts))
    reads = [name for name in log if ".layers." in name]
    assert set(Counter(reads).values()) == {1}
    order = [int(name.split(".")[2]) for name in reads]
    assert order == sorted(order)


def test_logits_do_not_depend_on_the_block_sizes(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, "qwen2-window"))
    texts = random_texts(checkpoint.spec.vocab_size, lengths=(100,))
    whole = list(interpreter.logits(checkpoint, texts))
    monkeypatch.setattr(mixing, "QUERY_BLOCK_TOKENS", 7)
    monkeypatch.setattr(interpreter, "HEAD_BLOCK_BYTES", 4096)
    divergence, _ = compare(whole, list(interpreter.logits(checkpoint, texts)))
    assert divergence < 1e-12
    assert whole[0].shape == (100, checkpoint.spec.vocab_size)


def test_a_text_the_model_cannot_read_is_refused_before_any_work(tmp_path):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path, "llama"))
    for ids, message in [
        ([], "has 0 tokens"),
        ([1] * (CONTEXT_TOKENS + 1), f"has {CONTEXT_TOKENS + 1} tokens"),
        ([1, checkpoint.spec.vocab_size], f"token id {checkpoint.spec.vocab_size}"),
        ([-1, 3], "token id -1"),
    ]:
        with pytest.raises(UsageError, match=message):
            next(interpreter.logits(checkpoint, [[1], ids]))


def test_a_weight_that_is_not_a_number_is_refused_by_name(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    path = write_tiny_checkpoint(tmp_path, "llama") / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, path)
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* NaN"):
        next(interpreter.logits(Checkpoint.open(tmp_path), [[1, 2]]))
