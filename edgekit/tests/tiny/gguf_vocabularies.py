"""Tokenizers of every kind that a GGUF file can hold, trained here in milliseconds."""

import json

from edgekit.formats.gguf.vocabulary import splits
from edgekit.model.tokenizer_files import TokenizerFiles


BYTES_ONLY = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
PREPEND = {"type": "Prepend", "prepend": "▁"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_CODE = """\
def area(width, height=10):
    if width <= 0:
        return None  # nothing
    return {"size": width * height, 'unit': "m2"}


print(area(3))
"""
# What pre-tokenizers disagree about: digits, contractions, runs of spaces and newlines, letters
# next to punctuation, scripts without spaces, combined emoji, capitals within a word.
TEXTS = (
    "The ferry doesn't leave at 7:45; it'll leave at 19:05, WE'VE checked it 12345 times.",
    "She said 'yes', he'D said (no) [maybe] {never}: $100.50 + 5% = 1e-3 <= x^2 ~ |y|.",
    "바람이 불어오는 날에는 2026년 11월의 바다를 생각합니다. 오늘도 파도가 높네요!",
    "河边的老房子有三层, 每层都有\uff11\uff12扇窗户。我们在那里住了25年, 从来没有搬过家。",
    "الطقس جميل اليوم، والشمس مشرقة فوق المدينة. عددنا ١٢٣ شخصا تقريبا.",
    _CODE,
    "\tfor (int i = 0; i < 100; ++i) {\n\t\tsum += a[i];\n\t}\r\n\r\n",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 🇰🇷 😀😃🙈 café naïve Straße ½ ² Ⅷ \ufb01n",
    "   three before,  two between,     five here, two after  ",
    "\n\n\na\n\n \n b \n\t\n  ",
    "Über die Brücke führt kein Weg. Ça va très bien. Łódź, año, \u0430\u043d\u0433\u0435\u043b.",
    "snake_case camelCase HTTPServer v1.2.3-rc4 user@example.org a.b.c #tag //comment",
    "",
    " ",
    "a",
    "  a",
)
CHAT = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n  Fine.<|im_end|>"
CHAT_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(
    directory,
    pre_tokenizer,
    *,
    special=CHAT_SPECIAL,
    user_defined=(),
    ignore_merges=False,
    normalizer=None,
    puts_bos=False,
    template=None,
):
    """Train byte-level BPE; the first special token is bos, the last ends an answer."""
    fields = _train(
        pre_tokenizer, special=special, user_defined=user_defined, texts=TEXTS, is_byte_level=True
    )
    fields["model"]["ignore_merges"] = ignore_merges
    fields["decoder"] = BYTES_ONLY
    fields["normalizer"] = normalizer
    fields["post_processor"] = _bos_in_front(fields, special[0]) if puts_bos else None
    names = {"bos_token": special[0], "eos_token": special[-1]}
    return save(directory, fields, names, template=template)


def sentencepiece(
    directory, *, space, user_defined=(), puts_bos=True, lists_all_merges=True, template=None
):
    """Train SentencePiece-like BPE with byte fallback.

    ``space`` is where one is put in front: "every" text, the "first" one, or "never".
    """
    special = ("<unk>", "<s>", "</s>", *CHAT_SPECIAL[1:])
    fields = _train_sentencepiece(special, user_defined=user_defined)
    if lists_all_merges:
        fields["model"]["merges"] = _all_merges(fields)
    if space == "first":
        fields["pre_tokenizer"] = metaspace("first", split=False)
    elif space == "every":
        fields["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, TO_MARK]}
        fields["decoder"]["decoders"].append(STRIP)
    else:
        fields["normalizer"] = TO_MARK
    fields["post_processor"] = _bos_in_front(fields, "<s>") if puts_bos else None
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save(directory, fields, names, template=template)


def gemma(directory):
    """Train a tokenizer with Gemma's pipeline: runs of spaces and newlines are added tokens."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    runs = ("\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>")
    fields = _train_sentencepiece(special, user_defined=runs)
    spaces = [["▁" * left, "▁" * (n - left)] for n in (2, 3, 4) for left in range(1, n)]
    words = [pair for pair in _all_merges(fields) if pair not in spaces]
    fields["model"]["merges"] = words + spaces
    for token in fields["added_tokens"]:  # the runs belong to the model, too
        fields["model"]["vocab"].setdefault(token["content"], token["id"])
    fields["normalizer"] = TO_MARK
    fields["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    fields["post_processor"] = _bos_in_front(fields, "<bos>")
    names = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    return save(directory, fields, names, generation={"eos_token_id": [1, 5]})


def phi3(directory):
    """Train a tokenizer with Phi-3's pipeline: most added tokens swallow the spaces after them."""
    special = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>")
    fields = _train_sentencepiece(special, user_defined=())
    fields["model"]["merges"] = _all_merges(fields)
    for token in fields["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    fields["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, TO_MARK]}
    fields["decoder"]["decoders"].append(STRIP)
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    return save(directory, fields, names)


def metaspace(scheme, *, split):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def _train_sentencepiece(special, *, user_defined):
    # Trained on words, as SentencePiece is; the files then say otherwise.
    fields = _train(
        metaspace("never", split=True),
        special=(*special, *_BYTES),
        user_defined=user_defined,
        texts=TEXTS[:-4],
        is_byte_level=False,
    )
    added = [token for token in fields["added_tokens"] if token["content"] not in _BYTES]
    model = fields["model"] | {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return fields | {
        "added_tokens": added,
        "model": model,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _train(pre_tokenizer, *, special, user_defined, texts, is_byte_level):
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers

    bare = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    tokenizer = Tokenizer.from_str(json.dumps(bare))
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 900,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if is_byte_level else [],
        limit_alphabet=1000 if is_byte_level else 200,  # so that some characters become bytes
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    return json.loads(tokenizer.to_str())


def _all_merges(fields):
    """List every pair that makes a token, in the order of training, as converters do."""
    ids = fields["model"]["vocab"]
    added = {token["content"] for token in fields["added_tokens"]}
    return [
        list(pair)
        for token in sorted(ids, key=ids.__getitem__)
        if token not in added and token not in _BYTES
        for pair in splits(token, ids)
    ]


def _bos_in_front(fields, bos):
    id = next(token["id"] for token in fields["added_tokens"] if token["content"] == bos)
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }


def save(directory, fields, names, *, template=None, generation=None):
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(fields, ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = names if template is None else names | {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return TokenizerFiles.open(directory, config={})


def token_ids(files):
    """Return the ids of the tokens that text is merged into, by token."""
    return json.loads(files.tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"]


def reference_ids(directory, texts, *, add_special_tokens=False):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]
