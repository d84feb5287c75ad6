"""Text from files and models, made safe to show: what would act on a terminal is written out.

A name in a manifest, a tensor or a file can hold what moves the cursor, hides a line or turns the
order of letters around. Whatever is printed passes through here; letters of all scripts stay.
"""

import re


_LINES_AND_TABS = "\n\t"
# C0, DEL and C1; the ends of lines and paragraphs; what turns the order of letters around (UAX #9);
# halves of surrogate pairs, which no terminal can be sent.
_ACTS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_ALL = re.compile(f"[{_ACTS}]")
_ALL_BUT_LINES = re.compile(rf"(?![{_LINES_AND_TABS}])[{_ACTS}]")


def visible(text: str) -> str:
    r"""Return one line for a terminal, with what would act on it as Python writes it.

    >>> print(visible("a\x1b[2Jb\nc\u202ed"))
    a\x1b[2Jb\nc\u202ed
    """
    return _ALL.sub(_escaped, text)


def visible_lines(text: str) -> str:
    r"""Return text of several lines for a terminal: line feeds and tabs stay.

    >>> print(visible_lines("a\x1b[2Jb\nc"))
    a\x1b[2Jb
    c
    """
    return _ALL_BUT_LINES.sub(_escaped, text)


def visible_json(document: str) -> str:
    r"""Return a JSON document that means the same and shows the same on a terminal.

    Whatever acts on a terminal and is not escaped stands within a string.

    >>> print(visible_json('{"a": "\x9b2J"}'))
    {"a": "\u009b2J"}
    """
    return _ALL_BUT_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", document)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
