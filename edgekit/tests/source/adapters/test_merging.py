import json
import re
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.proof import transformers_logits
from edgekit.quant.rounding import bfloat16, from_bfloat16
from edgekit.source.adapters import merging
from edgekit.source.checkpoint import Checkpoint
from edgekit.source.made_tensors import stored_dtype
from edgekit.source.writer import write_checkpoint
from edgekit.tests.tiny import adapters as tiny


np = pytest.importorskip("numpy")

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tied") / "base"
    return Checkpoint.open(tiny.write_base(directory, tie_word_embeddings=True))


def record(merged):
    assert merged.adapter is not None
    return merged.adapter


def random(*shape, seed=5):
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def test_a_plain_adapter_adds_its_scaled_product(base, tmp_path):
    updates = tiny.q_proj_updates()
    merged = merging.merge(base, tiny.write_adapter(tmp_path / "a", updates))
    delta = 2.0 * updates[f"{Q0}.lora_B.weight"] @ updates[f"{Q0}.lora_A.weight"]
    expected = base.tensors[f"{Q0}.weight"].read() + delta
    np.testing.assert_allclose(merged.weight("layers.0.query"), expected, rtol=1e-6)
    assert merged.tensors["model.norm.weight"] is base.tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 8 / 4),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2),  # the square root of the rank
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 3}}, 3 / 4),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 3}, "use_rslora": True}, 3 / 2),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {"q_proj": 4}, "use_rslora": True}, 8 / 2),
    ],
)
def test_the_product_is_scaled_by_alpha_over_the_rank_or_its_square_root(
    base, tmp_path, config, scale
):
    updates = tiny.q_proj_updates(rank=4)
    merged = merging.merge(base, tiny.write_adapter(tmp_path / "a", updates, **config))
    delta = scale * updates[f"{Q0}.lora_B.weight"] @ updates[f"{Q0}.lora_A.weight"]
    expected = base.tensors[f"{Q0}.weight"].read() + delta
    np.testing.assert_allclose(merged.weight("layers.0.query"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("excluded", "layers"),
    [(r".*\.0\..*q_proj", [1]), (r"model\.layers", [0, 1]), (["proj"], [0, 1])],
)
def test_a_module_is_excluded_by_a_pattern_for_all_of_its_name_or_by_the_name_of_a_part(
    base, tmp_path, excluded, layers
):
    updates = tiny.q_proj_updates()
    given = {name: values for name, values in updates.items() if int(name.split(".")[2]) in layers}
    merged = merging.merge(
        base, tiny.write_adapter(tmp_path / "a", given, exclude_modules=excluded)
    ).tensors
    changed = [n for n, q in enumerate((Q0, Q1))
               if merged[f"{q}.weight"] is not base.tensors[f"{q}.weight"]]  # fmt: skip
    assert changed == layers


def test_reading_some_rows_gives_the_rows_of_the_whole(base, tmp_path):
    updates = tiny.q_proj_updates()
    updates |= {f"{q}.lora_magnitude_vector": random(16) for q in (Q0, Q1)}
    directory = tiny.write_adapter(tmp_path / "a", updates, use_dora=True)
    tensor = merging.merge(base, directory).tensors[f"{Q0}.weight"]
    np.testing.assert_array_equal(tensor.read(3, 5), tensor.read()[3:8])


def test_two_adapters_are_stacked_in_their_order(base, tmp_path):
    one = tiny.write_adapter(tmp_path / "one", tiny.q_proj_updates(seed=1))
    two = tiny.write_adapter(tmp_path / "two", tiny.q_proj_updates(seed=2))
    merged = merging.merge(merging.merge(base, one), two)
    alone = [merging.merge(base, directory).weight("layers.1.query") for directory in (one, two)]
    expected = alone[0] + alone[1] - base.weight("layers.1.query")
    np.testing.assert_allclose(merged.weight("layers.1.query"), expected, atol=1e-6)
    assert record(merged).name == "one + two"
    swapped = merging.merge(merging.merge(base, two), one)
    assert record(merged).sha256 != record(swapped).sha256


@pytest.mark.parametrize("spelling", ["lora_{}.weight", "lora_{}.default.weight", "lora_{}"])
def test_names_mean_the_same_with_and_without_the_adapters_name(base, tmp_path, spelling):
    updates = tiny.q_proj_updates()
    renamed = {
        re.sub(r"lora_(.)\.weight", lambda found: spelling.format(found[1]), name): values
        for name, values in updates.items()
    }
    merged = merging.merge(base, tiny.write_adapter(tmp_path / "a", renamed))
    usual = merging.merge(base, tiny.write_adapter(tmp_path / "b", updates))
    np.testing.assert_array_equal(merged.weight("layers.0.query"), usual.weight("layers.0.query"))


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [("q_proj", 6), (r"layers\.0\.self_attn\.q_proj", 6), ("^" + Q0.replace(".", r"\."), 6),
     ("proj", 4), ("self_attn", 4), (r"layers\.1\..*", 4)],
)  # fmt: skip
def test_a_rank_pattern_matches_whole_parts_of_a_name(base, tmp_path, pattern, rank):
    updates = tiny.q_proj_updates(rank=rank) | {
        name: values for name, values in tiny.q_proj_updates(rank=4).items() if ".1." in name
    }
    config: dict[str, Any] = {"rank_pattern": {pattern: 6}}
    if pattern == "q_proj":
        updates = tiny.q_proj_updates(rank=6)
    if ".1" in pattern:
        updates = updates | {
            name: values for name, values in tiny.q_proj_updates(rank=6).items() if ".1." in name
        }
    merged = merging.merge(base, tiny.write_adapter(tmp_path / "a", updates, **config))
    down, up = updates[f"{Q0}.lora_A.weight"], updates[f"{Q0}.lora_B.weight"]
    delta = merged.weight("layers.0.query") - base.weight("layers.0.query")
    np.testing.assert_allclose(delta, 8 / rank * up @ down, atol=1e-6)


def test_an_adapter_on_the_embedding_unties_it_and_says_so(tied_base, tmp_path):
    updates = {
        "model.embed_tokens.lora_embedding_A": random(4, 40),
        "model.embed_tokens.lora_embedding_B": random(16, 4),
    }
    directory = tiny.write_adapter(tmp_path / "a", updates, target_modules=["embed_tokens"])
    merged = merging.merge(tied_base, directory)
    assert not merged.spec.is_tied
    before = tied_base.weight("token_embedding")
    np.testing.assert_array_equal(merged.weight("output_head"), before)
    assert np.abs(merged.weight("token_embedding") - before).max() > 0.1
    assert any("no longer tied" in note for note in record(merged).notes)


def test_two_versions_of_a_tied_matrix_are_refused_when_read(tied_base, tmp_path):
    tensors = tiny.q_proj_updates() | {EMBEDDING: random(40, 16), HEAD: random(40, 16, seed=6)}
    merged = merging.merge(tied_base, tiny.write_adapter(tmp_path / "a", tensors))
    with pytest.raises(UsageError, match=r"two versions.*lm_head"):
        merged.weight("token_embedding")


def test_the_head_stays_what_a_saved_embedding_was_a_copy_of(tied_base, tmp_path):
    saved, original = random(41, 16), random(41, 16, seed=6)
    tensors = tiny.q_proj_updates() | {
        EMBEDDING: saved,
        "model.embed_tokens.modules_to_save.default.weight": saved,
        "model.embed_tokens.original_module.weight": original,
    }
    directory = tiny.write_adapter(tmp_path / "a", tensors, modules_to_save=["embed_tokens"])
    tiny.write_tokenizer(directory, words=[*tiny.WORDS, "<a>"])
    merged = merging.merge(tied_base, directory)
    np.testing.assert_array_equal(merged.weight("token_embedding"), saved)
    np.testing.assert_array_equal(merged.weight("output_head"), original)


def test_a_grown_vocabulary_needs_its_tokenizer(tied_base, tmp_path):
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates() | {EMBEDDING: random(42, 16)}
    )
    with pytest.raises(UsageError, match=r"from 40 to 42 tokens.*no tokenizer\.json"):
        merging.merge(tied_base, directory)
    tiny.write_tokenizer(directory, words=[*tiny.WORDS, "<a>", "<b>"])
    merged = merging.merge(tied_base, directory)
    assert merged.spec.vocab_size == 42
    assert merged.spec.is_tied
    own = (directory / "tokenizer.json").read_bytes()
    assert merged.text.tokenizer_json.read_bytes() == own


def test_tokens_of_a_tied_head_that_the_file_lacks_are_missed(tied_base, tmp_path):
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": random(2, 16)}
    directory = tiny.write_adapter(
        tmp_path / "a",
        tiny.q_proj_updates() | rows,
        trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [20]},
    )
    assert "'lm_head'" in refusal(tied_base, directory)


def test_the_adapters_tokenizer_keeps_the_stop_ids_of_the_base(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    tiny.write_tokenizer(directory, template="adapted {{ messages }}")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    text = merging.merge(base, directory).text
    assert text.chat_template == "adapted {{ messages }}"
    assert text.declared_stop_ids == (1, 2)


def test_a_template_without_a_tokenizer_replaces_the_bases(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    (directory / "chat_template.jinja").write_text("{{ 'new' }}")
    merged = merging.merge(base, directory)
    assert merged.text.chat_template == "{{ 'new' }}"
    own = base.text.tokenizer_json.read_bytes()
    assert merged.text.tokenizer_json.read_bytes() == own


def test_an_adapter_of_a_quantized_base_is_merged_with_a_note(base, tmp_path):
    name = "unsloth/SmolLM2-135M-bnb-4bit"
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(), base_model_name_or_path=name
    )
    (note,) = record(merging.merge(base, directory)).notes
    assert name in note


def test_a_base_of_another_name_is_noted(base, tmp_path):
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(), base_model_name_or_path="org/SmolLM2-135M"
    )
    (note,) = record(merging.merge(base, directory)).notes
    assert note == "the adapter names 'org/SmolLM2-135M' as its base and is merged into 'base'"


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("SmolLM2-135M", "/home/someone/models/SmolLM2-135M/"),
        ("SmolLM2-135M", "C:\\models\\smollm2_135m"),
        ("SmolLM2-135M-bf16", "HuggingFaceTB/SmolLM2-135M"),
        ("SmolLM2-135M", "unsloth/smollm2-135m-hf"),
        ("models--org--SmolLM2-135M/snapshots/0f3a", "org/SmolLM2-135M"),
    ],
)
def test_a_base_of_the_same_name_somewhere_else_is_not_noted(tmp_path, directory, name):
    base = Checkpoint.open(tiny.write_base(tmp_path / directory))
    adapter = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(), base_model_name_or_path=name
    )
    assert record(merging.merge(base, adapter)).notes == ()


@pytest.mark.parametrize("zero", ["lora_A", "lora_B"])
def test_an_adapter_that_changes_nothing_is_noted(base, tmp_path, zero):
    updates = tiny.q_proj_updates()
    updates |= {name: np.zeros_like(it) for name, it in updates.items() if zero in name}
    notes = record(merging.merge(base, tiny.write_adapter(tmp_path / "a", updates))).notes
    assert notes == ("the adapter's low-rank updates change nothing: a factor of each is zero",)


def test_float64_is_read_as_float32_and_noted(base, tmp_path):
    updates = tiny.q_proj_updates() | {"lm_head.weight": random(40, 16)}
    config: dict[str, Any] = {"modules_to_save": ["lm_head"]}
    directory = tiny.write_adapter(tmp_path / "a", updates, dtype="F64", **config)
    merged = merging.merge(base, directory)
    usual = merging.merge(base, tiny.write_adapter(tmp_path / "b", updates, **config))
    np.testing.assert_array_equal(merged.weight("layers.0.query"), usual.weight("layers.0.query"))
    assert record(merged).notes == ("the adapter stores float64, which is read as float32",)
    written = Checkpoint.open(write_checkpoint(merged, tmp_path / "out"))
    np.testing.assert_array_equal(written.weight("output_head"), updates["lm_head.weight"])


def hint(base, directory):
    with pytest.raises(UsageError) as refused:
        merging.merge(base, directory)
    return refused.value.hint


def test_directories_around_an_adapter_are_told_from_it(base, tmp_path):
    run = tmp_path / "run"
    for step in (90, 1000, 500):
        tiny.write_adapter(run / f"checkpoint-{step}", tiny.q_proj_updates())
    others = "or another in there: checkpoint-500, checkpoint-90"
    assert hint(base, run) == f"pass --adapter {run / 'checkpoint-1000'}, {others}"
    named = tiny.write_adapter(tmp_path / "parent" / "french", tiny.q_proj_updates())
    assert hint(base, named.parent) == f"pass --adapter {named}"
    assert (
        hint(base, named / "adapter_model.safetensors") == f"pass its directory: --adapter {named}"
    )
    assert hint(base, base.directory).startswith("it is a model: pass it as MODEL")
    assert hint(base, tmp_path / "org" / "name").startswith("there is no such directory")
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    assert hint(base, tmp_path / "lora.gguf").startswith("it is llama.cpp's form of one")


def test_parameters_that_were_not_gathered_are_refused_with_the_way_out(base, tmp_path):
    updates = tiny.q_proj_updates() | {f"{Q0}.lora_A.weight": np.zeros((0,))}
    directory = tiny.write_adapter(tmp_path / "a", updates)
    assert "1 empty tensors" in refusal(base, directory)
    assert "stage3_gather" in hint(base, directory)


def test_an_adapters_generation_settings_are_the_models(tmp_path):
    base = Checkpoint.open(tiny.write_base(tmp_path / "base"))
    (base.directory / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.9}')
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    assert merging.merge(base, directory).sampling.temperature == 0.7
    (directory / "generation_config.json").write_text('{"temperature": 0.3}')
    sampling = merging.merge(base, directory).sampling
    assert (sampling.temperature, sampling.top_p) == (0.3, None)


def test_an_adapter_in_the_place_of_a_model_is_told_from_one(base, tmp_path):
    def hint_as_model(directory):
        with pytest.raises(UsageError) as refused:
            Checkpoint.open(directory)
        return refused.value.hint

    adapter = tiny.write_adapter(tmp_path / "run" / "checkpoint-7", tiny.q_proj_updates())
    said = "it is an adapter: pass its base as MODEL (it names 'somewhere/base')"
    assert hint_as_model(adapter) == f"{said} and this with --adapter"
    assert hint_as_model(adapter.parent).endswith(f"--adapter {adapter}")
    config = base.directory / "config.json"
    (adapter / "config.json").write_bytes(config.read_bytes())  # as some training tools do
    assert hint_as_model(adapter).startswith(said)
    model = tiny.write_base(tmp_path / "full" / "checkpoint-20")
    assert hint_as_model(model.parent) == f"pass {model}"


def test_trained_tokens_that_no_tokenizer_knows_are_refused(tmp_path):
    base = Checkpoint.open(tiny.write_base(tmp_path / "base", vocab_size=64))
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": random(1, 16)}
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates() | rows, trainable_token_indices=[40]
    )
    assert "trains the token 40, which" in refusal(base, directory)
    (directory / "added_tokens.json").write_text('{"<call>": 40}')
    assert merging.merge(base, directory).spec.vocab_size == 64


def test_a_new_token_without_a_row_is_refused_unless_it_only_pads(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    (directory / "added_tokens.json").write_text('{"<call>": 40}')
    assert "'<call>', id 40, and the merged model has 40 rows" in refusal(base, directory)
    (directory / "special_tokens_map.json").write_text('{"pad_token": "<call>"}')
    assert (
        "for which the model has no row: <call>" in record(merging.merge(base, directory)).notes[-1]
    )


def refusal(base, directory):
    with pytest.raises(UsageError) as refused:
        merging.merge(base, directory)
    return str(refused.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("PREFIX_TUNING", "prefix tuning"), ("PROMPT_TUNING", "prompt tuning"),
     ("P_TUNING", "p-tuning"), ("XLORA", "X-LoRA"), ("LILY", "Lily")],
)  # fmt: skip
def test_what_changes_no_weight_is_refused_by_name(base, tmp_path, kind, name):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates(), peft_type=kind)
    with pytest.raises(UsageError, match=f"{name!r}, which changes no weight") as refused:
        merging.merge(base, directory)
    assert "rsLoRA" in refused.value.hint


@pytest.mark.parametrize(
    ("kind", "name"),
    [("OSF", "OSF"), ("PSOFT", "PSOFT"), ("ADAMSS", "AdaMSS"), ("SOMETHING_NEW", "SOMETHING_NEW")],
)
def test_another_kind_is_refused_with_the_lines_that_merge_it(base, tmp_path, kind, name):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates(), peft_type=kind)
    with pytest.raises(UsageError, match=re.escape(repr(name))) as refused:
        merging.merge(base, directory)
    assert refused.value.hint.endswith(
        "base = AutoModelForCausalLM.from_pretrained('somewhere/base'); "
        f"PeftModel.from_pretrained(base, '{directory}').merge_and_unload().save_pretrained('DIR')"
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [("use_qalora", True), ("alora_invocation_tokens", [3, 4]), ("layer_replication", [[0]]),
     ("layer_replication", [[0, 3]]), ("layer_replication", 2), ("use_bdlora", {"nblocks": 2}),
     ("kasa_config", {"beta": 1.0}), ("arrow_config", {"top_k": 2}), ("an_option_of_2027", 1),
     ("task_type", "SEQ_CLS"), ("bias", "some"), ("init_lora_weights", "pissa_niter_4"),
     ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
     ("target_modules", "q_proj("), ("trainable_token_indices", [-1]), ("r", 0),
     ("rank_pattern", {"q_proj": "4"}), ("rank_pattern", {"q_proj": 0.5}),
     ("alpha_pattern", {"q_proj": float("inf")}), ("modules_to_save", [1])],
)  # fmt: skip
def test_an_option_that_is_not_merged_is_refused_by_name(base, tmp_path, option, value):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates(), **{option: value})
    message = refusal(base, directory)
    assert option in message or str(value) in message


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_how_training_started_does_not_matter_where_the_base_is_the_same(base, tmp_path, start):
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(), init_lora_weights=start, eva_config={"rho": 2.0}
    )
    assert record(merging.merge(base, directory)).name == "a"


def test_a_deeper_base_is_refused_with_both_depths(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates(layers=1))
    message = refusal(base, directory)
    assert "is for 1 layers" in message
    assert "has 2" in message


def test_a_shallower_base_is_refused_with_both_depths(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates(layers=3))
    message = refusal(base, directory)
    assert "at least 3 layers" in message
    assert "has 2" in message


def test_a_base_of_another_width_is_refused_with_both_shapes(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates(hidden=24))
    message = refusal(base, directory)
    assert "[4, 24]" in message
    assert "[4, 16]" in message


def test_a_base_with_other_modules_is_refused_by_name(base, tmp_path):
    updates = {
        name.replace("q_proj", "query_key_value"): values
        for name, values in tiny.q_proj_updates().items()
    }
    directory = tiny.write_adapter(tmp_path / "a", updates, target_modules=["query_key_value"])
    assert "query_key_value" in refusal(base, directory)


@pytest.mark.parametrize(
    ("extra", "config", "expected"),
    [
        ({f"{Q0}.lora_C.weight": (4, 4)}, {}, "lora_C"),
        ({f"{Q0}.hada_w1_a": (4, 4)}, {}, "hada_w1_a"),
        ({f"{Q0}.lora_A.other.weight": (4, 16)}, {}, "twice"),
        ({f"{Q0}.lora_magnitude_vector": (16,)}, {}, "lora_magnitude_vector"),
        ({}, {"use_dora": True}, "lora_magnitude_vector"),
        ({f"{Q0}.bias": (16,)}, {"bias": "all"}, "has a bias"),
        ({"model.norm.weight": (17,)}, {}, r"\[17\]"),
        ({"lm_head.weight": (44, 16)}, {}, "44"),
        ({}, {"modules_to_save": ["lm_head"]}, "lm_head"),
        ({}, {"target_modules": ["q_proj", "v_proj"]}, "v_proj"),
        ({}, {"target_modules": ["v_proj"]}, "v_proj"),
        ({}, {"layers_to_transform": [1]}, r"layers\.0.*does not target"),
        ({}, {"trainable_token_indices": [3]}, "lacks them"),
        ({"model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 16)}, {}, "which"),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 16)},
            {"trainable_token_indices": [40]},
            "token 40",
        ),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 16)},
            {"trainable_token_indices": [3, 4]},
            r"\[2, 16\]",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(base, tmp_path, extra, config, expected):
    tensors = tiny.q_proj_updates() | {name: random(*shape) for name, shape in extra.items()}
    directory = tiny.write_adapter(tmp_path / "a", tensors, **config)
    assert re.search(expected, refusal(base, directory))


def test_a_pickle_is_refused_with_the_way_out(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"no adapter_model\.safetensors") as refused:
        merging.merge(base, directory)
    assert "save_pretrained" in refused.value.hint


def test_a_directory_without_an_adapter_is_refused(base, tmp_path):
    assert "no adapter_config.json" in refusal(base, tmp_path)


def test_a_merged_nan_is_refused_by_name(base, tmp_path):
    updates = tiny.q_proj_updates()
    updates[f"{Q1}.lora_B.weight"][0, 0] = np.nan
    merged = merging.merge(base, tiny.write_adapter(tmp_path / "a", updates))
    with pytest.raises(UsageError, match=Q1):
        merged.weight("layers.1.query")


def test_a_bias_that_the_family_cannot_have_is_refused(tmp_path):
    base = Checkpoint.open(tiny.write_base(tmp_path / "base", model_type="qwen2"))
    module = "model.layers.{}.mlp.up_proj"
    updates: dict[str, Any] = {}
    for layer in range(2):
        updates |= {
            f"{module.format(layer)}.lora_A.weight": random(4, 16),
            f"{module.format(layer)}.lora_B.weight": random(24, 4),
            f"{module.format(layer)}.lora_B.bias": random(24),
        }
    directory = tiny.write_adapter(
        tmp_path / "a", updates, target_modules=["up_proj"], lora_bias=True
    )
    assert "up_proj" in refusal(base, directory)


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_a_damaged_adapter_is_refused_and_never_crashes(base, tmp_path, count):
    seed = np.random.default_rng(7)
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    whole = {path: path.read_bytes() for path in directory.iterdir()}
    refused = 0
    for _ in range(count):
        for path, data in whole.items():
            damaged = bytearray(
                data[: seed.integers(1, len(data))] if seed.random() < 0.2 else data
            )
            for position in seed.integers(0, min(len(damaged), 900), size=2):
                damaged[position] = seed.integers(0, 256)
            path.write_bytes(damaged)
        try:
            merging.merge(base, directory)
        except UsageError:
            refused += 1
    assert refused > count * 2 // 3


def test_a_sixteen_bit_base_is_merged_in_float32_and_rounded_once(tmp_path):
    base = Checkpoint.open(tiny.write_base(tmp_path / "base", dtype="BF16"))
    updates = tiny.q_proj_updates()
    merged = merging.merge(base, tiny.write_adapter(tmp_path / "a", updates))
    write_checkpoint(merged, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out").tensors[f"{Q0}.weight"]
    delta = np.float32(2) * (updates[f"{Q0}.lora_B.weight"] @ updates[f"{Q0}.lora_A.weight"])
    exact = base.tensors[f"{Q0}.weight"].read() + delta
    assert stored_dtype(written) == "BF16"
    expected = from_bfloat16(bfloat16(exact))
    np.testing.assert_array_equal(written.read(), expected)
    assert np.abs(expected - base.tensors[f"{Q0}.weight"].read()).max() > 0.1


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
QWEN2 = {"model_type": "qwen2"}
GEMMA2 = {
    "model_type": "gemma2", "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 32,
}  # fmt: skip
PHI3 = {"model_type": "phi3", "pad_token_id": 0, "bos_token_id": 1}
MUP = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}  # fmt: skip
# What a family does to the numbers or names of its weights on their way to a decoder.
FAMILIES: dict[str, dict[str, Any]] = {
    "multipliers": {"model_type": "granite", **MUP},
    "multipliers, tied": {"model_type": "granite", **MUP, **TIED},
    "a shared expert": {
        "model_type": "granitemoehybrid", **MUP, "shared_intermediate_size": 24,
        "num_local_experts": 0, "num_experts_per_tok": 0, "layer_types": ["full_attention"] * 2,
        "mamba_n_heads": 1, "position_embedding_type": "rope",
    },
    "neighbours": {"model_type": "ernie4_5", "head_dim": 6, "use_bias": True},
    "neighbours in part, fused": {"model_type": "glm4", "head_dim": 8, "pad_token_id": 0},
    "neighbours, norms of heads": {
        "model_type": "cohere", "use_qk_norm": True, "logit_scale": 0.3, "bos_token_id": 1,
    },
    "other names": {"model_type": "exaone"},
    "xIELU": {"model_type": "apertus", "pad_token_id": 0},
    "one norm for all heads": {"model_type": "olmo2"},
    "a bias of the head": {"model_type": "phi", "num_key_value_heads": 2},
    "linears beside experts": {
        "model_type": "lfm2_moe", "num_dense_layers": 1, "num_experts": 4, "bos_token_id": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "pad_token_id": 0,
        "layer_types": ["conv", "full_attention"], "tie_word_embeddings": False,
    },
}  # fmt: skip
# name: (base, what PEFT is asked for, whether the result is tied)
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "all projections": (UNTIED, {"target_modules": ALL}, False),
    "all-linear": (TIED, {"target_modules": "all-linear"}, True),
    "alpha": (TIED, {"target_modules": ["v_proj"], "lora_alpha": 32}, True),
    "a pattern": (UNTIED, {"target_modules": r".*\.1\..*(up|down)_proj"}, False),
    "excluded modules": (
        UNTIED,
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0\..*q_proj"},
        False,
    ),
    "some layers": (UNTIED, {"target_modules": ["q_proj"], "layers_to_transform": [1]}, False),
    "some layers by pattern": (
        UNTIED,
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        False,
    ),
    "rank and alpha patterns": (
        UNTIED,
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {r"^model\.layers\.0\..*": 24, "v_proj": 3},
        },
        False,
    ),
    "rsLoRA": (
        UNTIED,
        {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"k_proj": 2}},
        False,
    ),
    "DoRA": (UNTIED, {"target_modules": ALL, "use_dora": True}, False),
    "DoRA and rsLoRA": (
        QWEN2,
        {"target_modules": ALL, "use_dora": True, "use_rslora": True},
        False,
    ),
    "DoRA on embedding and head": (
        UNTIED,
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        False,
    ),
    "fan_in_fan_out": (UNTIED, {"target_modules": ["q_proj"], "fan_in_fan_out": True}, False),
    "biases of targets": (QWEN2, {"target_modules": ["q_proj"], "bias": "lora_only"}, False),
    "all biases": (
        UNTIED | {"attention_bias": True, "mlp_bias": True},
        {"target_modules": ["q_proj"], "bias": "all"},
        False,
    ),
    "lora_bias": (QWEN2, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, False),
    "lora_bias on a base without": (
        UNTIED,
        {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
        False,
    ),
    "saved norms": (UNTIED, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, False),
    "a saved block": (
        UNTIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "input_layernorm"]},
        False,
    ),
    "saved embedding": (
        UNTIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        False,
    ),
    "saved embedding, tied": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        False,
    ),
    "saved head, tied": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        False,
    ),
    "saved embedding and head, tied": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        False,
    ),
    "saved embedding, kept tied": (
        TIED,
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        True,
    ),
    "embedding": (UNTIED, {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "embedding, tied": (TIED, {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "head": (UNTIED, {"target_modules": ["lm_head"]}, False),
    "head, tied": (TIED, {"target_modules": ["lm_head"]}, False),
    "embedding and head, tied": (TIED, {"target_modules": ["embed_tokens", "lm_head"]}, False),
    "embedding and head, kept tied": (
        TIED,
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        True,
    ),
    "some tokens": (
        UNTIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 39]},
        False,
    ),
    "some tokens, tied": (
        TIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 39]},
        True,
    ),
    "tokens of embedding and head": (
        UNTIED,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [20]},
        },
        False,
    ),
    "the same tokens of both, tied": (
        TIED,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]},
        },
        True,
    ),
    "other tokens of the head, tied": (
        TIED,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [20]},
        },
        False,
    ),
    "tokens of the head, tied": (
        TIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [20]}},
        False,
    ),
    "PiSSA": (UNTIED, {"target_modules": ALL, "init_lora_weights": "pissa"}, False),
    "PiSSA of several ranks": (
        TIED,
        {
            "target_modules": ["q_proj", "embed_tokens"],
            "init_lora_weights": "pissa",
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "lora_alpha": 3,
        },
        False,
    ),
    "PiSSA with DoRA": (
        UNTIED,
        {"target_modules": ["up_proj"], "init_lora_weights": "pissa", "use_dora": True},
        False,
    ),
    "OLoRA": (UNTIED, {"target_modules": ALL, "init_lora_weights": "olora"}, False),
    "OLoRA, rank-stabilized": (
        TIED,
        {"target_modules": ["down_proj"], "init_lora_weights": "olora", "use_rslora": True},
        True,
    ),
    "parameters": (
        UNTIED,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.down_proj.weight", "up_proj.weight"],
            "rank_pattern": {"q_proj": 2},
        },
        False,
    ),
    "repeated layers": (
        UNTIED,
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 1], [1, 2]]},
        False,
    ),
    "repeated layers of a base with biases, tied": (
        TIED | {"attention_bias": True},
        {"target_modules": "all-linear", "layer_replication": [[0, 1], [0, 2]]},
        True,
    ),
    "some tokens and the head": (
        UNTIED,
        {"target_modules": ["lm_head", "q_proj"], "trainable_token_indices": [7, 3]},
        False,
    ),
    "some tokens and the head, tied": (
        TIED,
        {"target_modules": ["lm_head", "q_proj"], "trainable_token_indices": [7, 3]},
        False,
    ),
    "grown": (UNTIED, {"target_modules": ["q_proj"], "grow_to": 43}, False),
    "grown, tied": (TIED, {"target_modules": ["q_proj"], "grow_to": 43}, True),
    "grown, saved, tied": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "grow_to": 43},
        False,
    ),
    "grown, embedding, tied": (TIED, {"target_modules": ["embed_tokens"], "grow_to": 43}, False),
    "grown, some tokens, tied": (
        TIED,
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 41], "grow_to": 43},
        True,
    ),
    "fused projections": (
        PHI3,
        {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]},
        False,
    ),
    "embedding that is scaled, tied": (GEMMA2, {"target_modules": ["embed_tokens"]}, False),
    "DoRA on an embedding that is scaled, tied": (
        GEMMA2,
        {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
        False,
    ),
    "DoRA on fused projections": (
        PHI3,
        {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True},
        False,
    ),
}


SHAPES |= {
    f"all-linear, {name}": (
        base,
        {"target_modules": "all-linear"},
        base.get("tie_word_embeddings", False),
    )
    for name, base in FAMILIES.items()
}


@pytest.mark.toolchain
@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_checkpoint_says_what_peft_says_unmerged(shape, tmp_path):
    base, lora, is_tied = SHAPES[shape]
    made = tiny.train_with_peft(tmp_path, base=base, **lora)
    merged = merging.merge(Checkpoint.open(made.base), made.adapter)
    assert merged.spec.is_tied == is_tied
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - made.logits).max() <= 1e-4
    (side_by_side,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    assert np.abs(side_by_side - made.logits).max() <= 1e-5
    shared = made.base_logits.shape[-1]
    assert np.abs(made.logits[:, :shared] - made.base_logits).max() > 0.02


@pytest.mark.parametrize("module", ["experts", "experts.base_layer", "experts.2.w1", "gate"])
def test_an_update_of_experts_is_refused_whoever_made_it(module, tmp_path):
    base = Checkpoint.open(tiny.write_base(tmp_path / "base", **FAMILIES["linears beside experts"]))
    name = f"model.layers.1.feed_forward.{module}"
    updates = {f"{name}.lora_A.weight": np.ones((4, 16)), f"{name}.lora_B.weight": np.ones((8, 4))}
    adapter = tiny.write_adapter(
        tmp_path / "adapter", updates, target_modules=["w1", "gate"],
        target_parameters=["feed_forward.experts.gate_up_proj"],
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"changes model\.layers\.1\.feed") as refusal:
        merging.merge(base, adapter)
    assert "edgekit merges no update of experts" in str(refusal.value)
    assert "merge it with PEFT" in refusal.value.hint


@pytest.mark.toolchain
@pytest.mark.parametrize(
    "first",
    [
        "head, tied",
        "embedding and head, kept tied",
        "some tokens, tied",
        "some tokens and the head, tied",
        "tokens of the head, tied",
    ],
)
def test_a_stack_is_proven_where_the_first_changes_a_tied_matrix(tmp_path, first):
    """PEFT 0.21 merges an update of one of two tied matrices into both."""
    config, lora, is_tied = SHAPES[first]
    made = tiny.train_with_peft(tmp_path, base=config, **lora)
    second = tiny.write_adapter(tmp_path / "second", tiny.q_proj_updates())
    one = merging.merge(Checkpoint.open(made.base), made.adapter)
    merged = merging.merge(one, second)
    assert merged.spec.is_tied == is_tied
    (side_by_side,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - side_by_side).max() <= 1e-4
    assert np.abs(found - made.logits).max() > 0.02


@pytest.mark.toolchain
def test_repeated_layers_are_proven_where_the_config_lists_each_ones_kind(tmp_path):
    """PEFT 0.21 leaves ``layer_types`` as short as the base's, and transformers then stops."""
    base = Checkpoint.open(tiny.write_base(tmp_path / "base", **QWEN2))
    order = [[0, 2], [1, 2]]
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(layers=3), layer_replication=order
    )
    merged = merging.merge(base, directory)
    (side_by_side,) = transformers_logits.logits(merged, tiny.IDS, fits_in_memory=True)
    write_checkpoint(merged, tmp_path / "merged", precision="f32")
    found = tiny.logits_of(tiny.load(tmp_path / "merged"))
    assert np.abs(found - side_by_side).max() <= 1e-4
    assert len(merged.spec.layers) == 3
    assert record(merged).notes == ("the adapter repeats layers of the base: the model has 3",)


def test_an_exaone_adapter_has_the_names_of_memory_or_of_the_file(tmp_path):
    base = Checkpoint.open(tiny.write_base(tmp_path / "base", model_type="exaone"))
    updates = tiny.q_proj_updates()
    stored = {
        name.replace("model.layers.", "transformer.h.").replace("self_attn", "attn.attention"): it
        for name, it in updates.items()
    }
    assert stored.keys() != updates.keys()
    found = [
        merging.merge(base, tiny.write_adapter(tmp_path / name, given)).weight("layers.1.query")
        for name, given in (("memory", updates), ("file", stored))
    ]
    assert np.array_equal(*found)
    assert not np.array_equal(found[0], base.weight("layers.1.query"))
