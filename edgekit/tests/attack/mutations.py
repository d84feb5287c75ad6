"""Ways to damage a file: as bytes, as text, or as the JSON that it holds."""

import json
import struct
from random import Random
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable


_DIGITS = "@digits@"  # becomes a number that Python refuses to write
_MANY_DIGITS = "9" * 5000
_DEEP = "@deep@"
_NESTED = "[" * 3000 + "]" * 3000
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1,
    2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e38, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "1e9", "None", "..", "../../x",
    "/etc/passwd", "x" * 300, "x" * 70_000, "\0", "\ud800", "\x1b[2J", "\u202e", "é", "{{ 1 }}",
    "%s%n", [], [[]], [None], [0] * 1000, [1, 2, 3], ["x"], [{}], {}, {"": None}, {"x": 1},
    {"type": "x"}, {"content": None}, _DIGITS, _DEEP,
)  # fmt: skip
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62,
            2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
_PIECES = (b"\0", b"\xff", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"}", b"[" * 200,
           b'"', b"\\", b"\\ud800", b",", b":", b"\r\n", b"'" * 3, b"= ", b"[[", b"# ", b"{{",
           b"{%", b"-", b"9" * 5000, b"1e999", b"\x1b]0;x\x07", b"NaN", b"null",
           b" " * 5000)  # fmt: skip
_HEAD_BYTES = 4096  # where most files say what they are


def mutated(content: bytes, suffix: str, random: Random, *, other: bytes = b"") -> bytes:
    """Return a file's bytes, damaged once or a few times; ``other`` is a file to splice with."""
    way = random.random()
    if suffix == ".json" and way < 0.7:
        return _as_json(content, random)
    if suffix == ".safetensors" and way < 0.5:
        return _header_as_json(content, random)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = _as_bytes(content, random, other)
    return content


def value(random: Random) -> Any:
    """Return a value that a field may not expect."""
    return random.choice(VALUES)


def _as_json(content: bytes, random: Random) -> bytes:
    tree = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree = _edited(tree, random)
    text = json.dumps(tree).replace(f'"{_DIGITS}"', _MANY_DIGITS).replace(f'"{_DEEP}"', _NESTED)
    return text.encode("utf-8", "surrogatepass")


def _edited(tree: Any, random: Random) -> Any:
    """Return the same tree with one place changed; nothing else is copied."""
    if isinstance(tree, dict) and tree and random.random() < 0.75:
        key = random.choice(list(tree))
        return _edited_object(tree, key, random)
    if isinstance(tree, list) and tree and random.random() < 0.75:
        index = random.randrange(len(tree))
        return _edited_list(tree, index, random)
    if isinstance(tree, int | float) and random.random() < 0.3:
        return tree + random.choice((-1, 1)) if abs(tree) < 2**62 else -tree
    return value(random)


def _edited_object(tree: dict[str, Any], key: str, random: Random) -> dict[str, Any]:
    match random.randrange(8):
        case 0:
            return {name: item for name, item in tree.items() if name != key}
        case 1:
            return {(str(value(random)) if name == key else name): tree[name] for name in tree}
        case 2:
            return tree | {str(value(random)): value(random)}
        case 3:
            return tree | {key: tree[random.choice(list(tree))]}
        case _:
            return tree | {key: _edited(tree[key], random)}


def _edited_list(tree: list[Any], index: int, random: Random) -> list[Any]:
    match random.randrange(8):
        case 0:
            return [*tree[:index], *tree[index + 1 :]]
        case 1:
            return [*tree[:index], tree[index], *tree[index:]]
        case 2:
            return [*tree[:index], value(random), *tree[index:]]
        case _:
            return [*tree[:index], _edited(tree[index], random), *tree[index + 1 :]]


def _header_as_json(content: bytes, random: Random) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    header = _as_json(content[8 : 8 + length], random)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _as_bytes(content: bytes, random: Random, other: bytes) -> bytes:
    first = _place(content, random)
    last = min(len(content), first + random.choice((1, 4, 8, 64, 4096)))
    before, within, after = content[:first], content[first:last], content[last:]
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: before,
        lambda: before + after,
        lambda: before + bytes(len(within)) + after,
        lambda: before + random.choice(_PIECES) + within + after,
        lambda: before + within * 2 + after,
        lambda: before + _part(other, len(within), random) + after,
        lambda: before + _flipped(within, random) + after,
        lambda: _with_number(content, first, random),
        lambda: _with_number(content, first, random),
    )
    return random.choice(ways)()


def _part(content: bytes, size: int, random: Random) -> bytes:
    first = _place(content, random)
    return content[first : first + size]


def _flipped(content: bytes, random: Random) -> bytes:
    return bytes([*(byte ^ 1 << random.randrange(8) for byte in content[:1]), *content[1:]])


def _with_number(content: bytes, first: int, random: Random) -> bytes:
    number = random.choice(_NUMBERS)
    width = random.choice([it for it in (1, 2, 4, 8) if number < 1 << 8 * it])
    word = number.to_bytes(width, random.choice(("little", "little", "big")))
    return content[:first] + word + content[first + width :]


def _place(content: bytes, random: Random) -> int:
    head = min(len(content), _HEAD_BYTES)
    return random.randrange(1 + (head if random.random() < 0.7 else len(content)))
