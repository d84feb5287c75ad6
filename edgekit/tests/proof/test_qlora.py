"""Bases that bitsandbytes quantized to four bits, and adapters trained on them."""

import json
import shutil
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest

from edgekit.cli import main
from edgekit.errors import UsageError
from edgekit.merge import merge
from edgekit.progress import Silent
from edgekit.proof import interpreter, qlora
from edgekit.quant.rounding import bfloat16, from_bfloat16
from edgekit.source import bitsandbytes_tensors
from edgekit.source.adapters import merging
from edgekit.source.checkpoint import Checkpoint, read_safetensors
from edgekit.tests.tiny import adapters as tiny


np = pytest.importorskip("numpy")

NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
_FP4 = [0, 0.005208333, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
CODES = {
    "nf4": np.array(NF4, dtype=np.float32),
    "fp4": np.array([*_FP4, *(-code for code in _FP4)], dtype=np.float32),
}
STATE = ".quant_state.bitsandbytes__"
NAME = "model.layers.0.mlp.down_proj.weight"


@dataclass(kw_only=True)
class Quantized:
    """A matrix as the documented layout stores it, and what it means, made number by number."""

    parts: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    values: Any = None


def quantize(weight, *, quant_type="nf4", block=64, nested=False, dtype="float32"):
    codes, flat = CODES[quant_type], np.asarray(weight, dtype=np.float32).ravel()
    blocks = [flat[first : first + block] for first in range(0, flat.size, block)]
    scales = np.array([np.abs(values).max() for values in blocks], dtype=np.float32)
    state: dict[str, Any] = {
        "quant_type": quant_type, "blocksize": block, "dtype": dtype, "shape": list(weight.shape),
    }  # fmt: skip
    parts: dict[str, Any] = {"quant_map": codes, "absmax": scales}
    if nested:
        scales = _nest(scales, parts, state)
    chosen = [int(np.abs(codes - x / scales[i // block]).argmin()) for i, x in enumerate(flat)]
    values = [codes[code] * scales[i // block] for i, code in enumerate(chosen)]
    chosen += [0] * (len(chosen) % 2)
    packed = [16 * high + low for high, low in zip(chosen[::2], chosen[1::2], strict=True)]
    parts[""] = np.array(packed, dtype=np.uint8)[:, None]
    rounded = rounded_to(dtype, np.array(values, dtype=np.float32))
    return Quantized(parts=parts, state=state, values=rounded.reshape(weight.shape))


def _nest(scales, parts, state):
    offset = float(scales.mean())
    map_ = np.linspace(-1, 1, 256, dtype=np.float32)
    chunks = [scales[first : first + 256] - offset for first in range(0, len(scales), 256)]
    outer = np.array([np.abs(chunk).max() for chunk in chunks], dtype=np.float32)
    inner = [int(np.abs(map_ - (x - offset) / outer[i // 256]).argmin())
             for i, x in enumerate(scales)]  # fmt: skip
    parts["absmax"] = np.array(inner, dtype=np.uint8)
    parts |= {"nested_absmax": outer, "nested_quant_map": map_}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    return np.array(
        [map_[code] * outer[i // 256] + np.float32(offset) for i, code in enumerate(inner)],
        dtype=np.float32,
    )


def rounded_to(dtype, values):
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return from_bfloat16(bfloat16(values))
    return values


def write_stored(path, tensors):
    """Write float32 and bytes, each array as the type it has."""
    header, data = {}, b""
    for name, values in tensors.items():
        stored = np.ascontiguousarray(values).tobytes()
        header[name] = {
            "dtype": "U8" if values.dtype == np.uint8 else "F32",
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(stored)],
        }
        data += stored
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_quantized(base, out, *, change=None, settings=None, **options):
    """Write a base in four bits; return what its quantized weights mean.

    Args:
        base: An ordinary checkpoint.
        out: Where to.
        change: Called with the tensors and the state of `NAME` before they are written.
        settings: The quantization_config.
        options: Of `quantize`.
    """
    shutil.copytree(base, out)
    tensors, meanings = {}, {}
    for name, tensor in read_safetensors(base / "model.safetensors"):
        if "proj" not in name:
            tensors[name] = tensor.read()
            continue
        made = quantize(tensor.read(), **options)
        meanings[name] = made.values
        own = {f"{name}.{part}".removesuffix("."): values for part, values in made.parts.items()}
        if change and name == NAME:
            change(own, made.state)
        state = f"{name}{STATE}{options.get('quant_type', 'nf4')}"
        own.setdefault(state, as_bytes(json.dumps(made.state).encode()))
        tensors |= {key: values for key, values in own.items() if values is not None}
    write_stored(out / "model.safetensors", tensors)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = settings or {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": options.get("quant_type", "nf4"), "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return meanings


def as_bytes(text):
    return np.frombuffer(text, dtype=np.uint8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "base-4bit"
    write_quantized(base, out, nested=True)
    return out


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_is_its_code_times_the_scale_of_its_block(
    base, tmp_path, quant_type, dtype, nested
):
    meanings = write_quantized(
        base, tmp_path / "q", quant_type=quant_type, dtype=dtype, nested=nested
    )
    checkpoint = Checkpoint.open(tmp_path / "q")
    assert checkpoint.quantization == quant_type
    assert len(meanings) == 14
    for name, values in meanings.items():
        np.testing.assert_allclose(checkpoint.tensors[name].read(), values, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("config", [{}, {"hidden_size": 15, "head_dim": 2}])
@pytest.mark.parametrize("chunk_items", [1, 2**20])
def test_some_rows_are_those_of_the_whole(tmp_path, config, chunk_items, monkeypatch):
    """Rows of 24 and of 15 begin inside blocks of 32, and the latter inside bytes."""
    monkeypatch.setattr(bitsandbytes_tensors, "_CHUNK_ITEMS", chunk_items)
    base = tiny.write_base(tmp_path / "base", **config)
    meanings = write_quantized(base, tmp_path / "q", block=32)
    tensors = Checkpoint.open(tmp_path / "q").tensors
    for name in (NAME, NAME.replace("down", "up")):
        whole = meanings[name]
        parts = [
            (first, last)
            for first in range(len(whole))
            for last in range(first + 1, len(whole) + 1)
        ]
        differing = [
            (first, last)
            for first, last in parts
            if not np.allclose(
                tensors[name].read(first, last - first), whole[first:last], rtol=1e-6, atol=1e-8
            )
        ]
        assert len(parts) > 100
        assert differing == []


def test_what_is_not_quantized_is_read_as_it_is(base, quantized):
    ours, theirs = Checkpoint.open(quantized), Checkpoint.open(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        np.testing.assert_array_equal(ours.tensors[name].read(), theirs.tensors[name].read())
    assert ours.spec == theirs.spec
    assert theirs.quantization is None


def test_four_bits_take_less_of_the_disk(base, quantized):
    assert Checkpoint.open(quantized).tensors[NAME].size_bytes * 6 < (
        Checkpoint.open(base).tensors[NAME].size_bytes
    )


def test_a_merge_into_it_is_an_ordinary_checkpoint(base, tmp_path):
    meanings = write_quantized(base, tmp_path / "q", dtype="bfloat16")
    updates = tiny.q_proj_updates()
    directory = tiny.write_adapter(tmp_path / "a", updates)
    out = merge(tmp_path / "q", [directory], tmp_path / "out", precision="f32")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    written = Checkpoint.open(out)
    assert written.quantization is None
    np.testing.assert_array_equal(written.tensors[NAME].read(), meanings[NAME])
    module = "model.layers.1.self_attn.q_proj"
    delta = 2 * updates[f"{module}.lora_B.weight"] @ updates[f"{module}.lora_A.weight"]
    np.testing.assert_allclose(
        written.tensors[f"{module}.weight"].read(), meanings[f"{module}.weight"] + delta, atol=1e-6
    )


def test_without_a_precision_it_is_written_as_what_was_quantized(base, tmp_path):
    write_quantized(base, tmp_path / "q", dtype="bfloat16")
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    written = Checkpoint.open(merge(tmp_path / "q", [directory], tmp_path / "out"))
    assert written.tensors[NAME].size_bytes == 2 * 16 * 24


def test_the_notes_say_that_the_base_is_quantized(quantized, tmp_path):
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(), base_model_name_or_path="unsloth/base-bnb-4bit"
    )
    record = merging.merge(Checkpoint.open(quantized), directory).adapter
    assert record
    assert record.notes == (
        "'base-4bit' is stored as nf4; the adapter is merged into its de-quantized weights",
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by gptq"),
        ({"quant_method": "awq", "bits": 4}, "by awq"),
        ({"quant_method": "fp8"}, "by fp8"),
        ({"quant_method": "compressed-tensors"}, "by compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"8 bits \(LLM.int8\)"),
        ({"load_in_8bit": True, "load_in_4bit": False}, r"8 bits \(LLM.int8\)"),
        ({"bits": 2}, "an unnamed method"),
    ],
)
def test_other_methods_are_refused_by_name(base, tmp_path, settings, named):
    write_quantized(base, tmp_path / "q", settings=settings)
    with pytest.raises(UsageError, match=named) as caught:
        Checkpoint.open(tmp_path / "q")
    assert "bitsandbytes" in str(caught.value)


def test_a_config_from_before_methods_had_names_is_read(base, tmp_path):
    write_quantized(base, tmp_path / "q", settings={"load_in_4bit": True})
    assert Checkpoint.open(tmp_path / "q").quantization == "nf4"


def test_four_bits_of_which_the_config_does_not_know_are_refused(base, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "q")
    shutil.copyfile(base / "config.json", tmp_path / "q" / "config.json")
    with pytest.raises(UsageError, match="has dtype 'U8'"):
        Checkpoint.open(tmp_path / "q")


def test_a_config_that_is_wrong_about_it_is_refused(base, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "q")
    shutil.copyfile(base / "model.safetensors", tmp_path / "q" / "model.safetensors")
    with pytest.raises(UsageError, match="none of its tensors is"):
        Checkpoint.open(tmp_path / "q")


def _set_part(part, values):
    return lambda tensors, _: tensors.update({f"{NAME}{part}": values})


def _set_state(**fields):
    return lambda _, state: state.update(fields)


def _raw_state(text):
    return _set_part(f"{STATE}nf4", as_bytes(text))


BROKEN = {
    "truncated absmax": (_set_part(".absmax", np.zeros(5, np.uint8)), r"absmax has shape \[5\]"),
    "absmax in floats": (
        _set_part(".absmax", np.zeros(6, np.float32)),
        "absmax is F32, its quant_state says that scales are quantized",
    ),
    "no absmax": (_set_part(".absmax", None), "lacks the tensor .*absmax"),
    "no nested_absmax": (_set_part(".nested_absmax", None), "lacks the tensor .*nested_absmax"),
    "short nested_quant_map": (
        _set_part(".nested_quant_map", np.zeros(255, np.float32)), r"has shape \[255\]",
    ),
    "other codes": (
        _set_part(".quant_map", CODES["fp4"]), "does not hold the sixteen codes of nf4",
    ),
    "codes that are not numbers": (
        _set_part(".quant_map", np.full(16, np.nan, np.float32)), "the sixteen codes",
    ),
    "half the weight": (_set_part("", np.zeros((96, 1), np.uint8)), r"shape \[96, 1\] of U8"),
    "a flat weight": (_set_part("", np.zeros(192, np.uint8)), r"shape \[192\] of U8"),
    "no weight": (_set_part("", None), "lacks the tensor .*down_proj.weight"),
    "an odd block": (_set_state(blocksize=63), "blocksize = 63, expected one of 32, 64"),
    "another block": (_set_state(blocksize=128), r"absmax has shape \[6\], expected \[3\]"),
    "a block in words": (_set_state(blocksize="64"), "blocksize = '64'"),
    "an odd nested block": (_set_state(nested_blocksize=1), "nested_blocksize = 1"),
    "another type": (_set_state(quant_type="fp4"), "says 'fp4'"),
    "another dtype": (_set_state(dtype="int8"), "dtype = 'int8'"),
    "another nested dtype": (_set_state(nested_dtype="float16"), "nested_dtype = 'float16'"),
    "a field from the future": (_set_state(rotation="hadamard"), "rotation"),
    "one dimension": (_set_state(shape=[384]), r"shape = \[384\]"),
    "a negative dimension": (_set_state(shape=[-16, -24]), r"shape = \[-16, -24\]"),
    "an absurd shape": (_set_state(shape=[2**30, 2**30]), "expected the 576460752303423488 bytes"),
    "the shape of another": (_set_state(shape=[24, 16]), r"has shape \[24, 16\], the config asks"),
    "a word as offset": (_set_state(nested_offset="0"), "nested_offset = '0'"),
    "an endless offset": (_set_state(nested_offset=float("inf")), "nested_offset = inf"),
    "no JSON": (_raw_state(b"{"), "is not JSON"),
    "no text": (_raw_state(b"\xff\xfe"), "is not JSON"),
    "nested JSON": (_raw_state(b"[" * 4000), "is not JSON"),
    "no object": (_raw_state(b"[]"), "holds a list"),
    "too much JSON": (_raw_state(b" " * 5000), "at most 4096 bytes"),
    "two states": (
        lambda tensors, state: tensors.update({
            f"{NAME}{STATE}{kind}": as_bytes(json.dumps(state).encode()) for kind in ("nf4", "fp4")
        }),
        "says twice how .*down_proj.weight is quantized",
    ),
    "a state of nothing known": (
        _set_part(f"{STATE}nf3", as_bytes(b"{}")), "its own nf4 or fp4",
    ),
    "a scale of nothing": (
        lambda tensors, _: tensors.update({"model.norm.weight.absmax": np.zeros(1, np.uint8)}),
        "lacks what bitsandbytes says about model.norm.weight.absmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_quantization_is_one_sentence(base, tmp_path, name):
    change, complaint = BROKEN[name]
    write_quantized(base, tmp_path / "q", nested=True, change=change)
    with pytest.raises(UsageError, match=complaint) as caught:
        Checkpoint.open(tmp_path / "q")
    assert "\n" not in str(caught.value)


def test_scales_that_are_no_numbers_are_found_when_they_are_read(base, tmp_path):
    change = _set_part(".nested_absmax", np.full(1, np.nan, np.float32))
    write_quantized(base, tmp_path / "q", nested=True, change=change)
    checkpoint = Checkpoint.open(tmp_path / "q")
    with pytest.raises(UsageError, match="NaN or infinite"):
        checkpoint.tensors[NAME].read()


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_flipped_bits_are_refused_or_read(quantized, tmp_path, count):
    shutil.copytree(quantized, tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refusals = 0
    for _ in range(count):
        damaged = bytearray(whole)
        for place in random.integers(len(whole), size=8):
            damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            checkpoint = Checkpoint.open(tmp_path / "q")
            for tensor in checkpoint.tensors.values():
                tensor.read()
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - a refusal is one of two right answers
            refusals += 1
    assert 0 < refusals < count


def test_a_base_without_four_bits_is_no_trained_on(base, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(UsageError, match="is not quantized"):
        merge(base, [directory], tmp_path / "out", trained_on=tmp_path / "copy")


def test_another_model_is_no_trained_on(base, tmp_path):
    other = tiny.write_base(tmp_path / "other", rms_norm_eps=1e-6)
    write_quantized(other, tmp_path / "q")
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    with pytest.raises(UsageError, match="describe different decoders"):
        merge(base, [directory], tmp_path / "out", trained_on=tmp_path / "q")


def test_trained_on_asks_for_an_adapter(base, quantized):
    with pytest.raises(UsageError, match="there is none"):
        qlora.with_score(Checkpoint.open(base), [], trained_on=quantized, listener=Silent())


def scored(base, directory, *, trained_on=None):
    """Return the notes on a merge."""
    merged = merging.merge(Checkpoint.open(base), directory)
    made = qlora.with_score(merged, [directory], trained_on=trained_on, listener=Silent())
    assert made.adapter
    return made.adapter.notes


@pytest.mark.toolchain
def test_a_merge_into_16_bits_is_compared_with_what_was_trained(base, quantized, tmp_path):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    found, advice = scored(base, directory, trained_on=quantized)
    assert found.startswith("against the nf4 base 'base-4bit' with the adapter, as it was trained")
    assert found.count("mean KL ") == 2
    assert "mean KL 0.00e+00" not in found
    assert advice == "a merge into 'base-4bit' instead says what was trained"


@pytest.mark.toolchain
def test_where_four_bits_lose_nothing_so_does_the_merge(base, quantized, tmp_path):
    plain = tmp_path / "plain"  # holds just what the four bits mean
    shutil.copytree(base, plain)
    tensors = Checkpoint.open(quantized).tensors
    tiny.write_safetensors(
        plain / "model.safetensors", {name: tensor.read() for name, tensor in tensors.items()}
    )
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    *_, found, _ = scored(plain, directory, trained_on=quantized)
    assert found.count("mean KL 0.00e+00 nats and the same top token 100.0%") == 2


@pytest.mark.toolchain
def test_the_base_an_adapter_names_is_compared_with_unasked(base, quantized, tmp_path):
    updates = tiny.q_proj_updates()
    here = tiny.write_adapter(tmp_path / "a", updates, base_model_name_or_path=str(quantized))
    assert any("as it was trained" in note for note in scored(base, here))
    text = (merge(base, [here], tmp_path / "out") / "README.md").read_text()
    assert "as it was trained, this merge has mean KL" in text


@pytest.mark.toolchain
def test_the_command_line_tells_the_comparison(base, quantized, tmp_path, capsys):
    directory = tiny.write_adapter(tmp_path / "a", tiny.q_proj_updates())
    arguments = ["merge", base, "--adapter", directory, "--trained-on", quantized]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "-o", str(tmp_path / "out")])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    assert "as it was trained, this merge has mean KL" in printed.err.replace("\n", " ")


def test_a_base_that_is_not_here_or_not_quantized_is_not_compared_with(base, tmp_path):
    updates = tiny.q_proj_updates()
    for number, named in enumerate((f"somewhere/{base.name}", str(base), "")):
        directory = tiny.write_adapter(
            tmp_path / str(number), updates, base_model_name_or_path=named
        )
        assert scored(base, directory) == ()


def test_nothing_is_compared_where_the_model_is_what_was_trained_on(quantized, tmp_path):
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(), base_model_name_or_path=str(quantized)
    )
    assert len(scored(quantized, directory)) == 1


def test_a_broken_named_base_is_no_reason_to_refuse_the_merge(base, quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "q")
    (tmp_path / "q" / "model.safetensors").write_bytes(b"")
    directory = tiny.write_adapter(
        tmp_path / "a", tiny.q_proj_updates(), base_model_name_or_path=str(tmp_path / "q")
    )
    *_, note = scored(base, directory)
    assert note.startswith("the merge is not compared with")
    assert "is not a safetensors file" in note


# Against bitsandbytes itself. Its kernels for CPUs want rows that are whole blocks.
SIZES = {"intermediate_size": 128}


def bitsandbytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")


def save_in_four_bits(source, out, *, quant_type, nested, dtype):
    import torch
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=settings, dtype=dtype
        )
        model.save_pretrained(out)
    return out


def load_in_four_bits(directory):
    """Return transformers' own model of it, in float32 also on CPUs with bfloat16."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
    for module in model.modules():
        if isinstance(module, bitsandbytes().nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def say(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def said(checkpoint, ids):
    return next(iter(interpreter.logits(checkpoint, [ids])))


@pytest.mark.toolchain
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_it_reads_bit_by_bit_what_bitsandbytes_reads(tmp_path, quant_type, nested, dtype):
    import torch

    functional = bitsandbytes().functional
    source = torch.Generator().manual_seed(0)
    shape, name = (24, 128), NAME
    weight = torch.randn(shape, generator=source).to(getattr(torch, dtype))
    packed, state = functional.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested
    )
    parts = {f"{name}.{part}": x.numpy() for part, x in state.as_dict(packed=True).items()}
    write_stored(tmp_path / "part.safetensors", {name: packed.numpy(), **parts})
    stored = dict(read_safetensors(tmp_path / "part.safetensors", dtypes=("U8", "F32")))
    tensors, found = bitsandbytes_tensors.dequantized(stored, origin=tmp_path)
    assert found == quant_type
    expected = functional.dequantize_4bit(packed, state)
    assert str(expected.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(tensors[name].read(), expected.float().numpy())
    np.testing.assert_array_equal(tensors[name].read(3, 7), expected[3:10].float().numpy())


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("family", "quant_type", "nested"),
    [("llama", "nf4", True), ("llama", "fp4", False), ("phi3", "nf4", False),
     ("gemma3", "fp4", True)],
)  # fmt: skip
def test_with_an_adapter_it_says_what_peft_says_on_four_bits(tmp_path, family, quant_type, nested):
    import torch
    from peft import LoraConfig, get_peft_model

    from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint

    bitsandbytes()
    source = write_tiny_checkpoint(tmp_path / "source", family, **SIZES)
    directory = save_in_four_bits(
        source, tmp_path / "q", quant_type=quant_type, nested=nested, dtype=torch.float32
    )
    checkpoint = Checkpoint.open(directory)
    ids = list(range(5, 90))
    model = load_in_four_bits(directory)
    assert np.abs(say(model, ids) - said(checkpoint, ids)).max() <= 1e-4
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        trained = get_peft_model(model, lora).eval()
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        trained.save_pretrained(tmp_path / "a")
    merged = merging.merge(checkpoint, tmp_path / "a")
    expected = say(trained, ids)
    assert np.abs(expected - said(checkpoint, ids)).max() > 0.1
    assert np.abs(expected - said(merged, ids)).max() <= 1e-4  # measured: at most 4e-5


@pytest.mark.toolchain
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_oracle_has_a_word_on_four_bits_too(tmp_path, dtype):
    import torch

    from edgekit.proof import transformers_logits
    from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint

    bitsandbytes()
    dtype = getattr(torch, dtype)
    source = write_tiny_checkpoint(tmp_path / "source", "llama", dtype=dtype, **SIZES)
    directory = save_in_four_bits(
        source, tmp_path / "q", quant_type="nf4", nested=True, dtype=dtype
    )
    checkpoint, ids = Checkpoint.open(directory), list(range(5, 90))
    (expected,) = transformers_logits.logits(checkpoint, [ids])
    np.testing.assert_allclose(said(checkpoint, ids), expected, atol=1e-4)
