"""What licences the locked packages state, as a table in ``docs/licences.md``.

``python -m edgekit.tests.licences`` reads them from what is installed, at the versions of
``.ci/locks/ci.txt``, and writes the table; the text around it is left alone.
"""

import re
from email.message import Message
from importlib import metadata
from typing import cast

from packaging.version import Version

from edgekit.tests import locks


PAGE = locks.ROOT / "docs" / "licences.md"
TABLE = re.compile(
    r"(?<=<!-- licences: computed -->\n).*(?=<!-- end of the licences -->)", re.DOTALL
)
NOT_STATED = "not stated in its metadata"


def stated(fields: Message) -> str:
    """Return what the metadata of a package says, in its author's words."""
    text = (fields.get("License") or "").strip().splitlines()
    classifiers = [
        classifier.rpartition(" :: ")[2]
        for classifier in fields.get_all("Classifier") or []
        if classifier.startswith("License :: OSI Approved :: ")
        or classifier == "License :: Public Domain"
    ]
    if expression := fields.get("License-Expression"):
        return str(expression)
    if len(text) == 1:
        return text[0]
    return " or ".join(classifiers) or (text[0] if text else NOT_STATED)


def installed() -> dict[str, str]:
    """Return the licences of the locked packages that are installed at their locked version."""
    found = {}
    for name, locked in locks.read("ci").items():
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(package.version).public == locked.version:
            found[name] = stated(cast("Message", package.metadata))
    return found


def user_of(name: str) -> str:
    """Return who needs a package: a device, a workstation, or edgekit's own developers."""
    if any(name in locks.read(lock) for lock in locks.DEVICES):
        return "device"
    return "workstation" if name in locks.read("all") else "development"


def table(licences: dict[str, str]) -> str:
    """Return the table, a line for each package."""
    lines = [
        f"| {name} | {licence} | {user_of(name)} |" for name, licence in sorted(licences.items())
    ]
    return "\n".join(["| package | licence | needed on |", "|---|---|---|", *lines]) + "\n"


def listed() -> dict[str, str]:
    """Return the licences that the page lists, by package."""
    (text,) = TABLE.findall(PAGE.read_text(encoding="utf-8"))
    return dict(re.findall(r"^\| ([\w.-]+) \| (.+) \| \w+ \|$", text, re.MULTILINE))


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: table(installed()), page), encoding="utf-8")
