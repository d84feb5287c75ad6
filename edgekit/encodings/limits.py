"""What a stranger's file may cost: every limit, with its reason, in one place.

A file is asked for its size before it is read, and JSON is weighed before it is parsed, so that a
refusal takes 256 MiB at most, or three times the file if that is more (a large vocabulary may take
more), and five seconds. A GGUF header keeps its own account (`edgekit.formats.gguf.layout`); what
clients of a server may cost stands in `edgekit.serve`.
"""

from pathlib import Path

from edgekit.encodings.files import shown
from edgekit.errors import BundleError, UsageError


_KIB, _MIB = 1 << 10, 1 << 20

# Bytes of a file.
SETTINGS_BYTES = 8 * _MIB  # JSON and text; the largest of a small model, Gemma 3's, has 1.2 MB
TOKENIZER_BYTES = 128 * _MIB  # tokenizer.json and other vocabularies; Gemma 3's has 33 MB
HEADER_BYTES = 8 * _MIB  # of a safetensors file, in JSON; 100 bytes a tensor, so 80,000 of them
TARGET_BYTES = 256 * _KIB  # of TOML; edgekit's own have 3 kB
TEMPLATE_BYTES = 256 * _KIB  # of Jinja; the longest known, for tools and thoughts, have 30 kB
PROMPT_CHARACTERS = 8 << 20  # of standard input: the longest contexts hold an eighth of that
CALIBRATION_BYTES = 8 * _MIB  # of text that a user names; 16,384 tokens of it are taken

# In a file.
NESTING = 200  # levels of JSON; Python has 1,000 frames for what walks them
SETTINGS_MEMORY_BYTES = 192 * _MIB  # of Python, for JSON; that of 80,000 tensors takes 130
VOCABULARY_MEMORY_BYTES = 512 * _MIB  # for a tokenizer.json; Gemma's takes 340
VOCABULARY = 1 << 20  # tokens for which one is made up, for a plan; the largest known have 262,208
IDS_BEYOND = 65_536  # how far ids of added tokens may go beyond a model's rows; usual: some dozens
TENSORS = 100_000  # of a model; one of 80 layers in 4 bits has 5,000
TEXT_GROWTH = 16  # how many times as long a tokenizer may make a text; usual ones: at most 3

# Of a child process that tries a file (`edgekit.text.guarded`).
TEMPLATE_CPU_S = 2  # a compile, or a rendering; a usual one takes a millisecond
TEMPLATE_CHARACTERS = 1 << 20  # of a rendered conversation, and of any value on the way to it
TOKENIZER_CPU_S = 4  # a file of a megabyte takes 0.1 s to open
TOKENIZER_BYTES_PER_CPU_S = 4 * _MIB  # which a large file has on top; Gemma's takes 2 s
CHILD_MEMORY_BYTES = 192 * _MIB  # Python and Jinja take 15, a long conversation 50
TOKENIZER_MEMORY_PER_BYTE = 16  # which a large file has on top; measured: 11

# Of a child process in which transformers reads a tokenizer (`edgekit.source`): it takes 2 s and
# 300 MiB to import.
TRANSFORMERS_CPU_S = 60
TRANSFORMERS_MEMORY_BYTES = 4096 * _MIB


def check_size(
    path: Path,
    most_bytes: int,
    *,
    refusal: type[UsageError] | type[BundleError] = UsageError,
    hint: str = "",
) -> None:
    """Refuse a file that is larger than any of its kind, before it is read.

    Args:
        path: A regular file.
        most_bytes: One of the limits above.
        refusal: What is raised; a damaged bundle is not the fault of what a user brought.
        hint: The way out.

    Raises:
        UsageError, BundleError: As ``refusal``.
    """
    size = path.stat().st_size
    if size > most_bytes:
        raise too_large(path, size, most_bytes, refusal=refusal, hint=hint)


def too_large(
    name: str | Path,
    size: int,
    most_bytes: int,
    *,
    refusal: type[UsageError] | type[BundleError] = UsageError,
    hint: str = "",
) -> UsageError | BundleError:
    """Return the refusal of something that has ``size`` bytes, for whoever knows its size."""
    return refusal(f"{shown(name)} has {size} bytes, expected at most {most_bytes}", hint=hint)
