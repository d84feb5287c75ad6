"""Answers that are kept between runs."""

import pytest

from edgekit import cache


@pytest.mark.parametrize(
    ("old", "new"), [(b"true", b"null"), (b"true", b""), (b"true", b"\0\0\0\0"), (b"\n", b"")]
)
def test_an_answer_that_was_changed_is_asked_for_again(tmp_path, monkeypatch, old, new):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    asked = []

    def ask():
        monkeypatch.setattr(cache, "_ANSWERS", {})  # as in another process
        asked.append(1)
        return cache.remembered("questions", "one", lambda: {"is_so": True, "n": len(asked)})

    assert ask() == {"is_so": True, "n": 1}
    assert ask() == {"is_so": True, "n": 1}
    path = tmp_path / "questions" / "one.json"
    path.write_bytes(path.read_bytes().replace(old, new))

    assert ask() == {"is_so": True, "n": 3}
    assert ask() == {"is_so": True, "n": 3}
