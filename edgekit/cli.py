"""The command line: parse, call one function, print.

The result goes to stdout, so that it can be piped; everything else goes to stderr. Verbs are
imported by the command that runs them, so that ``edgekit --help`` answers at once.
"""

import errno
import io
import json
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click

from edgekit import versions
from edgekit.encodings.visible import visible, visible_json, visible_lines
from edgekit.errors import BudgetError, EdgekitError, ToolchainError, UnstableError, UsageError


if TYPE_CHECKING:
    from edgekit.compare import Row
    from edgekit.formats import Layout
    from edgekit.plan import Plan
    from edgekit.progress import Advance
    from edgekit.quant.recipe import Recipe
    from edgekit.run import Reply, Runner
    from edgekit.runtime.generate import Sampling
    from edgekit.target import Target
    from edgekit.text.answer import Part


Decorated = TypeVar("Decorated", bound=Callable[..., Any])
DIRECTORY = click.Path(path_type=Path)
TARGET_HELP = "Device class: a name from `edgekit targets`, or a TOML file of your own."
CONTEXT_HELP = "Context length in tokens; default: what the bundle was exported for."
_MOST_CHARACTERS = 2000  # of a line of a refusal, which may quote what a file holds
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_TARGET_COLUMNS = (28, 10, 14, 30)  # widths: name, memory, context, formats
THREADS_HELP = "Threads to compute with, at most one a core; default: the performance cores."


class Command(click.Command):
    """A command that refuses an option given twice, where click would keep the last."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; options that may be repeated, and flags, may come again."""
        _, _, given = self.make_parser(ctx).parse_args(list(args))
        for option in given:
            is_single = isinstance(option, click.Option) and not (option.multiple or option.is_flag)
            if is_single and given.count(option) > 1:
                raise click.UsageError(f"{option.opts[-1]} is given more than once", ctx)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """The commands, each a `Command`."""

    command_class: type[click.Command] | None = Command


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(versions.EDGEKIT)
def cli() -> None:
    """Turn a fine-tuned small language model into artifacts that fit a device, and prove that they
    say the same as the model.

    \b
    Start here:
      edgekit export demo --target raspberry-pi-5-8gb -o out
      edgekit run out "Name the capital of France."
      edgekit validate out
    """  # noqa: D205 - the first sentence is the help text


def adapter_option(command: Decorated) -> Decorated:
    """Add ``--adapter``."""
    return click.option(
        "--adapter",
        "adapters",
        type=DIRECTORY,
        multiple=True,
        metavar="DIR",
        help="PEFT adapter to merge; repeat it to stack several, in this order.",
    )(command)


def chat_template_option(command: Decorated) -> Decorated:
    """Add ``--chat-template``."""
    return click.option(
        "--chat-template", metavar="NAME|FILE",
        help="Chat template: one of the model's by its name, or a file; default: the model's "
             "default one.",
    )(command)  # fmt: skip


def template_variables_option(command: Decorated) -> Decorated:
    """Add ``--template-var``."""

    def to_variables(
        _context: click.Context, _option: click.Parameter, texts: tuple[str, ...]
    ) -> dict[str, Any]:
        return template_variables(texts)

    return click.option(
        "--template-var", "template_variables", metavar="NAME=VALUE", multiple=True,
        callback=to_variables,
        help="Variable of the chat template, e.g. enable_thinking=false: JSON, or else text.",
    )(command)  # fmt: skip


def template_variables(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` of each; a value that is not JSON is text."""
    variables: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"--template-var {text!r} is not NAME=VALUE", hint="enable_thinking=false, for one"
            )
        if name in variables:
            raise UsageError(f"--template-var {name} is given more than once")
        variables[name] = _json_or_text(value)
    return variables


def _json_or_text(text: str) -> Any:
    from edgekit.encodings.json_files import parse

    if text.lower() in ("true", "false", "null", "none"):  # as people write them in Python, too
        return {"true": True, "false": False}.get(text.lower())
    if re.fullmatch(r"[+-]?(nan|infinity)", text, re.IGNORECASE):
        return text  # Python's JSON reads them as numbers
    try:
        return parse(text)
    except ValueError:
        return text


def trained_on_option(command: Decorated) -> Decorated:
    """Add ``--trained-on``."""
    return click.option(
        "--trained-on", type=DIRECTORY, metavar="DIR",
        help="4-bit base model that the adapter was trained on (QLoRA), to compare the merged "
             "model with; default: the one that the adapter names, if it is a directory here.",
    )(command)  # fmt: skip


def tokenizer_option(command: Decorated) -> Decorated:
    """Add ``--tokenizer``."""
    return click.option(
        "--tokenizer", type=click.Choice(["file", "transformers"]), default="file",
        show_default=True,
        help="Read text as tokenizer.json says, or as AutoTokenizer does where it rebuilds that.",
    )(command)  # fmt: skip


def choice_options(command: Decorated) -> Decorated:
    """Add what narrows a plan."""
    for option in (
        click.option("--context", "context_tokens", type=int, metavar="N",
                     help="Context length in tokens; default: the target's."),
        click.option("--quant", metavar="Q",
                     help="Recipe, e.g. Q4_K_M, or with changes Q4_K_M,down=Q6_K; default: the "
                     "most faithful one that fits."),
        click.option("--format", metavar="F",
                     help="Artifact format; default: the target's best that fits."),
        click.option("--target", "target_name", required=True, metavar="NAME|FILE.toml",
                     help=TARGET_HELP),
    ):  # fmt: skip
        command = option(command)
    return adapter_option(command)


def quant_method_options(command: Decorated) -> Decorated:
    """Add ``--quant-method`` and ``--no-calibration``."""
    for option in (
        click.option("--no-calibration", is_flag=True,
                     help="Round to nearest, without weighting errors by the size of the inputs: "
                     "--quant-method native."),
        click.option("--quant-method", type=click.Choice(["native", "weighted", "feedback"]),
                     help="How weights of few bits find their codes: as the format's own tool "
                     "rounds, with errors weighted by the size of the inputs (the default), or so "
                     "that codes make up for each other's errors: the closest, and the slowest."),
    ):  # fmt: skip
        command = option(command)
    return command


def split_option(command: Decorated) -> Decorated:
    """Add ``--split``."""

    def to_bytes(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
        return None if text is None else size_bytes(text, of="--split")

    return click.option(
        "--split", "split_bytes", metavar="SIZE", callback=to_bytes,
        help="Split the artifact into files of at most this size, e.g. 512MB.",
    )(command)  # fmt: skip


def variant_option(command: Decorated) -> Decorated:
    """Add ``--variant``."""
    return click.option(
        "--variant", metavar="NAME",
        help="Build of the format for a particular program on the device (`edgekit formats`); "
             "default: the target's.",
    )(command)  # fmt: skip


def compile_option(command: Decorated) -> Decorated:
    """Add ``--compile`` and ``--no-compile``."""
    return click.option(
        "--compile/--no-compile", "compiles", default=None,
        help="Compile the library with which WebLLM runs an MLC bundle; default: where none is "
             "prebuilt, and TVM and Emscripten are installed.",
    )(command)  # fmt: skip


def size_bytes(text: str, *, of: str) -> int:
    """Read ``512 MB``; the space is hard to type in a shell, so it may be left out."""
    from edgekit.units import parse_quantity

    spaced = re.sub(r"(?<=[0-9])(?=[A-Za-z])", " ", text)
    size = int(parse_quantity(spaced, of=of, dimension="bytes"))
    if size < 1:
        raise UsageError(f"{of} = {text!r} is less than one byte")
    return size


def trusted_option(command: Decorated) -> Decorated:
    """Add ``--trusted``."""
    return click.option(
        "--trusted", type=DIRECTORY, metavar="FILE",
        help="Refuse BUNDLE unless one of these keys has signed it: a public key of OpenSSH, or a "
             "list of allowed signers.",
    )(command)  # fmt: skip


def json_option(command: Decorated) -> Decorated:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


@cli.command("export")
@click.argument("model")
@choice_options
@chat_template_option
@template_variables_option
@trained_on_option
@split_option
@variant_option
@compile_option
@click.option("--calibration", type=DIRECTORY, metavar="FILE",
              help="Text like what the model will read, to calibrate on in addition to edgekit's "
                   "own.",
              )  # fmt: skip
@quant_method_options
@tokenizer_option
@click.option("-o", "--out", type=DIRECTORY, help="Bundle directory to create.")
@click.option(
    "--replace", is_flag=True, help="Replace the bundle at OUT, once the new one is complete."
)
@click.option(
    "--no-verify", is_flag=True, help="Skip the proof; such a bundle never passes validate."
)
@click.option("--sign", type=DIRECTORY, metavar="KEY",
              help="Sign the bundle with a private key of OpenSSH, or the public one of a key that "
                   "an agent holds.",
              )  # fmt: skip
@json_option
def export_command(
    model: str, target_name: str, adapters: tuple[Path, ...], format: str | None,
    quant: str | None, context_tokens: int | None, chat_template: str | None,
    template_variables: dict[str, Any], trained_on: Path | None,
    split_bytes: int | None, variant: str | None, compiles: bool | None,
    calibration: Path | None, no_calibration: bool, quant_method: str | None, tokenizer: str,
    out: Path | None,
    replace: bool, no_verify: bool, sign: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Export MODEL for a device, and prove that the artifact says what MODEL says.

    MODEL is a Hugging Face model directory, a GGUF file, or `demo`. The most faithful recipe that
    fits the budget of the target is chosen, converted, run in its real runtime and compared. The
    hashes in a bundle's manifest are a checksum, not a signature; --sign makes one.

    \b
    Examples:
      edgekit export demo --target raspberry-pi-5-8gb
      edgekit export ./my-model --adapter ./my-lora --target android-high --quant Q4_K_M
      edgekit export ./model.gguf --target ./my-board.toml -o out/my-board
      edgekit export demo --target raspberry-pi-5-8gb --split 512MB
      edgekit export demo --target raspberry-pi-5-8gb --sign ~/.ssh/id_ed25519
    """
    from edgekit.export import export

    bundle = export(
        model, target_name, adapters=adapters, format=format, quant=quant,
        context_tokens=context_tokens, split_bytes=split_bytes, variant=variant, compile=compiles,
        chat_template=chat_template, template_variables=template_variables,
        trained_on=trained_on, calibration=calibration, calibrate=not no_calibration,
        quant_method=quant_method,
        tokenizer=tokenizer, out=out, replace=replace, verify=not no_verify, sign=sign,
        listener=Terminal(),
    )  # fmt: skip
    if as_json:
        print_json(bundle)
    else:
        echo(bundle.directory)


@cli.command("plan")
@click.argument("model")
@choice_options
@chat_template_option
@template_variables_option
@variant_option
@compile_option
@quant_method_options
@tokenizer_option
@json_option
def plan_command(
    model: str, target_name: str, adapters: tuple[Path, ...], format: str | None,
    quant: str | None, context_tokens: int | None, chat_template: str | None,
    template_variables: dict[str, Any], variant: str | None, compiles: bool | None,
    no_calibration: bool, quant_method: str | None, tokenizer: str, as_json: bool,
) -> None:  # fmt: skip
    """Show what `export` would make of MODEL, what it would cost, and why the rest is rejected.

    MODEL may also be a directory with nothing but a config.json, the name of a published model
    (Qwen2.5-1.5B), or a size (3b): then all published models of that size are compared.
    """
    from edgekit.compare import compare, is_size
    from edgekit.plan import plan
    from edgekit.target import load

    target = load(target_name)
    if is_size(model):
        rows = compare([model], [target], format=format, quant=quant,
                       context_tokens=context_tokens, calibrate=not no_calibration,
                       quant_method=quant_method)  # fmt: skip
        print_rows(rows, as_json=as_json)
        return
    made = plan(
        model, target, adapters=adapters, format=format, quant=quant,
        context_tokens=context_tokens, chat_template=chat_template,
        template_variables=template_variables, variant=variant, compile=compiles,
        calibrate=not no_calibration, quant_method=quant_method,
        tokenizer=tokenizer, listener=Terminal(),
    )  # fmt: skip
    if as_json:
        print_json(plan_document(made))
        return
    for line in plan_lines(made, target):
        echo(line)


def plan_document(made: "Plan") -> dict[str, Any]:
    """Return a plan for programs, under the keys that it was first written with."""
    return {
        "format": made.format,
        "recipe": _recipe_document(made.recipe),
        "context_tokens": made.context_tokens,
        "layout": _layout_document(made.layout),
        "estimate": made.estimate,
        "quant_method": made.quant_method,
        "rejected": [
            {
                "format": candidate.format,
                "recipe": _recipe_document(candidate.recipe),
                "context": candidate.context,
                "layout": candidate.layout and _layout_document(candidate.layout),
                "estimate": candidate.estimate,
                "misses": candidate.misses,
                "sure_misses": candidate.certain_misses,
                "refusal": candidate.refusal and str(candidate.refusal),
            }
            for candidate in made.rejected
        ],
        "notes": made.notes,
        "split_bytes": made.split_bytes,
    }


def _recipe_document(recipe: "Recipe") -> dict[str, Any]:
    rules = [
        {
            "pattern": rule.pattern,
            "storage": rule.tensor_type,
            "layers": rule.layers,
            "decoders": rule.decoders,
        }
        for rule in recipe.rules
    ]
    fields = {name: getattr(recipe, name) for name in recipe.__dataclass_fields__}
    changes = {change.role: change.tensor_type for change in recipe.changes}
    return fields | {"rules": rules, "changes": changes}


def _layout_document(layout: "Layout") -> dict[str, Any]:
    placements = [
        {
            "role": weight.role,
            "parameters": weight.parameters,
            "storage": weight.tensor_type,
            "wanted": weight.wanted,
            "size_bytes": weight.size_bytes,
        }
        for weight in layout.placements
    ]
    fields = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
    return fields | {"placements": placements}


def plan_lines(made: "Plan", target: "Target") -> Iterator[str]:
    """Yield a plan as a table: each limit of the target next to what is expected."""
    from edgekit.plan import grounds, remarks
    from edgekit.units import format_bytes, format_duration, format_rate

    estimate, budget, memory = made.estimate, target.budget, made.estimate.memory
    exact = "exactly" if made.layout.is_exact else "about"
    yield f"{made.format} {made.recipe.full_name} for {target.title}, {made.context_tokens} tokens"
    if made.quant_method:
        yield f"quant method: {made.quant_method}"
    yield f"{'':<24}{'expected':<34}limit"
    yield (
        f"{'to download':<24}{exact + ' ' + format_bytes(estimate.artifact_bytes):<34}"
        f"{format_bytes(budget.artifact_bytes)}"
    )
    yield (
        f"{'memory':<24}{format_bytes(memory.peak_bytes):<34}"
        f"{format_bytes(budget.peak_memory_bytes)}"
    )
    for name in ("weights", "cache", "compute", "runtime"):
        yield f"{'  ' + name:<24}{format_bytes(getattr(memory, name + '_bytes'))}"
    rate = estimate.decode_tokens_per_s
    yield (
        f"{'decode':<24}{format_rate(rate.low) + ' to ' + format_rate(rate.high):<34}"
        f"{format_rate(budget.decode_tokens_per_s)}"
    )
    for limit in budget.first_token:
        first = estimate.first_token_s[limit.prompt_tokens]
        name = f"first token after {limit.prompt_tokens}"
        between = f"{format_duration(first.low)} to {format_duration(first.high)}"
        yield f"{name:<24}{between:<34}{format_duration(limit.limit_s)}"
    yield grounds(target)
    yield from remarks(made)


@cli.command("compare")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--target", "target_names", multiple=True, metavar="NAME|FILE.toml",
              help=f"{TARGET_HELP} May be given several times.")  # fmt: skip
@click.option("--all-targets", is_flag=True, help="Every target that edgekit knows.")
@click.option("--all-quants", is_flag=True,
              help="A row for each recipe of each format, instead of the one that a plan takes.",
              )  # fmt: skip
@click.option("--format", metavar="F", help="Consider only this artifact format.")
@click.option("--quant", metavar="Q", help="Consider only this recipe.")
@click.option("--context", "context_tokens", type=int, metavar="N",
              help="Context length in tokens; default: each target's.")  # fmt: skip
@quant_method_options
@click.option("--csv", "as_csv", is_flag=True, help="Print one table as CSV, in plain units.")
@click.option("--html", type=DIRECTORY, metavar="FILE", help="Also write a page with a picture.")
@json_option
def compare_command(
    models: tuple[str, ...], target_names: tuple[str, ...], all_targets: bool, all_quants: bool,
    format: str | None, quant: str | None, context_tokens: int | None, no_calibration: bool,
    quant_method: str | None,
    as_csv: bool, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare what could be made of each MODEL for each target.

    MODEL is what `plan` takes: weights are not needed.

    \b
    Examples:
      edgekit compare 3b --target raspberry-pi-5-8gb
      edgekit compare Qwen3-1.7B SmolLM2-1.7B --target android-mid-8gb --all-quants
      edgekit compare ./my-model --all-targets --csv
    """
    from edgekit import target
    from edgekit.compare import compare

    if bool(target_names) == all_targets:
        raise UsageError("say which targets: --target NAME, or --all-targets")
    names = target.names() if all_targets else target_names
    rows = compare(
        models, names, format=format, quant=quant, context_tokens=context_tokens,
        every_recipe=all_quants, calibrate=not no_calibration, quant_method=quant_method,
        listener=Terminal(),
    )  # fmt: skip
    print_rows(rows, as_json=as_json, as_csv=as_csv)
    if html is not None:
        from edgekit.comparison_page import as_html

        write_report(html, as_html(rows))


def print_rows(rows: "Sequence[Row]", *, as_json: bool, as_csv: bool = False) -> None:
    """Print a comparison: for people, or for programs, where every number has a plain unit."""
    if as_json:
        print_json([row_document(row) for row in rows])
    elif as_csv:
        import csv

        writer = csv.DictWriter(sys.stdout, row_document(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row_document(row) for row in rows)
    else:
        for line in comparison_lines(rows):
            echo(line)


def row_document(row: "Row") -> dict[str, Any]:
    """Return one row of a comparison for programs."""
    estimate = row.estimate
    rate = estimate.decode_tokens_per_s if estimate else None
    first = next(iter(estimate.first_token_s.items())) if estimate else None
    return {
        "model": row.model,
        "parameters": row.parameters,
        "target": row.target,
        "format": row.format,
        "recipe": row.recipe,
        "bits_per_weight": round(row.bits_per_weight, 2),
        "demo_kl_nats": row.demo_kl_nats,
        "context_tokens": row.context_tokens,
        "artifact_bytes": estimate and estimate.artifact_bytes,
        "memory_bytes": estimate and estimate.memory.peak_bytes,
        "decode_tokens_per_s": rate and round(rate.likely, 2),
        "first_token_prompt_tokens": first and first[0],
        "first_token_s": first and round(first[1].likely, 3),
        "fits": row.fits,
        "is_chosen": row.is_chosen,
        "misses": "; ".join(row.misses),
    }


def comparison_lines(rows: "Sequence[Row]") -> Iterator[str]:
    """Yield a comparison as a table: what a plan would choose has a star."""
    head = ("model", "target", "recipe", "to download", "memory", "decode", "first token", "fits")
    table = [head]
    for row in rows:
        star = " *" if row.is_chosen else ""
        name = f"{row.format} {row.recipe}{star}".strip()
        table.append((row.model, row.target, name, *row.costs, row.verdict))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        yield "  ".join(padded).rstrip()
    if any(row.is_chosen for row in rows):
        yield "* what a plan takes"


def piped_prompt() -> str:
    """Return what standard input holds, which may be endless, or no text."""
    from edgekit.encodings.limits import PROMPT_CHARACTERS

    try:
        text = sys.stdin.read(PROMPT_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text in UTF-8: {error.reason}") from error
    if len(text) > PROMPT_CHARACTERS:
        raise UsageError(
            f"standard input has more than {PROMPT_CHARACTERS} characters",
            hint="no context holds as much; pass a part of it",
        )
    return text.strip()


@cli.command("run")
@click.argument("bundle", type=DIRECTORY)
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--max-tokens", type=int, default=512, show_default=True, metavar="N",
              help="Length of the answer at most.")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="Sample from the K most likely; 0: all.")
@click.option(
    "--top-p", type=float, default=1.0, help="Sample from the most likely, up to this total."
)
@click.option(
    "--min-p", type=float, default=0.0, help="Drop what is less likely than this share of the top."
)
@click.option("--repetition-penalty", type=float, default=1.0, help="1: none.")
@click.option("--seed", type=int, help="Sample the same tokens every time.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the template.")
@click.option("--no-reasoning", is_flag=True,
              help="Do not print on standard error what the model thinks before it answers.",
              )  # fmt: skip
@template_variables_option
@click.option("--context", "context_tokens", type=int, metavar="N", help=CONTEXT_HELP)
@click.option("--threads", type=int, metavar="N", help=THREADS_HELP)
@click.option("--device", default="this", show_default=True, metavar="this|browser",
              help="What computes; browser?backend=wasm does without its GPU.")  # fmt: skip
@trusted_option
@json_option
def run_command(
    bundle: Path, prompt: str | None, system: str | None, max_tokens: int, temperature: float,
    top_k: int, top_p: float, min_p: float, repetition_penalty: float, seed: int | None,
    stop: tuple[str, ...], raw: bool, no_reasoning: bool, template_variables: dict[str, Any],
    context_tokens: int | None, threads: int | None, device: str, trusted: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Answer PROMPT with BUNDLE; without PROMPT, chat.

    \b
    Examples:
      edgekit run out "Name the capital of France."
      echo "Translate: good morning" | edgekit run out --json
      edgekit run out --temperature 0.7 --top-p 0.9
      edgekit run out "Hi" --device browser
    """
    from edgekit.run import Runner, answer
    from edgekit.runtime.generate import Sampling

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    if raw and template_variables:
        raise UsageError("--raw and --template-var exclude each other")
    if prompt is None and not sys.stdin.isatty():
        prompt = piped_prompt()
    with Runner.open(
        bundle, context_tokens=context_tokens, threads=threads, trusted=trusted,
        template_variables=template_variables, device=device,
    ) as runner:  # fmt: skip
        if prompt is None:
            chat(runner, system=system, max_tokens=max_tokens, sampling=sampling, stop=stop,
                 shows_reasoning=not no_reasoning)  # fmt: skip
            return
        reply = answer(
            runner, prompt, system=system, max_tokens=max_tokens, sampling=sampling, stop=stop,
            raw=raw,
        )  # fmt: skip
        for note in reply.notes:
            echo(f"note: {note}", err=True)
        if as_json:
            "".join(reply)
            print_json(reply.answer)
        else:
            print_stream(iter(reply.next_part, None), shows_reasoning=not no_reasoning)
        for note in runner.device_notes():
            echo(f"note: {note}", err=True)


def print_stream(parts: Iterable["Part"], *, shows_reasoning: bool = True) -> None:
    """Print an answer as it comes, and before it to standard error what the model thinks."""
    is_thinking = False
    for part in parts:
        if is_thinking and not part.is_thought:
            echo(err=True)
        is_thinking = part.is_thought and shows_reasoning
        if is_thinking:
            click.secho(visible_lines(part.text), nl=False, err=True, dim=True, color=_color())
        elif not part.is_thought:
            click.echo(visible_lines(part.text), nl=False)
            sys.stdout.flush()
    if is_thinking:
        echo(err=True)
    echo()


def chat(
    runner: "Runner", *, system: str | None, max_tokens: int, sampling: "Sampling",
    stop: Sequence[str], shows_reasoning: bool,
) -> None:  # fmt: skip
    """Talk until the end of input; Ctrl-C cuts an answer short, at the prompt it ends the chat."""
    from edgekit.run import Chat

    talk = Chat(
        runner=runner, system=system, max_tokens=max_tokens, sampling=sampling, stop=tuple(stop)
    )
    echo(f"{runner.bundle.model.name}; /clear forgets the conversation, Ctrl-D leaves", err=True)
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            echo(err=True)
            return
        if said == "/clear":
            talk.clear()
        elif said:
            say(talk.say(said), shows_reasoning=shows_reasoning)


def say(reply: "Reply", *, shows_reasoning: bool = True) -> None:
    """Print one answer of a chat; Ctrl-C cuts it short and the chat goes on."""
    try:
        print_stream(iter(reply.next_part, None), shows_reasoning=shows_reasoning)
    except KeyboardInterrupt:
        reply.close()
        echo(" …")


@cli.command("validate")
@click.argument("bundle", type=DIRECTORY)
@click.option("--target", "target_name", metavar="NAME|FILE.toml",
              help="Whose budget to enforce; default: the target it was exported for.")  # fmt: skip
@click.option("--device", default="this", show_default=True, metavar="this|browser|ssh://USER@HOST",
              help="Where to measure.")  # fmt: skip
@click.option("--repetitions", type=int, default=5, show_default=True,
              help="Fresh processes to start with; doubled while more may decide.")  # fmt: skip
@click.option("--threads", type=int, metavar="N",
              help="Threads to compute with; default: the target's.")  # fmt: skip
@click.option("--measurement", type=DIRECTORY, metavar="FILE",
              help="Judge what an app measured on its device; measure nothing.")  # fmt: skip
@click.option(
    "--html", type=DIRECTORY, metavar="FILE", help="Write a report with plots as one HTML page."
)
@click.option("--junit", type=DIRECTORY, metavar="FILE", help="Write a report as JUnit XML.")
@trusted_option
@json_option
def validate_command(
    bundle: Path, target_name: str | None, device: str, repetitions: int, threads: int | None,
    measurement: Path | None, html: Path | None, junit: Path | None, trusted: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure BUNDLE on a device and compare it with the budget of its target.

    \b
    Exit status: 0 pass, 3 over budget, 4 no verdict, as the measurement is unstable or in doubt.
    Examples:
      edgekit validate out
      edgekit validate out --device ssh://pi@raspberrypi.local --html report.html
      edgekit validate out --device browser
      edgekit validate out --measurement phone.json
    """
    from edgekit.bundle.manifest import Bundle
    from edgekit.measuring import report
    from edgekit.target import load
    from edgekit.validate import judge_document, validate

    terminal = Terminal()
    target = load(target_name or Bundle.load(bundle, check_hashes=False, trusted=trusted).target)
    if measurement:
        result = judge_document(bundle, target, measurement, trusted=trusted)
    else:
        with terminal.counted("measure") as progress:
            result = validate(
                bundle, target, device=device, repetitions=repetitions, threads=threads,
                trusted=trusted, progress=progress, listener=terminal,
            )  # fmt: skip
    if as_json:
        echo_json(report.as_json(result))
    else:
        echo_lines(report.as_text(result))
    for path, write in ((html, report.as_html), (junit, report.as_junit)):
        if path:
            write_report(path, write(result))
            echo(path, err=True)
    raise_outcome(result.verdict.outcome, bundle, target.name)


def write_report(path: Path, text: str) -> None:
    """Write a report, whole or not at all."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink()  # half of it
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="choose another place for it"
        ) from error


def raise_outcome(outcome: str, bundle: Path, target: str) -> None:
    """Turn what is not a pass into its exit status."""
    if outcome == "fail":
        raise BudgetError(f"{bundle} does not meet the budget of {target}")
    if outcome == "unstable":
        raise UnstableError(
            f"the measurement allows no verdict on {bundle} for {target}",
            hint="close other programs, let the device cool down, and try again",
        )


@cli.command("verify")
@click.argument("bundle", type=DIRECTORY)
@click.argument("model")
@adapter_option
@chat_template_option
@tokenizer_option
@trusted_option
@json_option
def verify_command(
    bundle: Path,
    model: str,
    adapters: tuple[Path, ...],
    chat_template: str | None,
    tokenizer: str,
    trusted: Path | None,
    as_json: bool,
) -> None:
    """Prove again that BUNDLE says what MODEL says."""
    from edgekit.errors import DisagreementError
    from edgekit.verify import verify

    agreement = verify(
        bundle,
        model,
        adapters=adapters,
        chat_template=chat_template,
        tokenizer=tokenizer,
        trusted=trusted,
        listener=Terminal(),
    )
    if as_json:
        print_json(agreement)
    else:
        for gate in agreement.gates:
            echo(gate.line)
    if not agreement.passed:
        raise DisagreementError(f"{bundle} does not say what {model} says")


@cli.command("merge")
@click.argument("model")
@adapter_option
@chat_template_option
@trained_on_option
@tokenizer_option
@click.option("-o", "--out", type=DIRECTORY, required=True, help="Directory to create.")
@click.option("--precision", type=click.Choice(["bf16", "f16", "f32"]),
              help="Tensor type to write; default: the one each tensor of MODEL has.")  # fmt: skip
def merge_command(
    model: str, adapters: tuple[Path, ...], chat_template: str | None, trained_on: Path | None,
    tokenizer: str, out: Path, precision: Any,
) -> None:  # fmt: skip
    """Write MODEL with its adapters merged in, as an ordinary checkpoint."""
    from edgekit.merge import merge

    made = merge(
        model, adapters, out, precision=precision, trained_on=trained_on,
        chat_template=chat_template, tokenizer=tokenizer, listener=Terminal(),
    )  # fmt: skip
    echo(made)


@cli.command("inspect")
@click.argument("path", type=DIRECTORY)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@trusted_option
@json_option
def inspect_command(path: Path, tensors: bool, trusted: Path | None, as_json: bool) -> None:
    """Print what a bundle or an artifact file really contains, and who signed it."""
    from edgekit.inspect import inspect, lines

    inspection = inspect(path, trusted=trusted)
    if as_json:
        print_json(inspection)
    else:
        for line in lines(inspection, lists_tensors=tensors):
            echo(line)


@cli.command("serve")
@click.argument("bundle", type=DIRECTORY)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8080, show_default=True)
@click.option("--allow-remote", is_flag=True, help="Allow a --host that other machines can reach.")
@click.option(
    "--host-name",
    "host_names",
    multiple=True,
    metavar="NAME",
    help="Another name by which they call this machine (may be repeated); others are refused.",
)
@click.option(
    "--api-key",
    envvar="EDGEKIT_API_KEY",
    metavar="KEY",
    help="Key that clients must send; needed with --allow-remote.",
)
@click.option("--no-key", is_flag=True, help="Let other machines use the model without a key.")
@click.option("--threads", type=int, metavar="N", help=THREADS_HELP)
@click.option("--context", "context_tokens", type=int, metavar="N", help=CONTEXT_HELP)
@template_variables_option
@trusted_option
def serve_command(
    bundle: Path, host: str, port: int, allow_remote: bool, host_names: tuple[str, ...],
    api_key: str | None, no_key: bool,
    threads: int | None, context_tokens: int | None, template_variables: dict[str, Any],
    trusted: Path | None,
) -> None:  # fmt: skip
    """Serve BUNDLE over HTTP as OpenAI's clients expect it: /v1/chat/completions and more."""
    from edgekit.serve import serve

    serve(
        bundle, host=host, port=port, allow_remote=allow_remote, host_names=host_names,
        api_key=api_key, no_key=no_key,
        threads=threads, context_tokens=context_tokens, template_variables=template_variables,
        trusted=trusted,
    )  # fmt: skip


@cli.command("targets")
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of target files.")
@json_option
def targets_command(name: str | None, schema: bool, as_json: bool) -> None:
    """List the targets edgekit knows, or show one with the origin of every number."""
    from edgekit import target

    if schema:
        print_json(target.json_schema())
    elif name is None and as_json:
        print_json(target.titles())
    elif name is None:
        for line in target_table():
            echo(line)
    elif as_json:
        print_json(target.load(name))
    else:
        for line in target_lines(target.load(name)):
            echo(line)


@cli.command("calibrate-target")
@click.argument("reports", nargs=-1, required=True, type=DIRECTORY, metavar="REPORT.json...")
@click.option("--target", "target_name", metavar="NAME|FILE.toml",
              help="What they were measured as, if that is a file of your own.")  # fmt: skip
@click.option("--title", metavar="TEXT", help="What the device is called.")
def calibrate_target_command(
    reports: tuple[Path, ...], target_name: str | None, title: str | None
) -> None:
    """Print a target file with the speeds that a device was measured at.

    Each REPORT.json is what `validate BUNDLE --json` printed on the device, for a bundle that was
    exported for the target nearest to it. Bundles of different sizes and recipes make the fit
    better; how far it is from each of them is told.

    \b
    Examples:
      edgekit calibrate-target q8.json q4.json --title "My board" > my-board.toml
    """
    from edgekit.calibrate_target import calibrate_target

    fit = calibrate_target(reports, target=target_name, title=title)
    for bundle, error in fit.decode_errors.items():
        faster = "faster" if error >= 0 else "slower"
        echo(f"{bundle}: a plan is {abs(error):.0%} {faster} than what was measured", err=True)
    echo_lines(fit.text.rstrip("\n"))


def target_table() -> Iterator[str]:
    """Yield the targets as a table; a file that is wrong says so in its row."""
    from edgekit import target
    from edgekit.units import format_bytes

    yield _target_row("target", "memory", "context", "formats", "device")
    for name in target.names():
        try:
            known = target.load(name)
        except UsageError as error:
            yield f"{name:<{_TARGET_COLUMNS[0]}}{error}"
            continue
        memory, context = format_bytes(known.memory_bytes), f"{known.budget.context_tokens} tokens"
        yield _target_row(name, memory, context, ", ".join(known.formats), known.title)


def _target_row(*cells: str) -> str:
    widths = (*_TARGET_COLUMNS, 0)
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))


def target_lines(target: "Target") -> Iterator[str]:
    """Yield a target's numbers as its file names them, each with where it comes from."""
    from edgekit.target import quantities

    yield f"{target.name}: {target.title} ({target.soc})"
    yield f"formats, best first: {', '.join(target.formats)}"
    for quantity in quantities(target):
        origin = quantity.origin
        yield (
            f"  {quantity.key:<32}{quantity.value:<16}  "
            f"{origin.basis}, {origin.source} ({origin.date})"
        )


@cli.command("formats")
@json_option
def formats_command(as_json: bool) -> None:
    """List the artifact formats and what each can store."""
    from edgekit import formats

    recipes_by_format = {
        name: {recipe: fmt.RECIPES[recipe].default for recipe in fmt.RECIPES}
        for name, fmt in formats.get_all()
    }
    if as_json:
        print_json(recipes_by_format)
    else:
        for name, recipes in recipes_by_format.items():
            echo(f"{name:<12}{', '.join(recipes)}{_variants(name)}")


def _variants(name: str) -> str:
    """Return the builds of a format for a line of a list, those apart that no program here runs."""
    from edgekit import formats

    variants, running = formats.get(name).VARIANTS, formats.running(name)
    here = [variant for variant in variants if running.is_run_here(variant)]
    there = [variant for variant in variants if variant not in here]
    groups = {"variants": here, "not executed here": there}
    lists = "; ".join(f"{title}: {', '.join(names)}" for title, names in groups.items() if names)
    return f"  ({lists})" if lists else ""


@cli.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Check what is installed and what works, and say how to fix the rest."""
    from edgekit.doctor import doctor

    findings = doctor(listener=Terminal())
    if as_json:
        print_json(findings)
        return
    for finding in findings:
        echo(f"{finding.state:<8}{finding.name:<24}{finding.found}")
        if finding.way_out:
            echo(f"{'':<32}{finding.way_out}")


def echo(line: object = "", *, err: bool = False) -> None:
    """Print one line; everything that may come from a file or a model is printed by `echo*`."""
    click.echo(visible(str(line)), err=err)


def echo_lines(text: str, *, err: bool = False) -> None:
    """Print text whose lines are its own."""
    click.echo(visible_lines(text), err=err)


def echo_json(document: str) -> None:
    """Print a JSON document."""
    click.echo(visible_json(document))


def print_json(value: Any) -> None:
    """Print one JSON document."""
    echo_json(json.dumps(plain(value), indent=2, ensure_ascii=False))


def plain(value: Any) -> Any:
    """Return dataclasses as objects and paths as text, all the way down."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class Terminal:
    """Tells a person at the terminal what happens: lines, and bars where they can move."""

    def say(self, line: str) -> None:
        """Print one line on stderr."""
        echo(line, err=True)

    @contextmanager
    def track(self, title: str, total: int) -> "Iterator[Advance]":
        """Show a bar where it can move; and a line with the time when the work is done."""
        started = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress

            with Progress(console=Console(stderr=True), transient=True) as bars:
                task = bars.add_task(escape(visible(title)), total=total)
                yield lambda done: bars.advance(task, done)
        else:
            yield lambda _: None
        self.say(f"{title}: {time.monotonic() - started:.1f} s")

    @contextmanager
    def counted(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar whose total may grow."""
        if not sys.stderr.isatty():
            yield lambda _done, _total: None
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)


class _Ended(SystemExit):
    """SIGTERM or SIGHUP, as an exception that cleans up on its way and that nothing catches."""


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what runs as Ctrl-C does; one that is ignored stays so (nohup)."""

    def end(number: int, _: object) -> None:
        for signal_number in former:
            signal.signal(signal_number, signal.SIG_IGN)  # cleaning up is not ended twice
        raise _Ended(128 + number)  # the status that shells expect

    ending = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]  # Windows has one
    former = {number: signal.getsignal(number) for number in ending if number is not None}
    former = {number: before for number, before in former.items() if before == signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        former = {}  # Python tells only the main thread
    for number in former:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the status of the refusal, if there was one."""
    _open_streams()
    try:
        with _ending_on_signals():
            _run(argv)
    finally:
        _drop_unwritten_words()
    sys.exit(0)


def _open_streams() -> None:
    """Lead streams that are closed nowhere: a file opened next would get what is printed."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


@contextmanager
def _refusing_full_streams() -> Iterator[None]:
    """Say it in a sentence where the result cannot be written, to the last line of it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        _lead_nowhere(sys.stdout)
        raise EdgekitError(
            f"cannot write: {error.strerror}", hint="free some space, or write it elsewhere"
        ) from error


def _drop_unwritten_words() -> None:
    """Forget what stderr does not take: Python 3.13 and 3.14 end with 120 over it."""
    try:
        sys.stderr.flush()
    except OSError:
        _lead_nowhere(sys.stderr)


def _lead_nowhere(stream: TextIO) -> None:
    """Drop what is still to be written, so that the end does not fail over it again."""
    with suppress(OSError):  # of a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(argv: Sequence[str] | None) -> None:
    try:
        with _refusing_full_streams():
            cli.main(args=None if argv is None else list(argv), prog_name="edgekit",
                     standalone_mode=False)  # fmt: skip
    except EdgekitError as error:
        print_refusal(error)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        echo_lines(said.getvalue().rstrip("\n"), err=True)
        sys.exit(UsageError.exit_status)
    except (click.Abort, KeyboardInterrupt):
        with suppress(OSError):
            echo("interrupted", err=True)
        sys.exit(130)
    except _Ended:
        with suppress(OSError):  # the terminal may be what went
            echo("interrupted", err=True)
        raise
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # whoever read has left; so do we
            _lead_nowhere(stream)
        sys.exit(141)
    except BaseException as error:
        from edgekit.text.guarded import is_panic

        if not is_panic(error):  # over what a tokenizer was not tried on before it was used
            raise
        print_refusal(ToolchainError(f"a library fails over this input: {error}"))
        sys.exit(ToolchainError.exit_status)


def _color() -> bool | None:
    """Return what decides about colours: None leaves it to whether it is a terminal."""
    return False if os.environ.get("NO_COLOR") else None  # https://no-color.org


def print_refusal(error: EdgekitError) -> None:
    """Print what was found, what was expected, and the way out, if it can be printed."""
    with suppress(OSError):  # the status says it too
        _print_refusal(error)


def _print_refusal(error: EdgekitError) -> None:
    from edgekit.encodings.files import shown

    first, *rest = str(error).split("\n")
    # Further lines are indented, so that none can pass for another message.
    rest = [line if line.startswith(" ") else f"  {line}" for line in rest]
    lines = [shown(line, _MOST_CHARACTERS) for line in (f"error: {first}", *rest)]
    said = visible_lines("\n".join(lines))
    click.secho(said, fg="red", err=True, color=_color())
    if isinstance(error, ToolchainError) and error.log:
        echo_lines(error.log, err=True)
    if error.hint:
        echo(shown(f"hint: {error.hint}", _MOST_CHARACTERS), err=True)
