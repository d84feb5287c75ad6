"""``optimum-cli export edgekit MODEL --target NAME OUTPUT``: `edgekit export` for Optimum's users.

Optimum imports every module of ``optimum.commands.register``, a namespace package, and adds what
each lists in ``REGISTER_COMMANDS``; the wheel has this file there and not in edgekit. The options
are read off edgekit's own command, and what they mean is left to it.
"""

from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Iterator
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from edgekit.cli import export_command, main


SUMMARY = "Export a model for a device class, proven to say the same as the model."


class EdgekitExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # Optimum is untyped
    """Optimum's view of ``edgekit export``."""

    COMMAND = CommandInfo(name="edgekit", help=SUMMARY)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare what ``edgekit export`` takes; the bundle comes last, as Optimum has it."""
        parser.description = f"{SUMMARY}\n`edgekit targets` lists the device classes."
        parser.formatter_class = RawTextHelpFormatter
        parser.add_argument("model", metavar="MODEL",
                            help="Hugging Face model directory, GGUF file, or `demo`.")  # fmt: skip
        for option in _options():
            parser.add_argument(*option.opts, dest=option.name, **_as_argparse(option))
        parser.add_argument("output", metavar="OUTPUT", help="Bundle directory to create.")

    def run(self) -> None:
        """Run the command; the process ends with its exit status."""
        found = vars(self.args)
        words = [word for option in _options() for word in _words(option, found[str(option.name)])]
        main(["export", *words, "--out", found["output"], "--", found["model"]])


def _options() -> Iterator[click.Option]:
    for parameter in export_command.params:
        if isinstance(parameter, click.Option) and parameter.name != "out":
            yield parameter


def _as_argparse(option: click.Option) -> dict[str, Any]:
    """Return what argparse is to know of an option; its value is judged by click."""
    found: dict[str, Any] = {"help": (option.help or "").replace("%", "%%")}
    if option.is_flag:
        return {**found, "action": "store_true"}
    action = "append" if option.multiple else "store"
    return {**found, "action": action, "metavar": option.metavar, "required": option.required}


def _words(option: click.Option, value: bool | str | list[str] | None) -> Iterator[str]:
    """Yield an option as it was typed."""
    if isinstance(value, bool):
        yield from [option.opts[-1]] * value
        return
    for item in [value] if isinstance(value, str) else value or ():
        yield from (option.opts[-1], item)


REGISTER_COMMANDS = [(EdgekitExportCommand, ExportCommand)]
