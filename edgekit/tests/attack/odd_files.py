"""Put something else where a file is expected."""

import contextlib
import os
import shutil
import socket
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from edgekit.tests.attack.mutations import mutated


_SPARSE_BYTES = 80 << 20
_MOST_BYTES = 1 << 20
_NAMES = (
    "x" * 255, "\x1b[31m.json", "\u202e.safetensors", "-rf", "a b", "\udcff.json", "README.md ",
    "pytorch_model.bin", "model-00001-of-00002.safetensors", "adapter_model.bin", "..x",
    "consolidated.pth", "tokenizer.model", "processor_config.json",
)  # fmt: skip


def put(path: Path, random: Random) -> None:
    """Replace a file, or put one where none is."""
    content = b"{}"
    if stat.S_ISREG(_mode(path)):
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES)  # it may be one of ours
    if stat.S_ISDIR(_mode(path)):
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    random.choice(_ODD)(path, content, random)


def name(random: Random) -> str:
    """Return a name that a directory may hold besides the usual ones."""
    return random.choice(_NAMES)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def remove(directory: Path) -> None:
    """Remove a directory, whatever is in it."""
    shutil.rmtree(directory, ignore_errors=True)


def _directory(path: Path, _content: bytes, _random: Random) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


def _socket(path: Path, _content: bytes, _random: Random) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as made:  # a name too long
        made.bind(str(path))


def _sparse(path: Path, content: bytes, _random: Random) -> None:
    path.write_bytes(content)
    os.truncate(path, _SPARSE_BYTES)


def _linked(to: str) -> Callable[[Path, bytes, Random], None]:
    return lambda path, _content, _random: path.symlink_to(to)


def _chain(path: Path, content: bytes, _random: Random) -> None:
    """Lead to the file over more links than the system follows."""
    directory = path.parent / f"links-{zlib.crc32(os.fsencode(path.name)):08x}"
    shutil.rmtree(directory, ignore_errors=True)  # of the same name before
    directory.mkdir()
    links = [directory / str(number) for number in range(46)]
    links[0].write_bytes(content)
    for link, target in zip(links[1:], links, strict=False):
        link.symlink_to(target.name)
    path.symlink_to(f"{directory.name}/{links[-1].name}")


def _mutated(path: Path, content: bytes, random: Random) -> None:
    try:
        path.write_bytes(mutated(content, path.suffix, random, other=content[::-1]))
    except (ValueError, struct.error):  # what is to be mutated as JSON is none
        path.write_bytes(mutated(content, "", random, other=content[::-1]))


_ODD: tuple[Callable[[Path, bytes, Random], object], ...] = (
    lambda path, _content, _random: os.mkfifo(path),
    _directory,
    _socket,
    _sparse,
    _chain,
    _linked("/dev/zero"),
    _linked("/dev/full"),
    _linked("/dev/tty"),
    _linked("/etc/passwd"),
    _linked("."),
    _linked("/proc/self/mem"),
    _linked("nowhere"),
    lambda path, _content, _random: path.symlink_to(path.name),
    lambda path, _content, _random: path.write_bytes(b""),
    lambda path, content, _random: path.write_bytes(content + b"\0" * 5000),
    lambda path, content, _random: path.write_bytes(content.decode("latin-1").encode("utf-16")),
    _mutated,
    _mutated,
    _mutated,
)
