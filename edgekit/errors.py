"""Everything edgekit refuses to do, and the exit status of each refusal.

EdgekitError                 1
├── UsageError               2   the request is wrong: no such target, not a checkpoint
├── BudgetError              3   nothing we can make fits, or what we made does not
├── UnstableError            4   measured, but too noisy to judge
├── MissingDependencyError   5   a package or toolchain is not installed
├── BundleError              6   the bundle is damaged or was made by another version
├── ToolchainError           7   a foreign tool failed; its last words are in ``log``
└── DisagreementError        8   the artifact does not say what the checkpoint says

Ctrl-C exits with 130, SIGTERM with 143 and SIGHUP with 129, as shells expect.
"""


class EdgekitError(Exception):
    """A refusal with its cause in the message and the way out in ``hint``."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(EdgekitError):
    """The request names something that does not exist, contradicts itself, or reads bad input."""

    exit_status = 2


class BudgetError(EdgekitError):
    """No artifact fits the budget of the target, or the one measured misses it."""

    exit_status = 3


class UnstableError(EdgekitError):
    """The measurement is too noisy to say pass or fail."""

    exit_status = 4


class MissingDependencyError(EdgekitError):
    """A package or a tool that this request needs is not installed."""

    exit_status = 5


class BundleError(EdgekitError):
    """A bundle is damaged, incomplete, or of an unknown schema version."""

    exit_status = 6


class ToolchainError(EdgekitError):
    """A foreign tool or runtime failed; ``log`` holds the tail of what it said."""

    exit_status = 7

    def __init__(self, message: str, *, hint: str = "", log: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log


class DisagreementError(EdgekitError):
    """The finished artifact does not say what the checkpoint says."""

    exit_status = 8
