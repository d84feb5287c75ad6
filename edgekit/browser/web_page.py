"""The page in a bundle for browsers: a chat that needs a web server and npm's runtime next to it.

``browser.json`` says what it must fetch and what that needs of the browser.
"""

import json
import shutil
import string
from dataclasses import asdict
from pathlib import Path

from edgekit import formats
from edgekit.browser import packages
from edgekit.browser.server import Site
from edgekit.encodings.hashing import sha256_of
from edgekit.errors import UsageError
from edgekit.formats import Browsing


INDEX, SETTINGS = "index.html", "browser.json"
_COPIED = ("app.mjs", "gpu.js", "gpu.mjs", "storage.mjs")


def write(
    directory: Path, entry: str, format: str, *, context_tokens: int, stop_ids: tuple[int, ...]
) -> None:
    """Write the page of a format that browsers open, unless the format has its own.

    Args:
        directory: The bundle's, with the artifact in it.
        entry: The file that the runtime opens.
        format: The artifact's.
        context_tokens: How many tokens a conversation may have.
        stop_ids: The tokens that end an answer.
    """
    browsing = _browsing(format)
    if browsing is None or browsing.CHAT is None:
        return
    path = directory / entry
    request = browsing.request(path, context_tokens=context_tokens)
    settings = {
        "entry": path.relative_to(directory).as_posix(),
        "files": {
            (path.parent / name).relative_to(directory).as_posix(): {
                "size_bytes": (path.parent / name).stat().st_size,
                "sha256": sha256_of(path.parent / name),
            }
            for name in request.files
        },
        "features": list(request.features),
        "largest_buffer": request.largest_buffer and asdict(request.largest_buffer),
        "runs_in_wasm": request.runs_in_wasm,
        "context_tokens": context_tokens,
        "stop_ids": list(stop_ids),
        "settings": dict(request.settings),
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / SETTINGS).write_text(text, encoding="utf-8")
    (directory / INDEX).write_text(_html(browsing), encoding="utf-8")
    shutil.copyfile(browsing.CHAT, directory / "chat.mjs")
    shutil.copyfile(browsing.MODULE, directory / "runtime.mjs")
    for name in _COPIED:
        shutil.copyfile(formats.PAGE / name, directory / name)


def _html(browsing: Browsing) -> str:
    named = " ".join(map(str, browsing.PACKAGES))
    imports = {name: f"./node_modules/{file}" for name, file in browsing.IMPORTS.items()}
    page = string.Template((formats.PAGE / INDEX).read_text(encoding="utf-8"))
    return page.substitute(
        install=f"npm install --ignore-scripts {named}", imports=json.dumps({"imports": imports})
    )


def site(directory: Path, format: str) -> Site | None:
    """Return what shows a bundle's page, its runtime included; None where it has no page.

    Raises:
        MissingDependencyError: If npm is needed to fetch the runtime, and not installed.
        ToolchainError: If the runtime cannot be fetched.
    """
    browsing = _browsing(format)
    if browsing is None or not (directory / INDEX).is_file():
        return None
    modules = {
        f"/node_modules/{package.name}/": packages.directory(package)
        for package in browsing.PACKAGES
    }
    index = (directory / INDEX).read_bytes()
    return Site(pages={"/": ("text/html", index)}, roots={"/": directory, **modules})


def _browsing(format: str) -> Browsing | None:
    try:
        return formats.browsing(format)
    except UsageError:
        return None
