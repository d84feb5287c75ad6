"""Call a command of edgekit in this process, as a shell would."""

import contextlib
import io
from collections.abc import Sequence

from edgekit import cli
from edgekit.errors import UsageError
from edgekit.tests.attack.attack import BreachError


_REFUSALS = range(9)  # what `edgekit.errors` lists


class RefusedError(UsageError):
    """What a command said when it ended with the status of a refusal."""


def call(*words: object) -> str:
    """Return what a command printed.

    Raises:
        RefusedError: If it ended with the status of a refusal.
        BreachError: If it ended with another one.
    """
    said, result = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(result), contextlib.redirect_stderr(said):
        status = _status([str(word) for word in words])
    if status not in _REFUSALS:
        raise BreachError(f"status {status}: {said.getvalue()[-200:]}")
    if status:
        raise RefusedError(said.getvalue())
    return result.getvalue()


def _status(words: Sequence[str]) -> object:
    try:
        cli.main(words)
    except SystemExit as ended:
        return ended.code
