"""What of a generated text is shown while it grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from symphony_vlm.serving.visible_text import VisibleText


def test_blanks_and_half_an_end_marker_are_held_back() -> None:
    visible = VisibleText(("</s>",))
    assert [visible.add(piece) for piece in ("  ", "a ", "b<", "/", "c</", "s> more", "x")] == [
        "",
        "a",
        " b",
        "",
        "</c",
        "",
        "",
    ]
    assert visible.ended
    assert visible.rest() == ""


def test_what_was_held_back_comes_when_nothing_more_will() -> None:
    visible = VisibleText(("stop", "END"))
    assert visible.add("a sto") == "a"
    assert visible.rest() == " sto"
    assert not visible.ended


@given(
    st.lists(st.text("ab \n", max_size=3), max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3)
)
def test_pieces_make_up_the_text_before_the_first_end(pieces: list[str], ends: list[str]) -> None:
    visible = VisibleText(tuple(ends))
    given_out = "".join([*(visible.add(piece) for piece in pieces), visible.rest()])
    text = "".join(pieces)
    # An end that comes later but begins earlier does not count once the other has been seen.
    if not any(end in text for end in ends):
        assert given_out == text.strip()
        return
    assert visible.ended
    assert text.strip().startswith(given_out)
    assert all(end not in given_out for end in ends)
