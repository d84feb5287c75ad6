"""What the kernel says about this machine and this process, read from /proc and /sys.

Everything is read below a root, so that a test can offer a directory that says what a Raspberry Pi
says. What a system does not tell is None; nothing here fails for lack of a file.
"""

import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekit import installed, versions
from edgekit.measuring.measurement import Conditions, Environment, MemoryMetric, MemoryPoint
from edgekit.runtime.processors import usable_cores


# Bits 0 to 3 of get_throttled: under-voltage, clock capped, throttled, soft temperature limit; bits
# 16 to 19 say the same of any moment since boot.
# Source: https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
THROTTLED_NOW = 0xF
THROTTLED_SINCE_BOOT = 0xF0000

_FIRMWARE_THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
_CGROUP_ROOTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_HELD = re.compile(r"^(VmRSS|RssAnon|RssShmem):\s+(\d+) kB", re.MULTILINE)
_MAXIMUM_POINTS = 240  # of memory over time that are kept: as many as a plot can show


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The files of one system."""

    root: Path = Path("/")
    vcgencmd: str | None = field(default_factory=lambda: shutil.which("vcgencmd"))

    def text(self, name: str) -> str | None:
        """Return a file's content, or None where there is none to read."""
        try:
            return (self.root / name).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            return None

    def number(self, name: str, *, scale: float = 1.0) -> float | None:
        """Return the number a file holds, times ``scale``."""
        try:
            return float(self.text(name) or "") * scale
        except ValueError:
            return None

    def environment(self, packages: Iterable[str]) -> Environment:
        """Describe the machine and the versions of the installed ones of ``packages``."""
        cpu = _fields(self.text("proc/cpuinfo"))
        return Environment(
            system=f"{platform.system()} {platform.release()}",
            model=self.text("proc/device-tree/model")
            or self.text("sys/devices/virtual/dmi/id/product_name"),
            cpu=cpu.get("model name") or cpu.get("Model") or platform.processor() or None,
            cores=usable_cores(),
            cpu_features=tuple((cpu.get("Features") or cpu.get("flags") or "").split()),
            memory_bytes=_kibibytes(_fields(self.text("proc/meminfo")), "MemTotal"),
            page_bytes=mmap.PAGESIZE,
            governor=self.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            has_swap=self._has_swap(),
            python=platform.python_version(),
            versions={"edgekit": versions.EDGEKIT, **installed.versions(packages)},
        )

    def _has_swap(self) -> bool | None:
        swap_bytes = _kibibytes(_fields(self.text("proc/meminfo")), "SwapTotal")
        return None if swap_bytes is None else swap_bytes > 0

    def memory_bytes(self) -> tuple[int, int] | None:
        """Return what this process holds: resident bytes, and those that only it can free."""
        # Read many times a second next to what is measured, so it looks for three lines only.
        sizes = dict(_HELD.findall(self.text("proc/self/status") or ""))
        if "VmRSS" not in sizes:
            return None
        kept = int(sizes.get("RssAnon", 0)) + int(sizes.get("RssShmem", 0))
        return int(sizes["VmRSS"]) * 1024, kept * 1024

    def working_set_peak_bytes(self) -> int | None:
        """Return the most this process ever had in memory, file pages included."""
        peak = _kibibytes(_fields(self.text("proc/self/status")), "VmHWM")
        return _maximum_resident_bytes() if peak is None else peak

    def cgroup_peak_bytes(self) -> int | None:
        """Return the peak of the whole control group, other processes included.

        Raspberry Pi OS boots with ``cgroup_disable=memory``, so there it is usually None.
        """
        group = re.search(r"^0::/?(.*)$", self.text("proc/self/cgroup") or "", re.MULTILINE)
        for root in _CGROUP_ROOTS if group else ():
            peak = self.number(f"{root}/{group[1] if group else ''}/memory.peak")
            if peak is not None:
                return int(peak)
        return None

    def temperature_c(self) -> float | None:
        """Return the temperature of the hottest zone."""
        zones = self.root.glob("sys/class/thermal/thermal_zone*/temp")
        degrees = (self.number(str(zone.relative_to(self.root)), scale=1e-3) for zone in zones)
        return max((d for d in degrees if d is not None), default=None)

    def frequencies_hz(self) -> tuple[float, ...]:
        """Return the clock of every core that tells it."""
        files = self.root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
        clocks = (self.number(str(file.relative_to(self.root)), scale=1e3) for file in files)
        return tuple(clock for clock in clocks if clock is not None)

    def throttled(self, *, may_run_tools: bool = True) -> int | None:
        """Return the bits of get_throttled, None without such firmware.

        Args:
            may_run_tools: False reads the kernel's copy only, without starting a process.
        """
        text = self.text(_FIRMWARE_THROTTLED)
        if text is None and may_run_tools and self.vcgencmd is not None:
            text = _output_of(self.vcgencmd, "get_throttled")
        bits = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]+)", (text or "").strip())
        return int(bits[1], 16) if bits else None

    def thread_times_ns(self) -> dict[str, tuple[int, int]]:
        """Return, for each thread of this process, its time on a core and its wait for one."""
        times = {}
        for file in self.root.glob("proc/self/task/*/schedstat"):
            words = (self.text(str(file.relative_to(self.root))) or "").split()
            if len(words) == 3:
                times[file.parent.name] = (int(words[0]), int(words[1]))
        return times

    def pressure_s(self, resource: str) -> float | None:
        """Return how long some task has waited for ``"cpu"`` or ``"memory"`` since boot."""
        total = re.search(r"^some .*total=(\d+)", self.text(f"proc/pressure/{resource}") or "")
        return int(total[1]) * 1e-6 if total else None


class Watch:
    """A thread that looks at this process while it works.

    Memory twenty times a second, the rest about once. Looking more often would take time from what
    is measured; no peak is lost by that, as the kernel keeps the highest working set itself.
    """

    def __init__(
        self, machine: Machine, *, started: float | None = None, interval_s: float = 0.05
    ) -> None:
        self._machine = machine
        self._interval_s = interval_s
        self._started = time.perf_counter() if started is None else started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgekit-watch", daemon=True)
        self._points: list[MemoryPoint] = []
        self._temperatures: list[float] = []
        self._frequencies: list[float] = []
        self._throttled: int | None = None
        self._throttled_before: int | None = None
        self._before: _Counters | None = None
        self._conditions = Conditions()

    def __enter__(self) -> Self:
        self._throttled_before = self._throttled = self._machine.throttled()
        self._look_at_health()
        self._look_at_memory()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look_at_memory()
        self._look_at_health()
        self._see_throttled(self._machine.throttled())
        self._conditions = self._sum_up()

    def begin(self) -> None:
        """Count pressure and waiting from here on: what is timed starts now."""
        self._before = _Counters.read(self._machine)

    @property
    def conditions(self) -> Conditions:
        """What the machine was like; known after the watch has ended."""
        return self._conditions

    @property
    def points(self) -> tuple[MemoryPoint, ...]:
        """Memory over time, thinned to what a plot can show; no peak is lost."""
        width = -(-len(self._points) // _MAXIMUM_POINTS)
        groups = (self._points[i : i + width] for i in range(0, len(self._points), width or 1))
        return tuple(max(group, key=lambda point: point.resident_bytes) for group in groups)

    def peaks_bytes(self) -> dict[MemoryMetric, int]:
        """Return each peak the system knows."""
        kept = max((point.unreclaimable_bytes for point in self._points), default=None)
        peaks: dict[MemoryMetric, int | None] = {
            "working_set": self._machine.working_set_peak_bytes(),
            "unreclaimable": kept,
            "cgroup": self._machine.cgroup_peak_bytes(),
        }
        return {name: peak for name, peak in peaks.items() if peak is not None}

    def _run(self) -> None:
        looks_per_second = max(1, round(1 / self._interval_s))
        look = 0
        while not self._stop.wait(self._interval_s):
            look += 1
            self._look_at_memory()
            if look % looks_per_second == 0:
                self._look_at_health()

    def _look_at_memory(self) -> None:
        memory = self._machine.memory_bytes()
        if memory is not None:
            resident, kept = memory
            now = time.perf_counter() - self._started
            self._points.append(
                MemoryPoint(time_s=now, resident_bytes=resident, unreclaimable_bytes=kept)
            )

    def _look_at_health(self) -> None:
        temperature = self._machine.temperature_c()
        if temperature is not None:
            self._temperatures.append(temperature)
        self._frequencies.extend(self._machine.frequencies_hz())
        self._see_throttled(self._machine.throttled(may_run_tools=False))

    def _see_throttled(self, bits: int | None) -> None:
        if bits is not None:
            self._throttled = (self._throttled or 0) | bits

    def _sum_up(self) -> Conditions:
        shares = _Shares()
        if self._before is not None:
            shares = self._before.shares_until(_Counters.read(self._machine))
        return Conditions(
            run_delay_share=shares.run_delay,
            cpu_pressure_share=shares.cpu_pressure,
            memory_pressure_share=shares.memory_pressure,
            temperature_before_c=self._temperatures[0] if self._temperatures else None,
            temperature_max_c=max(self._temperatures, default=None),
            frequency_min_hz=min(self._frequencies, default=None),
            frequency_max_hz=max(self._frequencies, default=None),
            throttled_before=self._throttled_before,
            throttled_during=self._throttled,
        )


@dataclass(frozen=True, kw_only=True)
class _Shares:
    run_delay: float | None = None
    cpu_pressure: float | None = None
    memory_pressure: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Counters:
    """Sums that only grow; two of them say what happened in between."""

    time_s: float
    threads_ns: dict[str, tuple[int, int]]
    cpu_pressure_s: float | None
    memory_pressure_s: float | None

    @classmethod
    def read(cls, machine: Machine) -> Self:
        return cls(
            time_s=time.perf_counter(),
            threads_ns=machine.thread_times_ns(),
            cpu_pressure_s=machine.pressure_s("cpu"),
            memory_pressure_s=machine.pressure_s("memory"),
        )

    def shares_until(self, later: "_Counters") -> _Shares:
        wall_s = later.time_s - self.time_s
        return _Shares(
            run_delay=self._run_delay_share(later),
            cpu_pressure=_share(self.cpu_pressure_s, later.cpu_pressure_s, wall_s),
            memory_pressure=_share(self.memory_pressure_s, later.memory_pressure_s, wall_s),
        )

    def _run_delay_share(self, later: "_Counters") -> float | None:
        # A thread that lives at only one end has its whole count there.
        ran = waited = 0
        for thread, (ran_after, waited_after) in later.threads_ns.items():
            ran_before, waited_before = self.threads_ns.get(thread, (0, 0))
            ran += ran_after - ran_before
            waited += waited_after - waited_before
        return waited / (ran + waited) if ran + waited > 0 else None


def _share(before_s: float | None, after_s: float | None, wall_s: float) -> float | None:
    if before_s is None or after_s is None or wall_s <= 0:
        return None
    return (after_s - before_s) / wall_s


def faults() -> tuple[int, int] | None:
    """Return the major and minor page faults of this process so far."""
    if sys.platform == "win32":
        return None
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt, usage.ru_minflt


def forget(path: Path) -> None:
    """Ask the kernel to drop a file from its page cache, as after a boot.

    Dirty pages and pages that another process has mapped stay; `cached_share` tells.
    """
    if sys.platform != "linux":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_share(path: Path) -> float | None:
    """Return which share of a file's pages is in memory, None where the system does not tell."""
    size = path.stat().st_size
    # To whoever may not write a file, mincore says that all of it is there (Linux 5.2 and later).
    if sys.platform != "linux" or size == 0 or not os.access(path, os.W_OK):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in {None, ctypes.c_void_p(-1).value}:
        return None
    status = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return None if status else sum(flag & 1 for flag in flags) / pages


def _maximum_resident_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _fields(text: str | None) -> dict[str, str]:
    """Read lines of ``name: value``; the first one of a name counts."""
    fields: dict[str, str] = {}
    for line in (text or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _kibibytes(fields: dict[str, str], name: str) -> int | None:
    words = fields.get(name, "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else None


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
