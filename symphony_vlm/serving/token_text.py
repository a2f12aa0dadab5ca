"""Text of tokens that come one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenText"]


class TokenText:
    """Tokens to text as they come: a letter is given out when its last byte is there.

    How a token reads may depend on the one before it (a blank or none), so some tokens before are decoded along.

    Args:
        tokenizer: special tokens of its are left out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0
        self._given = 0

    def add(self, token: int) -> str:
        """Takes a token and returns what has become readable."""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._begin : self._given]), self._decode(self._ids[self._begin :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._begin, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left, although bytes are missing."""
        before = self._decode(self._ids[self._begin : self._given])
        return self._decode(self._ids[self._begin :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
