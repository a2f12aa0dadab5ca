"""Every message that the troubleshooting page quotes is one that the package gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
ELLIPSIS = "…"


def _template(node: ast.expr) -> str | None:
    """The text of a string in the source, its values replaced by an ellipsis."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) or ELLIPSIS for part in node.values)
    return None


def _templates() -> str:
    """Everything that the package may say, a line a string."""
    found = []
    for path in (REPOSITORY / "symphony_vlm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = _template(node) if isinstance(node, ast.expr) else None
            if text and " " in text:
                found.append(" ".join(text.split()))
    return "\n".join(found)


TEMPLATES = _templates()


def _is_said(message: str) -> bool:
    """Whether a string has all words of the message in this order, with values only where it has ellipses."""
    pieces = [re.escape(piece.strip()) for piece in message.split(ELLIPSIS) if piece.strip()]
    return re.search(f"(?:{re.escape(ELLIPSIS)}| )*".join(pieces), TEMPLATES) is not None


def test_the_page_has_the_messages_people_meet() -> None:
    assert len(QUOTED) >= 25
    assert len(set(QUOTED)) == len(QUOTED)


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert len(re.findall(r"\w", message)) >= 10  # enough that no other message fits by chance
    assert _is_said(message)


def test_a_message_that_nobody_gives_is_not_found() -> None:
    assert _is_said("the file does not exist")
    assert not _is_said("the file does not resist")
    # Pieces of one message in another order are not that message.
    assert not _is_said("; it differs in … the folder holds another evaluation")


@pytest.mark.parametrize("message", QUOTED)
def test_every_message_has_a_remedy(message: str) -> None:
    text = PAGE.split(f"### `{message}`\n")[1].split("\n#")[0]
    assert "**Do:**" in text
