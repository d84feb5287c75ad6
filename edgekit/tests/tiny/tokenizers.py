"""Tokenizers and chat templates of every family, trained here in milliseconds.

Each has its family's real pipeline (normalizer, split regex, byte fallback, post-processor), its
kind of special tokens and a template of its structure, in our own words.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgekit.text import corpus


MERGES = 288
LETTERS = 96  # what SentencePiece models know; other letters become bytes

Pipeline = Literal["smollm", "qwen2", "llama3", "o200k", "sentencepiece", "gemma"]

# What each family's tokenizer.json splits by, before merges.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_CL100K_TAIL}",
    "llama3": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_CL100K_TAIL}",
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Voice:
    """The text side of a family: how it splits, its special tokens, how it chats, when it stops."""

    pipeline: Pipeline
    first_tokens: tuple[str, ...] = ()  # before all others, as SentencePiece and SmolLM have them
    last_tokens: tuple[str, ...] = ()  # after all others, as tiktoken's descendants have them
    plain_tokens: tuple[str, ...] = ()  # matched before splitting, but not special
    bos: str | None = None
    eos: str
    pad: str | None = None
    unk: str | None = None
    adds_bos: bool = False
    strips_right: bool = False  # Phi-3's swallow the whitespace after them, but for three
    stops: tuple[str, ...]
    template: str


_CHATML = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_CHATML_WITH_SYSTEM = (
    """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou answer briefly and kindly.<|im_end|>\\n' }}
{%- endif -%}
"""
    + _CHATML
)

_THINKING = """{%- for message in messages %}
{%- set said = message.content %}
{%- if message.role == 'assistant' and '</think>' in said %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

_HEADERS = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

_INST = """{%- if messages[0]['role'] == 'system' %}
{%- set lead = messages[0]['content'] + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set lead = '' %}
{%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('after the optional system message, user and assistant take turns') }}
{%- endif %}
{%- if turn['role'] == 'user' %}
{{- ' [INST] ' + (lead if loop.first else '') + turn['content'] + ' [/INST]' }}
{%- else %}
{{- ' ' + turn['content'] | trim + eos_token }}
{%- endif %}
{%- endfor %}"""

_PHI3 = """{% for message in messages -%}
{%- if message['role'] in ['system', 'user', 'assistant'] -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""

_PHI4 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] "
    "+ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)

_GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set lead = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set lead = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and model take turns') }}
    {%- endif -%}
    {%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (lead if loop.first else '') }}
    {{- turn['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

_GEMMA4 = """{{ bos_token }}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<|turn>' + role + '\\n' + message['content'] | trim + '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""

_SENTENCEPIECE_TOKENS = ("<unk>", "<s>", "</s>")
VOICES = {
    "smollm": Voice(
        pipeline="smollm",
        first_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", unk="<|endoftext|>",
        stops=("<|im_end|>",),
        template=_CHATML_WITH_SYSTEM,
    ),
    "smollm3": Voice(
        pipeline="llama3",
        last_tokens=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        plain_tokens=("<think>", "</think>"),
        eos="<|im_end|>", pad="<|im_end|>",
        stops=("<|im_end|>",),
        template=_THINKING,
    ),
    "llama3": Voice(
        pipeline="llama3",
        last_tokens=("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|start_header_id|>",
                     "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|pad|>",
        adds_bos=True,
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        template=_HEADERS,
    ),
    "qwen2": Voice(
        pipeline="qwen2",
        last_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>", pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        template=_CHATML_WITH_SYSTEM,
    ),
    "qwen3": Voice(
        pipeline="qwen2",
        last_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain_tokens=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        eos="<|im_end|>", pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        template=_THINKING,
    ),
    "stablelm": Voice(
        pipeline="qwen2",
        last_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos="<|endoftext|>", eos="<|im_end|>", pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        template=_CHATML,
    ),
    "phi4": Voice(
        pipeline="o200k",
        last_tokens=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
        bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>",
        stops=("<|end|>", "<|endoftext|>"),
        template=_PHI4,
    ),
    "tinyllama": Voice(
        pipeline="sentencepiece",
        first_tokens=_SENTENCEPIECE_TOKENS,
        bos="<s>", eos="</s>", pad="</s>", unk="<unk>",
        adds_bos=True,
        stops=("</s>",),
        template=_ZEPHYR,
    ),
    "mistral": Voice(
        pipeline="sentencepiece",
        first_tokens=_SENTENCEPIECE_TOKENS,
        bos="<s>", eos="</s>", unk="<unk>",
        adds_bos=True,
        stops=("</s>",),
        template=_INST,
    ),
    "phi3": Voice(
        pipeline="sentencepiece",
        first_tokens=_SENTENCEPIECE_TOKENS,
        last_tokens=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|system|>", "<|user|>"),
        bos="<s>", eos="<|endoftext|>", pad="<|endoftext|>", unk="<unk>",
        strips_right=True,
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        template=_PHI3,
    ),
    "gemma": Voice(
        pipeline="gemma",
        first_tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        plain_tokens=("\n\n", "<table>"),
        bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>",
        adds_bos=True,
        stops=("<eos>", "<end_of_turn>"),
        template=_GEMMA,
    ),
    "gemma4": Voice(
        pipeline="gemma",
        first_tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<|tool_call>", "<tool_call|>",
                      "<|tool_response>", "<tool_response|>", '<|"|>', "<|channel>", "<channel|>",
                      "<|turn>", "<turn|>"),
        plain_tokens=("\n\n", "<table>"),
        bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>",
        adds_bos=True,
        stops=("<eos>", "<turn|>"),
        template=_GEMMA4,
    ),
}  # fmt: skip


@functools.cache
def train(name: str) -> str:
    """Return the ``tokenizer.json`` of a voice."""
    from tokenizers import AddedToken

    voice = VOICES[name]
    is_sentencepiece = voice.pipeline in ("sentencepiece", "gemma")
    tokenizer = _train_sentencepiece(voice) if is_sentencepiece else _train_byte_level(voice)
    tokenizer.add_special_tokens([
        AddedToken(token, normalized=False, rstrip=token in _swallowing(voice))
        for token in (*voice.first_tokens, *voice.last_tokens)
    ])  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in voice.plain_tokens])
    if voice.adds_bos:
        tokenizer.post_processor = _bos_processor(tokenizer, str(voice.bos))
    return str(tokenizer.to_str())


def _swallowing(voice: Voice) -> set[str]:
    tokens = {*voice.first_tokens, *voice.last_tokens} - {"<unk>", "<s>", voice.eos}
    return tokens if voice.strips_right else set()


def _training_texts() -> list[str]:
    """Return the corpus, with more of what splits differ in: numbers, contractions, space runs."""
    numbers = " ".join(str(n * n) for n in range(100, 1000, 7))
    contractions = "I'm you're he's we've they'll I'd don't I'M YOU'RE HE'S WE'VE " * 4
    spaces = "a    b        c\n\n\n\td\n    e\r\n\r\n" * 8
    return [text for _, text in corpus.texts()] + [numbers, contractions, spaces]


def _train_byte_level(voice: Voice) -> Any:
    """Return a tokenizer of 256 bytes, some merges and the voice's tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(ignore_merges=voice.pipeline in ("llama3", "o200k")))
    if voice.pipeline == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _byte_level_splitter(voice.pipeline)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=256 + MERGES + len(voice.first_tokens),
        special_tokens=list(voice.first_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    return tokenizer


def _byte_level_splitter(pipeline: Pipeline) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pipeline == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(SPLITS[pipeline]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def _train_sentencepiece(voice: Voice) -> Any:
    """Return a tokenizer of the voice's first tokens, 256 bytes as ``<0x0A>``, letters, merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, merges = _learn_merges()
    first = [*voice.first_tokens, *(voice.plain_tokens if voice.pipeline == "gemma" else ())]
    others = [piece for piece in pieces if piece not in first]
    tokens = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *others]
    model = models.BPE(
        vocab={token: id for id, token in enumerate(tokens)},
        merges=merges,
        unk_token=voice.unk,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    space_to_block = normalizers.Replace(" ", "\u2581")
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if voice.pipeline == "gemma":
        tokenizer.normalizer = space_to_block
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space_to_block])
        back.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


@functools.cache
def _learn_merges() -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """Return letters, then joined pieces, and the merges that join them, all within words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = BpeTrainer(vocab_size=LETTERS + MERGES, limit_alphabet=LETTERS, show_progress=False)
    learner.train_from_iterator(_training_texts(), trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


def _bos_processor(tokenizer: Any, bos: str) -> Any:
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    is_byte_level = isinstance(tokenizer.post_processor, processors.ByteLevel)
    if not is_byte_level:
        return template
    return processors.Sequence([tokenizer.post_processor, template])
