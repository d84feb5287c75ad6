"""Text becomes the same ids as on the workstation, and ids become the same text, piece by piece."""

from collections.abc import Callable, Sequence

import pytest

from edgekit import formats
from edgekit.bundle.goldens import Goldens
from edgekit.bundle.manifest import Bundle
from edgekit.text.tokenizer import Text


REPLACEMENT = "\ufffd"  # what stands for bytes that are not UTF-8


def _difference(found: Sequence[object], expected: Sequence[object]) -> str:
    """Say where two sequences part, with a few items of both."""
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
    return f"from {at} on found {found[at : at + 8]!r}, expected {expected[at : at + 8]!r}"


def _assert_same_ids(text: str, found: Sequence[int], expected: Sequence[int]) -> None:
    same = list(found) == list(expected)
    assert same, f"the ids of {text!r}: {_difference(list(found), list(expected))}"


def test_every_text_becomes_the_same_ids(text: Text, goldens: Goldens):
    for golden in goldens.texts:
        _assert_same_ids(golden.text, text.encode(golden.text, adds_bos=False), golden.ids)


def test_the_runtimes_own_tokenizer_makes_the_same_ids(bundle: Bundle, goldens: Goldens):
    expected = {golden.text: golden.ids for golden in goldens.texts}
    expected |= {golden.rendered: golden.ids for golden in goldens.chats}
    found = formats.running(bundle.artifact.format).runtime_ids(
        bundle.artifact_path, list(expected)
    )
    if found is None:
        pytest.skip(f"the runtime of {bundle.artifact.format} has no tokenizer of its own")
    for line, ids in zip(expected, found, strict=True):
        _assert_same_ids(line, ids, expected[line])


def test_every_conversation_renders_to_the_same_text_and_ids(text: Text, goldens: Goldens):
    if text.template is None:
        pytest.skip("the model has no chat template")
    for golden in goldens.chats:
        rendered = text.render(golden.messages)
        same = rendered == golden.rendered
        assert same, (
            f"{golden.messages} renders otherwise: {_difference(rendered, golden.rendered)}"
        )
        _assert_same_ids(golden.rendered, text.encode_chat(golden.messages), golden.ids)


def _pieces(text: Text, ids: Sequence[int]) -> list[str]:
    """Return the piece that each id completes, and what is left at the end."""
    detokenizer = text.detokenizer()
    return [*map(detokenizer.feed, ids), detokenizer.finish()]


def test_text_in_pieces_is_the_text_at_once(text: Text, goldens: Goldens):
    for golden in goldens.texts:
        streamed, at_once = "".join(_pieces(text, golden.ids)), text.decode(golden.ids)
        assert streamed == at_once, f"{golden.text!r}: {_difference(streamed, at_once)}"


def test_no_piece_has_part_of_a_character(text: Text, goldens: Goldens):
    borders = 0
    for golden in goldens.texts:
        if REPLACEMENT in golden.text:
            continue
        for id, piece in zip((*golden.ids, None), _pieces(text, golden.ids), strict=True):
            assert REPLACEMENT not in piece, (
                f"token {id} of {golden.text!r} gave {piece!r}, expected whole characters"
            )
            borders += id is not None and not piece
    if not borders:
        pytest.skip("no character of the goldens is split across tokens of this vocabulary")


def test_text_that_ends_within_a_character_says_so_once(
    text: Text, goldens: Goldens, record_property: Callable[[str, object], None]
):
    cut = _first_cut(text, goldens)
    if cut is None:
        pytest.skip("no character of the goldens is split across tokens of this vocabulary")
    *pieces, left = _pieces(text, cut)
    assert left == REPLACEMENT, f"the end of {cut} is {left!r}, expected one {REPLACEMENT!r}"
    assert REPLACEMENT not in "".join(pieces), f"{pieces} of {cut}, expected whole characters"
    record_property("a character of several tokens begins after", repr("".join(pieces)[-20:]))


def _first_cut(text: Text, goldens: Goldens) -> tuple[int, ...] | None:
    """Return the beginning of some golden, up to the first token of a character of several."""
    for golden in goldens.texts:
        pieces = _pieces(text, golden.ids)[:-1]
        if "" in pieces and REPLACEMENT not in golden.text:
            return golden.ids[: pieces.index("") + 1]
    return None
