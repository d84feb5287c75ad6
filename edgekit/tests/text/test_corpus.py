import unicodedata

from edgekit.text import corpus


def test_every_text_has_a_name_of_its_own_and_something_in_it():
    names = [name for name, _ in corpus.texts()]
    assert names == sorted(set(names))
    assert all(text.strip() for _, text in corpus.texts())


def test_it_speaks_many_scripts():
    letters = {char for _, text in corpus.texts() for char in text if char.isalpha()}
    scripts = {unicodedata.name(char, "?").split()[0] for char in letters}
    assert scripts >= {
        "LATIN", "HANGUL", "CJK", "HIRAGANA", "KATAKANA", "ARABIC", "CYRILLIC", "HEBREW", "GREEK",
        "DEVANAGARI", "THAI",
    }  # fmt: skip


def test_it_has_what_tokenizers_trip_over():
    whole = "".join(text for _, text in corpus.texts())
    for trap in ["\u200d", "\ufe0f", "\t\t", "\r\n", "\n\n\n", " " * 16, "\u3000", "\u00a0"]:
        assert trap in whole, ascii(trap)
    assert unicodedata.normalize("NFC", whole) != whole
    assert any(ord(char) > 0xFFFF for char in whole)


def test_its_files_survive_editors_that_strip_line_ends():
    paths = list(corpus.DIRECTORY.glob("*.txt"))
    assert len(paths) > 10
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):
            assert line == line.rstrip(), path.name


def test_lines_are_the_texts_without_their_empty_lines():
    lines = corpus.lines()
    assert all(lines)
    assert "three empty lines above" in lines
