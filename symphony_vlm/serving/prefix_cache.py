"""Keys and values of a conversation, kept from one turn to the next, so that a turn computes its new tokens only.

The next prompt repeats the conversation so far, but not always token by token: the words of an answer may be cut into
other tokens when they are read than when they were generated. So what the cache holds is compared with the new prompt,
and cut where they part.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence

from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["MAX_KEPT", "PrefixCache", "forget_all", "mark_tokens"]

MAX_KEPT = 8
"""Conversations of this process that keep keys and values at the same time; the one not used for longest loses its
own, and its next turn computes everything again. Otherwise every open page would hold a device's memory."""

_recent: deque[weakref.ref[PrefixCache]] = deque()
_recent_lock = threading.Lock()


class PrefixCache:
    """What one conversation keeps. A turn takes it, and puts it back if it ended without an error."""

    def __init__(self) -> None:
        self._held: tuple[Cache, list[int]] | None = None

    def take(self, marks: Sequence[int]) -> tuple[Cache | None, int]:
        """The keys and values that a prompt can go on from, and of how many of its tokens they are.

        At least the last token is left to compute, for its logits are wanted.

        Args:
            marks: of the prompt's tokens, see `mark_tokens`.
        """
        held, self._held = self._held, None
        if held is None:
            return None, 0
        cache, known = held
        limit = min(len(known), len(marks) - 1)
        common = next((i for i in range(limit) if known[i] != marks[i]), limit)
        surplus = len(known) - common
        # A sliding window has dropped what stood before its end, so that it cannot go back.
        if common == 0 or (surplus and not all(type(layer) is DynamicLayer for layer in cache.layers)):
            return None, 0
        if surplus:
            cache.crop(-surplus)
        return cache, common

    def put(self, cache: Cache | None, marks: Sequence[int]) -> None:
        """Keeps a cache for the next turn.

        Args:
            cache: of one sequence.
            marks: of its tokens; those that the cache does not hold yet are left out.
        """
        if cache is None:
            return
        self._held = cache, list(marks[: cache.get_seq_length()])
        with _recent_lock:
            kept = [held for held in _recent if held() not in (None, self)]
            _recent.clear()
            _recent.extend([*kept, weakref.ref(self)])
            while len(_recent) > MAX_KEPT:
                if (oldest := _recent.popleft()()) is not None:
                    oldest.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._held = None


def forget_all() -> None:
    """Frees what all conversations of this process keep, for a device that has run out of memory."""
    with _recent_lock:
        for held in _recent:
            if (prefix := held()) is not None:
                prefix.clear()
        _recent.clear()


def mark_tokens(ids: Sequence[int], image_token_id: int, pictures: Sequence[tuple[int, int]]) -> list[int]:
    """Token ids, but an image's placeholders become a number of that picture alone, below 0.

    Args:
        ids: of a prompt.
        image_token_id: the placeholder.
        pictures: number (0 or above) and placeholders of each, in reading order.
    """
    of_images = iter([-1 - number for number, count in pictures for _ in range(count)])
    return [next(of_images) if token == image_token_id else token for token in ids]
