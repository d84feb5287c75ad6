"""Processors: how many cores this process may use, and how many of them are fast."""

import os
from pathlib import Path


def usable_cores() -> int | None:
    """Return how many cores this process may use, which a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


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
