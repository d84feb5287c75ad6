"""Where edgekit keeps what it would otherwise make again."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any


_ANSWERS: dict[tuple[str, str], dict[str, Any]] = {}  # of this process


def cache_directory() -> Path:
    """Return where decoded models are kept: $EDGEKIT_CACHE, or the user's cache directory."""
    own = os.environ.get("EDGEKIT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgekit"


def remembered(kind: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the answer to a question that takes a second or more, asking only the first time.

    Args:
        kind: A directory of the cache, for one kind of question.
        key: A hash over all that the answer depends on, the programs asked included.
        make: Asks, and returns what JSON can hold.
    """
    with suppress(KeyError):
        return _ANSWERS[kind, key]
    place = cache_directory() / kind / f"{key}.json"
    try:
        digest, _, text = place.read_bytes().partition(b"\n")
        is_whole = digest == sha256(text).hexdigest().encode()
        answer = dict(json.loads(text if is_whole else b""))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        answer = make()
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            place.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(answer).encode()
            place.write_bytes(sha256(text).hexdigest().encode() + b"\n" + text)
    _ANSWERS[kind, key] = answer
    return answer
