"""A small multilingual text to compare tokenizers and models on.

Written for edgekit. It is short and uneven on purpose: scripts, code, emoji that are several code
points, numbers, composed and decomposed letters, runs of whitespace.
"""

from pathlib import Path


DIRECTORY = Path(__file__).with_name("corpus")
QUESTION = "Name the capital of France."

# What chat templates are held to: a system message, whitespace, scripts, markup.
CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": QUESTION},),
    (
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "  Which colour has the sky?\n"},
    ),
    (
        {"role": "user", "content": "안녕하세요! 你好 👋🏽"},
        {"role": "assistant", "content": "مرحبا"},
        {"role": "user", "content": "Say it\n\nagain <b>&amp;</b> {{ x }}"},
    ),
)

# Here and not in files: editors and git would clean them up.
COMPOSED_AND_NOT = (
    "na\u00efve nai\u0308ve, caf\u00e9 cafe\u0301, \u00c5 A\u030a \u212b, \u1ec7 e\u0323\u0302, "
    "\uac01 \u1100\u1161\u11a8, \u304c \u304b\u3099, \u00f1 n\u0303, "
    "z\u0310\u0351\u0348alg\u034do\n"
)
WHITESPACE = (
    " one leading space\n  two\n   three\n\tone tab\n\t\ttwo tabs\n \t mixed\n"
    "trailing space \ntrailing tab\t\nand      six      in      the      middle\n"
    "\n\n\nthree empty lines above\r\nand a carriage return\r\n\r\n"
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space, zero\u200bwidth, "
    "line\u2028separator, form\ffeed, vertical\vtab, bell\a, byte order mark \ufeffhere\n"
    "                                                                sixty-four spaces\n"
    "end with three newlines\n\n\n"
)


def texts() -> list[tuple[str, str]]:
    """Return every text with its name, in order of name."""
    files = sorted(DIRECTORY.glob("*.txt"))
    found = [(path.stem, path.read_text(encoding="utf-8")) for path in files]
    return sorted([*found, ("composed", COMPOSED_AND_NOT), ("whitespace", WHITESPACE)])


def lines() -> list[str]:
    """Return every line of every text that is not empty, without its line end."""
    return [line for _, text in texts() for line in text.splitlines() if line]
