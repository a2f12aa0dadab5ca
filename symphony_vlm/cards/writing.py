"""Writes a model's card, unless a person has made it theirs.

A written card ends with a comment that has the hash of all above it. Whoever changes the text, or takes the comment
out, breaks that tie, and from then on the file is left alone.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from symphony_vlm.cards.facts import read_facts
from symphony_vlm.cards.text import card_text
from symphony_vlm.files import write_text

__all__ = ["CARD", "is_edited", "keep_edited_card", "write_model_card"]

CARD = "README.md"

_SEAL = "\n<!-- Written by symphony_vlm (sha256 of all above: {}). Edit freely: a changed card is kept. -->\n"
_SEALED = re.compile(re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{64})") + r"\Z")


def write_model_card(folder: Path, *, source: Path | None = None, results: Path | None = None) -> bool:
    """Writes ``README.md`` into the folder of a saved model, from the files that are there.

    Args:
        folder: with config.json (or open_clip_config.json) and, after training, training.json.
        source: folder of the model that this one was made of, if it is not in `folder` itself; its card's licence and
            its record of training are told of.
        results: a results.json whose figures for the model in `folder` are told.

    Returns:
        Whether it was written: not where there is a card that a person has edited.
    """
    path = folder / CARD
    if is_edited(path):
        return False
    text = card_text(read_facts(folder, source=source, results=results))
    write_text(path, text + _SEAL.format(_digest(text)))
    return True


def is_edited(path: Path) -> bool:
    """Whether a card exists that is not, or no longer, what `write_model_card` wrote."""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")  # line ends as git may have changed them count as "\n"
    found = _SEALED.search(text)
    return found is None or found.group(1) != _digest(text[: found.start()])


def keep_edited_card(old: Path, new: Path) -> None:
    """Takes a card that a person has edited over from the folder that another is about to replace."""
    if is_edited(old / CARD):
        shutil.copy2(old / CARD, new / CARD)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
