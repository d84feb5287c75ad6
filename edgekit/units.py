"""Read and print quantities; inside edgekit a number carries its unit in its name.

``peak_memory_bytes``, ``load_s``, ``decode_tokens_per_s``: strings such as ``"1.5 GiB"`` exist only
in target files, on the command line and on the screen.
"""

import difflib
import re
from decimal import Decimal
from typing import Literal, get_args

from edgekit.encodings.files import shown
from edgekit.errors import UsageError


Dimension = Literal[
    "bytes", "seconds", "tokens", "tokens/s", "bytes/s", "FLOP/s", "hertz", "threads", "share"
]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

# Decimal keeps "17.1 GB/s" and "0.1 ms" the floats a reader expects.
_UNITS: dict[Dimension, dict[str, Decimal]] = {
    "bytes": {
        "B": Decimal(1), "kB": Decimal(10**3), "MB": Decimal(10**6), "GB": Decimal(10**9),
        "KiB": Decimal(2**10), "MiB": Decimal(2**20), "GiB": Decimal(2**30),
    },
    "seconds": {"s": Decimal(1), "ms": Decimal("1e-3"), "min": Decimal(60)},
    "tokens": {"tokens": Decimal(1), "token": Decimal(1)},
    "tokens/s": {"tokens/s": Decimal(1), "token/s": Decimal(1)},
    "bytes/s": {
        "MB/s": Decimal(10**6), "GB/s": Decimal(10**9),
        "MiB/s": Decimal(2**20), "GiB/s": Decimal(2**30),
    },
    "FLOP/s": {"MFLOP/s": Decimal(10**6), "GFLOP/s": Decimal(10**9), "TFLOP/s": Decimal(10**12)},
    "hertz": {"Hz": Decimal(1), "MHz": Decimal(10**6), "GHz": Decimal(10**9)},
    "threads": {"threads": Decimal(1), "thread": Decimal(1)},
    "share": {"%": Decimal("0.01")},
}  # fmt: skip
_RATES: dict[Dimension, str] = {
    "tokens/s": "tokens/s", "bytes/s": "B/s", "FLOP/s": "FLOP/s", "hertz": "Hz",
}  # fmt: skip
_NUMBER = r"\d+(?:\.\d+)?"


_TOO_LARGE = 1 << 63  # as in the JSON that goes out


def units(dimension: Dimension | None = None) -> tuple[str, ...]:
    """Return the units that `parse_quantity` knows, of one dimension or of all."""
    dimensions = DIMENSIONS if dimension is None else (dimension,)
    return tuple(unit for each in dimensions for unit in _UNITS[each])


def quantity_pattern(dimension: Dimension) -> str:
    """Return the regular expression, anchored, of the texts that `parse_quantity` accepts."""
    choices = "|".join(re.escape(unit) for unit in units(dimension))
    return f"^{_NUMBER} ({choices})$"


def parse_quantity(text: str, *, of: str, dimension: Dimension | None = None) -> float:
    """Return the quantity in its base unit: bytes, seconds, tokens, bytes per second.

    >>> parse_quantity("1.5 GiB", of="peak_memory")
    1610612736.0
    >>> parse_quantity("350 ms", of="load", dimension="seconds")
    0.35

    Args:
        text: A number, a space and a unit.
        of: The field being read, for the error message.
        dimension: What must be meant; None accepts any.

    Raises:
        UsageError: If the unit is missing, unknown or of another dimension; never guessed. If the
            quantity does not fit 63 bits.
    """
    match = re.fullmatch(rf"({_NUMBER}) (\S+)", text, flags=re.ASCII)
    allowed = units(dimension)
    if match is None:
        raise UsageError(
            f"{of} = {shown(text)!r} is not a number, a space and a unit",
            hint=f"units: {', '.join(allowed)}",
        )
    number, unit = match.groups()
    if unit not in allowed:
        raise UsageError(
            f"{of} = {shown(text)!r} has no unit that fits", hint=_nearest(unit, allowed)
        )
    factor = next(known[unit] for known in _UNITS.values() if unit in known)
    value = Decimal(number) * factor
    if value >= _TOO_LARGE:
        raise UsageError(f"{of} = {shown(text)!r} is too large", hint="the most are 63 bits")
    return float(value)


def _nearest(unit: str, allowed: tuple[str, ...]) -> str:
    by_case = [known for known in allowed if known.lower() == unit.lower()]
    near = by_case or difflib.get_close_matches(unit, allowed, n=1)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    return f"{suggestion}units: {', '.join(allowed)}"


def format_quantity(value: float, dimension: Dimension) -> str:
    """Return a quantity of any dimension, in its base unit, for people.

    >>> format_quantity(8 * 2**30, "bytes"), format_quantity(11.3e9, "bytes/s")
    ('8 GiB', '11.3 GB/s')
    >>> format_quantity(4, "threads"), format_quantity(0.05, "share")
    ('4 threads', '5 %')
    """
    if dimension == "bytes":
        return format_bytes(value)
    if dimension == "seconds":
        return format_duration(value)
    if dimension == "share":
        return f"{_short(value * 100)} %"
    if dimension in _RATES:
        return format_rate(value, _RATES[dimension])
    return f"{value:.0f} {dimension.removesuffix('s') if value == 1 else dimension}"


def format_bytes(count: float) -> str:
    """Return a size for people.

    >>> format_bytes(512), format_bytes(1610612736)
    ('512 B', '1.5 GiB')
    """
    for unit in ("GiB", "MiB", "KiB"):
        factor = int(_UNITS["bytes"][unit])
        if abs(count) >= factor:
            return f"{_short(count / factor)} {unit}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """Return a duration for people.

    >>> format_duration(0.35), format_duration(7.84), format_duration(125), format_duration(3725)
    ('350 ms', '7.84 s', '2 min 5 s', '1 h 2 min')
    """
    if seconds < 0.9995:  # what rounds to 1000 ms is a second
        return f"{_short(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{_short(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_rate(per_second: float, unit: str = "tokens/s") -> str:
    """Return a rate for people; bytes and floating-point operations get a decimal prefix.

    >>> format_rate(8), format_rate(17.1e9, "B/s"), format_rate(148e9, "FLOP/s")
    ('8 tokens/s', '17.1 GB/s', '148 GFLOP/s')
    """
    if unit.startswith("token"):
        return f"{_short(per_second)} {unit}"
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= factor:
            return f"{_short(per_second / factor)} {prefix}{unit}"
    return f"{_short(per_second)} {unit}"


def _short(value: float) -> str:
    """Return three significant digits, never an exponent: 1024, 98.2, 7.5, 0.04."""
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
