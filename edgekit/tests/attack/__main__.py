"""Attack edgekit for so many seconds, print what it did, and fail if it did anything wrong."""

import argparse
import importlib
import inspect
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgekit.tests.attack import kinds
from edgekit.tests.attack.attack import Attack
from edgekit.tests.attack.running import EVERY, FAULTS, Count, run


_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - truncating a file on a disk takes milliseconds
_MOST_SHOWN = 3  # faults of one cause


def main(argv: Sequence[str] | None = None) -> int:
    """Run the attacks and return the exit status: 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.tests.attack", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of all attacks together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="REGEX", help="attacks with such a name")
    parser.add_argument("--files", action="store_true", help="mutated files only")
    parser.add_argument("--case", type=int, help="one case, as a fault names it")
    options = parser.parse_args(argv)
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    attacks = [
        attack
        for attack in found()
        if re.search(options.only, attack.title(), re.IGNORECASE)
        and (attack.is_file_mutation or not options.files)
    ]
    counts = []
    for count in _counts(attacks, options):
        counts.append(count)
        _say(_row(count), *_faults(count, options.seed))
    _say("", *_table(counts))
    return int(not counts or any(count.faults for count in counts))


def found() -> Iterator[type[Attack]]:
    """Yield every attack there is, in order of its module."""
    for module in pkgutil.iter_modules(kinds.__path__, f"{kinds.__name__}."):
        for _, attack in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            is_own = attack.__module__ == module.name and not attack.__name__.startswith("_")
            if issubclass(attack, Attack) and is_own:
                yield attack


def _counts(attacks: Sequence[type[Attack]], options: argparse.Namespace) -> Iterator[Count]:
    shares = sum(attack.share for attack in attacks)
    in_memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    first = options.case or 0
    numbers = range(first, EVERY if options.case is None else first + 1)
    with tempfile.TemporaryDirectory(prefix="attack-", dir=in_memory) as directory:
        for number, attack in enumerate(attacks):
            place = Path(directory) / str(number)
            place.mkdir()
            seconds = options.seconds * attack.share / shares
            yield run(attack(place), seed=options.seed, seconds=seconds, numbers=numbers)


def _table(counts: Sequence[Count]) -> Iterator[str]:
    """Yield a table in Markdown: a row for each attack, and sums."""
    yield f"| input | tried | refused | accepted | {' | '.join(FAULTS)} |"
    yield f"|---|{'---:|' * (3 + len(FAULTS))}"
    yield from map(_row, counts)
    yield _row(_sum("mutated files together", [it for it in counts if it.is_file_mutation]))
    yield _row(_sum("together", counts))


def _row(count: Count) -> str:
    if count.skipped:
        return f"| {count.title} | skipped: {count.skipped} |"
    numbers = (count.tried, count.refused, count.accepted, *map(count.of, FAULTS))
    return f"| {count.title} | {' | '.join(f'{number:,}' for number in numbers)} |"


def _sum(title: str, counts: Sequence[Count]) -> Count:
    return Count(
        title,
        is_file_mutation=False,
        tried=sum(count.tried for count in counts),
        refused=sum(count.refused for count in counts),
        accepted=sum(count.accepted for count in counts),
        faults=[fault for count in counts for fault in count.faults],
    )


def _faults(count: Count, seed: int) -> Iterator[str]:
    """Yield each cause once, with what tries it again."""
    for cause in dict.fromkeys(fault.cause for fault in count.faults):
        alike = [fault for fault in count.faults if fault.cause == cause]
        numbers = ", ".join(str(fault.number) for fault in alike[:_MOST_SHOWN])
        yield f"  {alike[0].kind}: {cause}, {len(alike)} times: cases {numbers}"
        yield f"    --seed {seed} --only '^{re.escape(count.title)}$' --case {alike[0].number}"
        yield from (f"    {line}" for line in alike[0].log.splitlines())


def _say(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
