"""The page of licences lists what is locked, as the packages themselves state it."""

from email.message import Message

import pytest
from packaging.markers import Marker

from edgekit.tests import licences, locks


MADE_ON = {
    "python_full_version": "3.11.7", "python_version": "3.11", "sys_platform": "linux",
    "platform_system": "Linux", "platform_machine": "x86_64",
}  # fmt: skip


def test_every_locked_package_is_listed():
    needed = {
        name
        for name, package in locks.read("ci").items()
        if not package.marker or Marker(package.marker).evaluate(MADE_ON)
    }
    assert len(needed) > 100
    assert set(licences.listed()) == needed


def test_what_is_installed_states_what_is_listed():
    found = licences.installed()
    if not found:
        pytest.skip("nothing that is installed here has the version of the lock")
    assert found == {name: licences.listed()[name] for name in found}


def test_nothing_that_is_needed_to_export_or_run_is_under_a_licence_that_spreads_to_programs():
    listed = licences.listed()
    assert listed["numpy"]
    assert [name for name, licence in listed.items() if "GPL" in licence] == []


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License-Expression": "MIT", "License": "BSD"}, "MIT"),
        ({"License": "Apache 2.0"}, "Apache 2.0"),
        (
            {"License": "Copyright\nline", "Classifier": "License :: OSI Approved :: MIT License"},
            "MIT License",
        ),
        ({"License": "MIT License\n\nCopyright"}, "MIT License"),
        ({"Classifier": "Programming Language :: Python"}, licences.NOT_STATED),
    ],
)
def test_a_licence_is_read_wherever_metadata_may_say_it(fields, licence):
    metadata = Message()
    for name, value in fields.items():
        metadata[name] = value
    assert licences.stated(metadata) == licence
