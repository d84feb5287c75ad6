"""A real runner of a few kilobytes: tokenizers trained here, an n-gram model, a bundle on disk."""

import hashlib
from pathlib import Path

import pytest

from edgekit.bundle.manifest import Artifact, Bundle, ModelRecord
from edgekit.errors import UsageError
from edgekit.run import Runner
from edgekit.text.rules import TextRules, ThoughtMarks
from edgekit.text.tokenizer import Text


np = pytest.importorskip("numpy")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

AddedToken, Tokenizer = tokenizers.AddedToken, tokenizers.Tokenizer
decoders, models, normalizers = tokenizers.decoders, tokenizers.models, tokenizers.normalizers
pre_tokenizers, trainers = tokenizers.pre_tokenizers, tokenizers.trainers

TEXTS = (
    "The quick brown fox jumps over the lazy dog, again and again.",
    "대한민국의 수도는 서울입니다. 안녕하세요, 반갑습니다!",
    "法国的首都是巴黎。你好，世界！",  # noqa: RUF001 - as Chinese is written
    "عاصمة فرنسا هي باريس. مرحبا بالعالم",
    "👩‍👩‍👧 family, 🇰🇷 flag, 🙂🙃 e\u0301",
    "def f(x):\n\tif x:\n        return  x ** 2  # two  spaces\r\n",
    "   leading, trailing   \n\n\n  lines \t\t end",
    "naïve café – “quotes” … ½ ∑ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \ufffd replacement",  # noqa: RUF001
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end>"]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Qwen3.5's: a thought is opened, unless switched off, and an earlier answer has none.
THINKING = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def byte_level_tokenizer():
    """Train one as GPT-2, Llama 3, Qwen and SmolLM2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:3], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def sentencepiece_tokenizer(*, decoder="fuse"):
    """Build one as Llama 2 and Phi-3 have it: a space is ▁, unknown letters are bytes."""
    words = [c for text in TEXTS[:1] for c in sorted(set(text.replace(" ", "▁")))]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *words, "▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("▁", "a"), ("▁", "f")]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")  # noqa: S106
    )
    tokenizer.add_special_tokens(SPECIAL)
    if decoder == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        return tokenizer
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if decoder == "fuse":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def text_in(
    directory: Path, tokenizer, *, template=CHATML, adds_bos=False, stop_ids=None, **more_rules
) -> Text:
    """Write the text files of a bundle and open them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    sha256 = None if template is None else hashlib.sha256(template.encode()).hexdigest()
    rules = TextRules(
        **more_rules,
        stop_ids=(tokenizer.token_to_id("<|im_end|>"),) if stop_ids is None else stop_ids,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        adds_bos=adds_bos,
        chat_template_sha256=sha256,
    )
    return Text.open(directory, rules)


class NgramSession:
    """A language model: what followed the longest end of the text that it has seen before."""

    def __init__(self, sequences, *, vocabulary_tokens, context_tokens=512, rewinds=True):
        self.vocabulary_tokens = vocabulary_tokens
        self.context_tokens = context_tokens
        self.sequences = [list(sequence) for sequence in sequences]
        self.rewinds = rewinds
        self.cached = []
        self.reads = []  # how many tokens each call read
        self.is_closed = False

    def _logits(self):
        logits = np.zeros(self.vocabulary_tokens, dtype=np.float32)
        for sequence in self.sequences:
            for at in range(1, len(sequence)):
                length = 0
                while length < min(at, len(self.cached)) and (
                    sequence[at - 1 - length] == self.cached[-1 - length]
                ):
                    length += 1
                logits[sequence[at]] = max(logits[sequence[at]], length)
        return logits

    def prefill(self, ids):
        if len(self.cached) + len(ids) > self.context_tokens:
            raise UsageError("the cache is full")
        self.cached += ids
        self.reads.append(len(ids))
        return self._logits()

    def decode(self, token):
        return self.prefill([token])

    def all_logits(self, ids):
        self.reset()
        return np.stack([self.decode(token) for token in ids])

    def rewind(self, tokens):
        if self.rewinds:
            del self.cached[tokens:]
        return self.rewinds

    def reset(self):
        self.cached = []

    def close(self):
        self.is_closed = True


QUESTION = "What is the capital of France?"
DIALOGUE = (
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "It is Paris, 파리 🙂 of course."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
)


def runner_in(
    directory: Path,
    *,
    template=CHATML,
    tokenizer=None,
    context_tokens=512,
    knows=DIALOGUE,
    **rules,
) -> Runner:
    """Return a runner that knows one dialogue by heart, and the text "one two three …"."""
    text = text_in(directory, tokenizer or byte_level_tokenizer(), template=template, **rules)
    sequences = [text.encode("one two three four five six seven eight nine ten")]
    if template is not None:
        sequences.append(text.encode_chat(knows, add_generation_prompt=False))
    session = NgramSession(
        sequences,
        vocabulary_tokens=text.tokenizer.get_vocab_size(),
        context_tokens=context_tokens,
    )
    return Runner(session=session, text=text, bundle=bundle_in(directory, text.rules))


THOUGHTS = ("France, 파리 … <b>", "Yes, I am.")


def thinking_runner_in(directory: Path, *, rewinds=True, tokenizer=None, **rules) -> Runner:
    """Return a runner that knows the dialogue by heart, thinks before each answer, or does not."""
    runner = runner_in(
        directory,
        template=THINKING,
        tokenizer=tokenizer,
        thoughts=ThoughtMarks(opens="<think>", closes="</think>"),
        **rules,
    )
    text, session = runner.text, runner.session
    assert isinstance(session, NgramSession)
    session.rewinds, session.sequences = rewinds, []
    for at, thought in zip((1, 3), THOUGHTS, strict=True):
        said = f"{DIALOGUE[at]['content']}<|im_end|>"
        asked = text.render(DIALOGUE[:at])
        session.sequences.append(text.encode(f"{asked}{thought}\n</think>\n\n{said}"))
        asked = text.render(DIALOGUE[:at], enable_thinking=False)
        session.sequences.append(text.encode(asked + said))
    return runner


def bundle_in(directory: Path, rules: TextRules) -> Bundle:
    """Describe the files there as a bundle."""
    (directory / "model.bin").write_bytes(b"an n-gram model")
    return Bundle(
        directory=directory,
        model=ModelRecord(name="tiny/ngram", sha256="0" * 64, architecture="ngram", parameters=0),
        target="any",
        context_tokens=512,
        text=rules,
        artifact=Artifact.of_directory(directory, "model.bin", format="in_memory", recipe="f32"),
        agreement=None,
        predicted={},
        tools={},
    )
