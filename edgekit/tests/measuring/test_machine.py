import os
import sys

import pytest

from edgekit.measuring.machine import Machine, Watch, cached_share, faults, forget
from edgekit.measuring.measurement import MemoryPoint
from edgekit.runtime.processors import performance_cores


def make_pi(root, **files):
    """Write the files that a Raspberry Pi 5 shows; keyword ``/``-free names replace some."""
    content = {
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nModel\t: Raspberry Pi 5\n",
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/meminfo": "MemTotal:        8256000 kB\nSwapTotal:       0 kB\n",
        "proc/self/status": (
            "VmHWM:\t  200 kB\nVmRSS:\t  150 kB\nRssAnon:\t  40 kB\n"
            "RssFile:\t 100 kB\nRssShmem:\t 10 kB\n"
        ),
        "proc/self/cgroup": "0::/user.slice\n",
        "proc/self/task/7/schedstat": "900 100 5\n",
        "proc/self/task/8/schedstat": "800 200 5\n",
        "proc/pressure/cpu": "some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\n",
        "sys/class/thermal/thermal_zone0/temp": "61250\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
        "sys/fs/cgroup/user.slice/memory.peak": "4096\n",
        **files,
    }
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root=root, vcgencmd=None)


def test_a_raspberry_pi_is_described_by_its_files(tmp_path):
    environment = make_pi(tmp_path).environment(["no-such-package"])

    assert environment.model == "Raspberry Pi 5 Model B Rev 1.0"
    assert environment.cpu_features == ("fp", "asimd", "asimddp")
    assert environment.memory_bytes == 8256000 * 1024
    assert environment.governor == "ondemand"
    assert environment.has_swap is False
    assert list(environment.versions) == ["edgekit"]


def test_sensors_are_read_in_base_units(tmp_path):
    pi = make_pi(tmp_path)

    assert pi.temperature_c() == 61.25
    assert sorted(pi.frequencies_hz()) == [1.5e9, 2.4e9]
    assert pi.throttled() == 0x50000
    assert pi.pressure_s("cpu") == 2.5


def test_memory_is_split_into_what_the_kernel_can_drop_and_what_not(tmp_path):
    pi = make_pi(tmp_path)

    assert pi.memory_bytes() == (150 * 1024, 50 * 1024)
    assert pi.working_set_peak_bytes() == 200 * 1024
    assert pi.cgroup_peak_bytes() == 4096


def test_a_system_that_tells_nothing_gives_none(tmp_path):
    mute = Machine(root=tmp_path, vcgencmd=None)

    assert mute.memory_bytes() is None
    assert mute.temperature_c() is None
    assert mute.throttled() is None
    assert mute.cgroup_peak_bytes() is None
    assert mute.frequencies_hz() == ()
    assert mute.thread_times_ns() == {}
    assert mute.environment([]).model is None


def test_throttling_comes_from_vcgencmd_where_the_kernel_has_no_copy(tmp_path):
    tool = tmp_path / "vcgencmd"
    tool.write_text('#!/bin/sh\necho "throttled=0x50005"\n')
    tool.chmod(0o755)

    machine = Machine(root=tmp_path, vcgencmd=str(tool))

    assert machine.throttled() == 0x50005
    assert machine.throttled(may_run_tools=False) is None


@pytest.mark.parametrize("text", ["error=1 error_msg=unknown", "", "throttled=none"])
def test_nonsense_from_vcgencmd_is_no_reading(tmp_path, text):
    tool = tmp_path / "vcgencmd"
    tool.write_text(f'#!/bin/sh\necho "{text}"\n')
    tool.chmod(0o755)

    assert Machine(root=tmp_path, vcgencmd=str(tool)).throttled() is None


def test_a_watch_sees_what_happens_while_it_runs(tmp_path):
    pi = make_pi(tmp_path)

    with Watch(pi) as watch:
        watch.begin()
        # In between, a thread ran 300 ns and waited 100 ns, and the board ran hot.
        make_pi(tmp_path, **{
            "proc/self/task/7/schedstat": "1200 200 9\n",
            "sys/class/thermal/thermal_zone0/temp": "84000\n",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "d0008\n",
        })  # fmt: skip
    conditions = watch.conditions

    assert conditions.run_delay_share == 0.25
    assert conditions.temperature_before_c == 61.25
    assert conditions.temperature_max_c == 84
    assert conditions.throttled_before == 0x50000
    assert conditions.throttled_during == 0xD0008
    assert conditions.frequency_max_hz == 2.4e9
    assert watch.peaks_bytes() == {
        "working_set": 200 * 1024, "unreclaimable": 50 * 1024, "cgroup": 4096,
    }  # fmt: skip


def test_thinning_memory_over_time_keeps_the_peak(tmp_path):
    watch = Watch(make_pi(tmp_path))
    for kibibytes in [*range(1000), 9999, *range(1000)]:
        watch._points.append(
            MemoryPoint(time_s=0.0, resident_bytes=kibibytes, unreclaimable_bytes=1)
        )

    assert len(watch.points) <= 240
    assert max(point.resident_bytes for point in watch.points) == 9999


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is asked Linux' way")
def test_a_forgotten_file_is_no_longer_cached(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 10**6)
    assert cached_share(path) == 1

    forget(path)

    if cached_share(path) == 1:
        pytest.skip("this file system lives in memory")
    assert cached_share(path) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_reading_fresh_memory_is_a_minor_fault():
    _, before = faults() or (0, 0)
    held = b"x" * 50 * 10**6
    _, after = faults() or (0, 0)

    assert after > before
    assert len(held) == 50 * 10**6


def test_at_least_one_core_is_fast():
    assert 1 <= performance_cores() <= (os.cpu_count() or 1)
