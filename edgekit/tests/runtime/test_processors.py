"""How many threads may be asked for."""

import os

import pytest

from edgekit.cli import main
from edgekit.errors import UsageError
from edgekit.run import Runner
from edgekit.runtime.processors import check_threads, chosen_threads, usable_cores


IMPOSSIBLE = [0, -1, -5, 100_000, 2**31, -(2**63), 10**5_000, 1.0, True, "2"]


def usable() -> int:
    """Count them with the operating system alone."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def test_every_core_may_have_a_thread():
    assert usable_cores() == usable()
    assert chosen_threads(usable()) == usable()
    assert chosen_threads(1) == 1
    assert 1 <= chosen_threads(None) <= usable()


def name_of(threads):
    return "huge" if isinstance(threads, int) and threads > 10**20 else repr(threads)


@pytest.mark.parametrize("threads", [*IMPOSSIBLE, usable() + 1], ids=name_of)
def test_other_numbers_are_refused_with_the_way_out(threads):
    with pytest.raises(UsageError, match="threads are not possible on") as caught:
        chosen_threads(threads)

    assert "leave the number out" in caught.value.hint
    assert len(str(caught.value)) < 200


def test_the_cores_may_be_those_of_another_machine():
    check_threads(64, cores=64)
    with pytest.raises(UsageError, match="65 threads are not possible on 64 cores"):
        check_threads(65, cores=64)
    with pytest.raises(UsageError, match=r"2 threads are not possible on 1 core$"):
        check_threads(2, cores=1)


@pytest.mark.parametrize("threads", [-5, 0, 100_000])
def test_they_are_refused_before_a_bundle_is_looked_at(tmp_path, capsys, threads):
    with pytest.raises(UsageError, match=f"{threads} threads"):
        Runner.open(tmp_path / "none", threads=threads)
    with pytest.raises(SystemExit) as left:
        main(["run", str(tmp_path / "none"), "hi", "--threads", str(threads)])
    assert left.value.code == 2
    assert f"{threads} threads are not possible" in capsys.readouterr().err
