"""What of a text that is being generated may be shown already."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["VisibleText"]


@dataclass
class VisibleText:
    """Generated text without blank edges, and without anything from the first end marker on.

    What `add` has given out is never taken back: blanks wait for the word behind them, and letters that may be the
    beginning of an end marker wait until it is clear that they are not.
    """

    ends: tuple[str, ...]
    """Texts at which the answer ends, none of them empty."""
    ended: bool = False
    """Whether one of them has come."""
    length: int = 0
    """Of what was given out."""
    _text: str = field(default="", repr=False)

    def add(self, piece: str) -> str:
        """Takes new text and returns what has become visible."""
        if self.ended:
            return ""
        self._text += piece
        cut = min((found for end in self.ends if (found := self._text.find(end)) >= 0), default=-1)
        if cut >= 0:
            self.ended, self._text = True, self._text[:cut]
        held = 0 if self.ended else max((_begun(self._text, end) for end in self.ends), default=0)
        return self._give(self._text[: len(self._text) - held])

    def rest(self) -> str:
        """What becomes visible because nothing more will come."""
        return self._give(self._text)

    def _give(self, text: str) -> str:
        new = text.strip()[self.length :]
        self.length += len(new)
        return new


def _begun(text: str, end: str) -> int:
    """How many letters at the end of the text may be the beginning of the end marker."""
    sizes = range(min(len(end) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(end[:size])), 0)
