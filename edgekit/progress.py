"""How a verb tells what it is doing, without knowing whether anybody watches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


Advance = Callable[[int], None]


class Listener(Protocol):
    """Somebody to tell; the command line draws bars, a script stays silent."""

    def say(self, line: str) -> None:
        """Tell one fact: a decision, or a result on the way."""
        ...

    def track(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Announce ``total`` units of work; the block gets a function to call with each done."""
        ...


class Silent:
    """Nobody watches."""

    def say(self, line: str) -> None:
        """Keep it."""

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Advance]:
        """Count nothing."""
        del title, total
        yield lambda _: None
