"""What a stranger's file may cost: every limit, with its reason, in one place.

A file is asked for its size before it is read. What remains is bounded so that a refusal takes a
quarter of a gigabyte at most, or three times the file, and five seconds. What clients of a server
may cost stands at the top of `edgekit.serve`.
"""

from pathlib import Path

from edgekit.encodings.files import shown
from edgekit.errors import BundleError, UsageError


_KIB, _MIB = 1 << 10, 1 << 20

# Bytes of a file. Python takes up to 25 times as much for JSON of nothing but brackets.
SETTINGS_BYTES = 8 * _MIB  # JSON and text; the largest of a small model, Gemma 3's, has 1.2 MB
TOKENIZER_BYTES = 128 * _MIB  # tokenizer.json and other vocabularies; Gemma 3's has 33 MB
HEADER_BYTES = 8 * _MIB  # of a safetensors file, in JSON; 100 bytes a tensor, so 80,000 of them
TARGET_BYTES = 256 * _KIB  # of TOML; edgekit's own have 3 kB
TEMPLATE_BYTES = 256 * _KIB  # of Jinja; the longest known, for tools and thoughts, have 30 kB
CALIBRATION_BYTES = 64 * _MIB  # of text that a user names; some hundred kB of it are read

# In a file.
INTEGER_DIGITS = 40  # transformers writes 10^30 for "no limit"; 4,300 are where Python stops
VOCABULARY_BRACKETS = 4_000_000  # in a tokenizer.json; Gemma's merges are 600,000 lists of two
SETTINGS_BRACKETS = 400_000  # in any other JSON
TEXT_GROWTH = 16  # how many times as long a tokenizer may make a text; usual ones: at most 3
ADDED_TOKENS = 100_000  # of a tokenizer; Gemma 3 has 6,400

# Of a child process that tries a file (`edgekit.text.guarded`).
TEMPLATE_CPU_S = 2  # a compile, or a rendering; a usual one takes a millisecond
TEMPLATE_CHARACTERS = 1 << 20  # of a rendered conversation, and of any value on the way to it
TOKENIZER_CPU_S = 4  # a file of a megabyte takes 0.1 s to open
TOKENIZER_BYTES_PER_CPU_S = 4 * _MIB  # which a large file has on top; Gemma's takes 2 s
CHILD_MEMORY_BYTES = 192 * _MIB  # Python and Jinja take 15, a long conversation 50
TOKENIZER_MEMORY_PER_BYTE = 16  # which a large file has on top; measured: 11


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
