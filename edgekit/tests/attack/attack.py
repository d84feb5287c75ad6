"""What an attack is: a place prepared once, and cases that are drawn from a seed."""

import shutil
from pathlib import Path
from random import Random
from typing import ClassVar

from edgekit.tests.attack.mutations import mutated


OTHER_PROGRAMS_S = 60.0  # a limit for cases that start transformers, llama.cpp or edgekit itself


class LeftBehindError(Exception):
    """Something is there after a refusal, a kill or a full disk that must not be."""


class BreachError(Exception):
    """Something happened that input must never bring about: code ran, a file outside changed."""


class Attack:
    """One kind of hostile input; its first line of documentation is its name in the table.

    A case ends well if it returns (what it tried was accepted) or raises an `EdgekitError` (it was
    refused). Whatever else it raises, is a fault.
    """

    share: ClassVar[float] = 1.0  # of the time, next to the others'
    limit_s: ClassVar[float] = 5.0  # longer is a hang
    memory_bytes: ClassVar[int] = 256 << 20  # more than before the case is a fault
    is_file_mutation: ClassVar[bool] = False

    def __init__(self, place: Path) -> None:
        self.place = place  # its own, to write into

    def prepare(self) -> None:
        """Write what all cases share, once.

        Raises:
            MissingDependencyError, ImportError: If the loader is not installed here.
        """

    def open(self) -> None:
        """Read that again, in each process that runs cases."""

    def case(self, random: Random) -> None:
        """Try one hostile input."""
        raise NotImplementedError

    @classmethod
    def title(cls) -> str:
        return (cls.__doc__ or cls.__name__).splitlines()[0].rstrip(".")


class DamagedFiles(Attack):
    """Files that are damaged one at a time, next to whole ones.

    `prepare` writes whole inputs into ``self.whole``, each a directory; a case takes one of them,
    mutates one of its files, and has it read.
    """

    is_file_mutation = True
    damaged: ClassVar[str] = "*"  # a glob: what is mutated

    @property
    def whole(self) -> Path:
        return self.place / "whole"

    def open(self) -> None:
        self.work = self.place / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.whole, self.work)
        self.inputs = sorted(path for path in self.work.iterdir() if path.name[0] != ".")
        self.contents = {
            directory: {path: path.read_bytes() for path in sorted(directory.glob(self.damaged))}
            for directory in self.inputs
        }
        assert all(self.contents.values()), f"{self.title()}: nothing to mutate"
        for directory in self.inputs:
            self.read(directory)  # whole, it is accepted

    def case(self, random: Random) -> None:
        directory = random.choice(self.inputs)
        path, content = random.choice(list(self.contents[directory].items()))
        other = random.choice(list(self.contents[random.choice(self.inputs)].values()))
        path.write_bytes(mutated(content, path.suffix, random, other=other))
        try:
            self.read(directory)
        finally:
            path.write_bytes(content)

    def read(self, directory: Path) -> object:
        """Have one input read by edgekit."""
        raise NotImplementedError
