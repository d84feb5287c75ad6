"""Locks hold what pyproject.toml asks for, whole, with hashes, and are what CI installs."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from edgekit.tests import locks


OPTIONAL = locks.PROJECT["project"]["optional-dependencies"]
CORE = locks.PROJECT["project"]["dependencies"]
NAMES = sorted(path.stem for path in locks.DIRECTORY.glob("*.txt"))


def wanted(extra):
    """Yield what an extra asks for, those that it names included."""
    for text in OPTIONAL[extra]:
        requirement = Requirement(text)
        if requirement.name == "edgekit":
            for other in sorted(requirement.extras):
                yield from wanted(other)
        else:
            yield requirement


def unmet(requirements, locked):
    """Return the requirements that no package of a lock meets."""
    return [
        str(requirement)
        for requirement in requirements
        if (found := locked.get(canonicalize_name(requirement.name))) is None
        or not requirement.specifier.contains(found.version)
    ]


@pytest.mark.parametrize("name", locks.EXTRAS)
def test_a_lock_has_what_pyproject_asks_for(name):
    requirements = [*map(Requirement, CORE), *(r for e in locks.EXTRAS[name] for r in wanted(e))]
    assert len(requirements) > len(CORE)
    assert unmet(requirements, locks.read(name)) == []


def test_what_builds_is_locked_too():
    assert unmet(map(Requirement, locks.BUILD), locks.read("build")) == []


def test_a_requirement_that_is_not_met_would_be_noticed():
    asked = ["click>=999", "no-such-package", "numpy"]
    assert unmet(map(Requirement, asked), locks.read("test")) == asked[:2]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_a_lock_is_a_version_and_its_hashes(name):
    text = (locks.DIRECTORY / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    packages = locks.parse(text).values()
    assert packages
    assert len(lines) == sum(1 + len(package.sha256) for package in packages)
    assert text.endswith("".join(package.text for package in packages))


def test_locks_agree():
    versions: dict[str, set[tuple[str, tuple[str, ...]]]] = {}
    for name in sorted({*NAMES} - {"cpu"}):
        for package in locks.read(name).values():
            versions.setdefault(package.name, set()).add((package.version, package.sha256))
    assert len(versions) > 100
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_builds_for_cpus_are_of_the_same_versions():
    (torch,) = locks.read("cpu").values()
    assert Version(torch.version).public == locks.read("ci")["torch"].version


def test_nothing_is_missing_that_a_locked_package_needs():
    """`pip install --no-deps` would not bring it."""
    locked = locks.read("ci")
    known = {*locked, *locks.read("cuda"), "pip"}
    asked: dict[str, set[str]] = {}
    for name, package in locked.items():
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(found.version).public == package.version:
            needs = [Requirement(text) for text in found.requires or ()]
            asked[name] = {
                canonicalize_name(need.name)
                for need in needs
                if need.marker is None or need.marker.evaluate({"extra": ""})
            }
    if not asked:
        pytest.skip("nothing that is installed here has the version of the lock")
    assert {name: needs - known for name, needs in asked.items() if needs - known} == {}


def test_ci_installs_from_locks_that_exist():
    files = [locks.ROOT / ".ci" / "run", locks.ROOT / ".github" / "workflows" / "ci.yml"]
    for path in files:
        named = re.findall(r"\.ci/locks/([\w-]+)\.txt", path.read_text(encoding="utf-8"))
        assert named
        assert set(named) <= set(NAMES)
