"""Plans: arithmetic that is right to the byte, and reasons a person understands."""

import json
import math
from dataclasses import replace

import pytest

from edgekit import formats
from edgekit.errors import BudgetError, UsageError
from edgekit.formats import BuildRequest, GpuBuffer
from edgekit.formats.gguf import RECIPES, writing
from edgekit.plan import Choice, estimate, grounds, make, remarks, substitutions
from edgekit.target import WebGpuLimits
from edgekit.target import load as load_target
from edgekit.tests.needs import needs
from edgekit.tests.tiny.random_checkpoints import random_checkpoint


F32 = BuildRequest(recipe=RECIPES["F32"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three layers whose rows fill no block of 256, and whose head is the embedding."""
    return random_checkpoint(tmp_path_factory.mktemp("plan"), layers=3, context_tokens=256)


def with_budget(target, **limits):
    return replace(target, budget=replace(target.budget, **limits))


def test_the_most_faithful_recipe_that_fits_is_chosen(checkpoint, pi):
    assert make(checkpoint, pi).recipe.name == "Q8_0"


def test_a_plan_of_eight_bits_says_what_four_would_save(checkpoint, pi):
    made = make(checkpoint, pi, Choice(format="gguf"))
    assert made.recipe.name == "Q8_0"
    assert made.four_bit is not None
    assert made.four_bit.recipe.name == "Q4_0"  # and not Q2_K, whatever its rows fall back to
    (said,) = [line for line in remarks(made) if line.startswith("or gguf Q4_0: ")]
    assert "less faithful" in said
    assert make(checkpoint, pi, Choice(format="gguf", quant="Q4_0")).four_bit is None


def test_what_does_not_fit_is_listed_with_its_reason(checkpoint, pi):
    first = make(checkpoint, pi)
    tight = with_budget(pi, artifact_bytes=first.layout.artifact_bytes - 1)
    made = make(checkpoint, tight)
    assert made.recipe.name != "Q8_0"
    assert made.rejected[0].name == "gguf Q8_0"
    assert "to download" in made.rejected[0].misses[0]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"artifact_bytes": 1}, "to download"),
        ({"peak_memory_bytes": 1}, "of memory"),
        ({"decode_tokens_per_s": 1e9}, "tokens/s"),
    ],
)
def test_a_budget_nothing_fits_says_which_limit_for_every_candidate(checkpoint, pi, limits, reason):
    with pytest.raises(BudgetError) as refusal:
        make(checkpoint, with_budget(pi, **limits))
    lines = str(refusal.value).splitlines()[1:]
    candidates = sum(len(formats.get(name).DEFAULT_RECIPES) for name in pi.formats)
    assert len(lines) == candidates
    assert all(reason in line for line in lines)
    assert "smaller model" in refusal.value.hint


def test_a_misspelt_quant_gets_a_suggestion(checkpoint, pi):
    with pytest.raises(UsageError, match="no quant named 'Q4_KM'") as refusal:
        make(checkpoint, pi, Choice(quant="Q4_KM"))
    assert "Q4_K_M" in refusal.value.hint


def test_a_quant_may_be_written_in_lower_case(checkpoint, pi):
    assert make(checkpoint, pi, Choice(quant="q4_k_m")).recipe.name == "Q4_K_M"


def test_an_unknown_format_is_refused(checkpoint, pi):
    with pytest.raises(UsageError, match="no format named 'tflite'"):
        make(checkpoint, pi, Choice(format="tflite"))


def test_a_target_that_takes_only_formats_we_lack_says_what_we_have(checkpoint, pi):
    with pytest.raises(UsageError, match=r"this edgekit writes .*gguf"):
        make(checkpoint, replace(pi, formats=("tflite",)))


def test_a_context_beyond_the_model_is_refused_with_the_longest(checkpoint, pi):
    for asked in (300, 257, 0, -1):
        with pytest.raises(UsageError, match=f"{asked} tokens is not possible: at most 256"):
            make(checkpoint, pi, Choice(context_tokens=asked))
    for asked in (256, 1):
        made = make(checkpoint, pi, Choice(context_tokens=asked, quant="F32"))
        assert made.context_tokens == asked


def test_the_context_is_shortened_to_what_the_model_can_and_that_is_said(checkpoint, pi):
    made = make(checkpoint, pi)
    assert made.context_tokens == 256 < pi.budget.context_tokens
    assert any("context is 256 tokens" in note for note in made.notes)


def test_a_context_longer_than_the_budgets_is_not_taken_by_default(checkpoint, pi):
    made = make(checkpoint, with_budget(pi, context_tokens=200), Choice(quant="F32"))
    assert made.context_tokens == 200
    assert not any("context is" in note for note in made.notes)


def test_substitutions_are_told_with_their_cost(checkpoint, pi):
    made = make(checkpoint, pi, Choice(quant="Q4_K_M"))
    told = list(substitutions(made.layout))
    assert any("instead of Q4_K" in line and "KiB" in line for line in told)
    assert set(told) <= set(made.notes)


def test_an_embedding_that_is_not_the_head_is_not_read_for_every_token(checkpoint, pi):
    def rate(tied):
        spec = replace(checkpoint.spec, is_tied=tied, vocab_size=500_000)
        model = replace(checkpoint, spec=spec)
        layout = writing.lay_out(checkpoint, F32)
        big = [replace(p, size_bytes=10**9) if p.role == "token_embedding" else p
               for p in layout.placements]  # fmt: skip
        layout = replace(layout, placements=tuple(big))
        made = estimate(model, layout, pi, format="gguf", context_tokens=128)
        return made.decode_tokens_per_s.likely

    assert rate(tied=False) > 5 * rate(tied=True)


def test_a_longer_context_takes_more_memory_and_the_cache_is_exact(checkpoint, pi):
    layout = writing.lay_out(checkpoint, F32)
    use = writing.memory_use(checkpoint, layout, context_tokens=256, by_app=False)
    a = checkpoint.spec.attention
    assert use.cache_bytes == 3 * 256 * 2 * a.key_value_width * 2
    assert use.peak_bytes == (
        use.weights_bytes + use.cache_bytes + use.compute_bytes + use.runtime_bytes
    )


def test_a_speed_that_is_only_likely_missed_is_a_note_and_not_a_refusal(checkpoint, pi):
    rate = make(checkpoint, pi, Choice(quant="Q2_K")).estimate.decode_tokens_per_s
    made = make(
        checkpoint, with_budget(pi, decode_tokens_per_s=rate.likely * 1.1), Choice(quant="Q2_K")
    )
    assert any(note.startswith("may miss a limit") for note in made.notes)
    with pytest.raises(BudgetError):
        make(checkpoint, with_budget(pi, decode_tokens_per_s=rate.high * 1.1), Choice(quant="Q2_K"))


def test_what_most_likely_fits_comes_before_what_only_may(checkpoint, pi):
    best = make(checkpoint, pi, Choice(quant="Q8_0")).estimate.decode_tokens_per_s.likely
    made = make(checkpoint, with_budget(pi, decode_tokens_per_s=best * 1.01))
    assert made.recipe.name != "Q8_0"
    assert made.rejected[0].recipe.name == "Q8_0"
    assert not any(note.startswith("may miss") for note in made.notes)


def with_layout(monkeypatch, name, variants=(), **fields):
    """Let a format say more of what it lays out."""
    writing = formats.writing(name)
    lay_out = writing.lay_out

    def say_more(checkpoint, request):
        found = lay_out(checkpoint, replace(request, variant=None))
        return replace(found, **{"variant": request.variant, **fields})

    monkeypatch.setattr(writing, "lay_out", say_more)
    monkeypatch.setattr(formats.get(name), "VARIANTS", variants)


@pytest.mark.parametrize(
    ("granted", "reason"),
    [
        ({"max_binding_bytes": 999}, "token_embedding takes 1000 B > 999 B (maxStorageBuffer"),
        ({"max_buffer_bytes": 999}, "token_embedding takes 1000 B > 999 B (maxBufferSize)"),
        ({"has_shader_f16": False}, "shader-f16"),
        ({}, None),
    ],
)
def test_what_a_browser_does_not_grant_is_a_miss(checkpoint, pi, monkeypatch, granted, reason):
    with_layout(
        monkeypatch, "gguf", needs_shader_f16=True,
        largest_buffer=GpuBuffer(name="token_embedding", size_bytes=1000),
    )  # fmt: skip
    limits = WebGpuLimits(max_buffer_bytes=1000, max_binding_bytes=1000, has_shader_f16=True)
    browser = replace(pi, webgpu=replace(limits, **granted), formats=("gguf",))
    if reason is None:
        make(checkpoint, browser)
        return
    with pytest.raises(BudgetError) as refusal:
        make(checkpoint, browser)
    assert str(refusal.value).count(reason) == len(formats.get("gguf").DEFAULT_RECIPES)
    make(checkpoint, pi)  # no browser, no such limits


def test_a_target_takes_its_variant_of_a_format_and_a_user_another(checkpoint, pi, monkeypatch):
    with_layout(monkeypatch, "gguf", variants=("plain", "fancy"))
    assert make(checkpoint, pi).variant is None
    fancy = replace(pi, variants={"gguf": ("fancy", "plain")})
    assert make(checkpoint, fancy).variant == "fancy"
    assert make(checkpoint, fancy, Choice(variant="plain")).variant == "plain"


def test_a_variant_that_no_program_of_the_target_takes_is_refused(checkpoint, pi, monkeypatch):
    with_layout(monkeypatch, "gguf", variants=("plain", "fancy"))
    fancy = replace(pi, variants={"gguf": ("fancy",)})
    for format in (None, "gguf"):
        with pytest.raises(UsageError, match="takes the variant 'plain' of gguf") as said:
            make(checkpoint, fancy, Choice(variant="plain", format=format))
        assert said.value.hint == "gguf: fancy"


def test_a_variant_that_no_format_has_is_refused_with_those_there_are(checkpoint, pi, monkeypatch):
    with_layout(monkeypatch, "gguf", variants=("plain", "fancy"))
    with pytest.raises(UsageError, match="no variant 'nice'") as refusal:
        make(checkpoint, pi, Choice(variant="nice"))
    assert "gguf: plain, fancy" in refusal.value.hint
    assert make(checkpoint, pi, Choice(variant="fancy")).format == "gguf"
    with pytest.raises(UsageError, match="onnx has no variant 'fancy'"):
        make(checkpoint, pi, Choice(format="onnx", variant="fancy"))


def test_what_is_executed_elsewhere_is_told_with_what_it_needs(checkpoint):
    here, there = (
        make(checkpoint, load_target("android-high"), Choice(format="executorch", variant=variant))
        for variant in ("portable", "vulkan")
    )
    assert not any("not executed here" in note for note in here.notes)
    assert any("it needs an Android phone whose GPU has Vulkan" in note for note in there.notes)


# Speed


@pytest.fixture
def measured(pi):
    """A target of round numbers, with one prompt of 100 tokens and answers of 60."""
    limit = replace(pi.budget.first_token[0], prompt_tokens=100)
    return replace(
        with_budget(pi, first_token=(limit,), answer_tokens=60),
        decode_bandwidth_bytes_per_s=1e6, prefill_flop_per_s=1e9,
    )  # fmt: skip


def parameters_of(checkpoint):
    """Return how many numbers there are, and how many of them make up the embedding."""
    shapes = dict(checkpoint.spec.weights())
    return checkpoint.parameters, math.prod(shapes["token_embedding"])


@pytest.mark.parametrize(("answer_tokens", "filled"), [(60, 100 + 60 // 2), (600, 256)])
def test_a_token_takes_every_weight_and_the_cache_in_the_middle_of_an_answer(
    checkpoint, measured, answer_tokens, filled
):
    layout = writing.lay_out(checkpoint, F32)
    target = with_budget(measured, answer_tokens=answer_tokens)
    found = estimate(
        checkpoint, layout, target, format="gguf", context_tokens=256
    ).decode_tokens_per_s
    cache_bytes = filled * 3 * 2 * checkpoint.spec.attention.key_value_width * 2  # float16
    cost = formats.get("gguf").TENSOR_TYPES["F32"].decode_cost
    seconds = (4 * cost * parameters_of(checkpoint)[0] + cache_bytes) / 1e6 + 0.0002
    assert found.likely == pytest.approx(1 / seconds, rel=1e-9)
    assert found.low == pytest.approx(0.65 / seconds, rel=1e-9)
    assert found.high == pytest.approx(1.35 / seconds, rel=1e-9)


def test_a_token_takes_the_experts_it_uses_and_memory_holds_all_of_them(tmp_path, measured):
    from edgekit.source.checkpoint import Checkpoint
    from edgekit.tests.tiny import adapters
    from edgekit.tests.tiny.checkpoints import write_text_files

    fields = {
        "model_type": "lfm2_moe", "num_dense_layers": 1, "num_experts": 16, "vocab_size": 600,
        "moe_intermediate_size": 64, "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    paths = {
        used: adapters.write_base(tmp_path / str(used), num_experts_per_tok=used, **fields)
        for used in (2, 16)
    }
    for path in paths.values():
        write_text_files(path, "llama3")
    few, all_of_them = map(Checkpoint.open, paths.values())
    weights = [writing.lay_out(it, F32).artifact_bytes for it in (few, all_of_them)]
    assert weights[0] == weights[1]
    found = [
        estimate(it, writing.lay_out(it, F32), measured, format="gguf", context_tokens=64)
        for it in (few, all_of_them)
    ]
    assert found[0].memory.weights_bytes == found[1].memory.weights_bytes
    experts = 3 * 16 * 64 * few.spec.hidden_size
    cost = formats.get("gguf").TENSOR_TYPES["F32"].decode_cost
    longer_s = 1 / found[1].decode_tokens_per_s.likely - 1 / found[0].decode_tokens_per_s.likely
    assert longer_s == pytest.approx(4 * cost * experts * 14 / 16 / 1e6, rel=1e-6)


@pytest.mark.parametrize("by_token", [False, True])
def test_the_first_token_takes_two_flop_a_weight_and_token_of_the_prompt(
    checkpoint, measured, by_token
):
    layout = writing.lay_out(checkpoint, F32)
    found = estimate(
        checkpoint, replace(layout, reads_by_token=by_token), measured, format="gguf",
        context_tokens=256,
    )  # fmt: skip
    token_s = 1 / found.decode_tokens_per_s.likely
    every, embedding = parameters_of(checkpoint)
    read_s = token_s if by_token else 2 * (every - embedding) / 1e9
    [first] = found.first_token_s.items()
    assert first[0] == 100
    assert first[1].likely == pytest.approx(100 * read_s + token_s, rel=1e-9)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"artifact_bytes": 0}, "to download"), ({"peak_memory_bytes": 0}, "of memory")],
)
def test_what_takes_as_much_as_is_allowed_fits(checkpoint, pi, limits, reason):
    made = make(checkpoint, pi, Choice(quant="Q8_0")).estimate
    taken = {
        "artifact_bytes": made.artifact_bytes, "peak_memory_bytes": made.memory.peak_bytes,
    }  # fmt: skip
    [name] = limits
    assert make(checkpoint, with_budget(pi, **{name: taken[name]}), Choice(quant="Q8_0")).notes
    with pytest.raises(BudgetError, match=reason):
        make(checkpoint, with_budget(pi, **{name: taken[name] - 1}), Choice(quant="Q8_0"))


def test_a_first_token_that_comes_too_late_is_a_miss(checkpoint, pi):
    first = make(checkpoint, pi, Choice(quant="Q8_0")).estimate.first_token_s
    limit = pi.budget.first_token[0]
    late = replace(limit, limit_s=first[limit.prompt_tokens].low * 0.99)
    with pytest.raises(BudgetError, match=f"first token after .* for {limit.prompt_tokens} tokens"):
        make(checkpoint, with_budget(pi, first_token=(late,)), Choice(quant="Q8_0"))
    maybe = replace(limit, limit_s=first[limit.prompt_tokens].low * 1.01)
    made = make(checkpoint, with_budget(pi, first_token=(maybe,)), Choice(quant="Q8_0"))
    assert any(note.startswith("may miss a limit") for note in made.notes)


def with_tokenizer(directory, **fields):
    """Return a model in whose tokenizer.json some fields are others."""
    model = random_checkpoint(directory)
    path = model.text.tokenizer_json
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return model


def test_what_run_could_not_print_is_refused_before_a_format_is_chosen(pi, tmp_path):
    with pytest.raises(UsageError, match="a decoder edgekit does not know: none"):
        make(with_tokenizer(tmp_path, decoder=None), pi)


def test_where_llama_cpp_reads_text_otherwise_is_a_note(pi, tmp_path):
    model = with_tokenizer(tmp_path, normalizer={"type": "NFC"})
    notes = make(model, pi, Choice(format="gguf")).notes
    assert any("llama.cpp takes them as they are" in note for note in notes)


@pytest.mark.toolchain
@needs("llama_cpp")
def test_what_llama_cpp_cannot_read_goes_to_another_format(pi, tmp_path):
    cuts = [
        {"type": "Split", "pattern": {"Regex": "[a-m]+"}, "behavior": "MergedWithNext",
         "invert": False},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
    ]  # fmt: skip
    model = with_tokenizer(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": cuts})
    made = make(model, pi)
    assert made.format == "onnx"
    assert "llama.cpp reads text otherwise" in made.rejected[0].misses[0]


@pytest.mark.parametrize("name", ["raspberry-pi-5-8gb", "android-mid-8gb"])
def test_a_plan_says_what_its_speeds_rest_on(name):
    target = load_target(name)
    said = grounds(target)
    for figure in ("decode_bandwidth_bytes_per_s", "prefill_flop_per_s"):
        origin = target.origins[figure]
        assert origin.basis in said
        assert origin.source in said
        assert origin.date in said
