"""Processors: how many cores this process may use, and how many of them are fast."""

import os
from pathlib import Path

from edgekit.errors import UsageError


_MOST_WHERE_UNKNOWN = 512  # GGML_MAX_N_THREADS: with more, llama.cpp stops the process


def usable_cores() -> int | None:
    """Return how many cores this process may use, which a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def check_threads(threads: int | None, *, cores: int | None = None) -> None:
    """Refuse a number of threads that a machine cannot run at once.

    Runtimes do not check it: too many end the process, a negative number counts as none.

    Args:
        threads: None, the runtime's choice, is always possible.
        cores: How many the machine that computes has; None: those this process may use.

    Raises:
        UsageError: If it is not a whole number from 1 to the number of cores.
    """
    if threads is None:
        return
    most = cores or usable_cores() or _MOST_WHERE_UNKNOWN
    if type(threads) is int and 1 <= threads <= most:
        return
    raise UsageError(
        f"{_shown(threads)} threads are not possible on {most} core{'s' if most > 1 else ''}",
        hint=f"ask for {f'1 to {most}' if most > 1 else '1'}, or leave the number out",
    )


def _shown(threads: object) -> str:
    return "so many" if isinstance(threads, int) and abs(threads) >= 10**9 else repr(threads)


def chosen_threads(threads: int | None) -> int:
    """Return how many threads a runtime shall take: those asked for, or the fastest cores.

    Raises:
        UsageError: As `check_threads`.
    """
    check_threads(threads)
    return performance_cores() if threads is None else threads


def performance_cores() -> int:
    """Count the fastest cores this process may use; slow ones would hold the others up.

    Source: /sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq; where that is not told, all.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = os.sched_getaffinity(0) if has_affinity else range(os.cpu_count() or 1)
    speeds = [_max_frequency(core) for core in cores]
    return max(1, sum(speed >= 0.8 * max(speeds) for speed in speeds))


def _max_frequency(core: int) -> int:
    path = Path(f"/sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq")
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
