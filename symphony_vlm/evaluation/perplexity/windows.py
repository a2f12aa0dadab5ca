"""Which tokens each forward pass sees and which it scores."""

from __future__ import annotations

from dataclasses import dataclass

from symphony_vlm.errors import InputError

__all__ = ["Window", "sliding_windows", "stream_windows"]


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` are seen, those from ``first_target`` on are scored."""

    begin: int
    end: int
    first_target: int

    @property
    def num_targets(self) -> int:
        """Scored tokens."""
        return self.end - self.first_target


def sliding_windows(num_tokens: int, *, context: int, stride: int, start: int = 0) -> list[Window]:
    """The windows of transformers' guide "Perplexity of fixed-length models": each scores what no earlier one has.

    The first token of a text is seen and never scored. With ``stride == context`` neither are the first tokens of the
    other windows, as in the guide; every smaller stride scores each token but the first exactly once.

    Args:
        num_tokens: N.
        context: tokens in a window.
        stride: how far the next one begins, and so how many tokens it scores; at most `context`.
        start: of the text, added to all positions.

    Raises:
        InputError: a context below 2, or a stride outside of 1 to `context`.
    """
    if context < 2:
        raise InputError(f"{context} is too short: a token is predicted from at least one", where="--context")
    if not 1 <= stride <= context:
        raise InputError(f"{stride} must be from 1 to the context ({context})", where="--stride")
    windows: list[Window] = []
    scored = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + context, num_tokens)
        first = max(scored, begin + 1)
        if end > first:
            windows.append(Window(start + begin, start + end, start + first))
        scored = end
        if end == num_tokens:
            break
    return windows


def stream_windows(num_tokens: int, *, streams: int, context: int, stride: int) -> list[Window]:
    """The text cut into streams of equal length, incomplete windows and what is left over dropped.

    So evaluate the published word-level models (MomentumSMoE, CompeteSMoE), whose coverage therefore depends on their
    batch size: 48 streams of WikiText-103's test split lose a tenth of it.

    Args:
        num_tokens: N.
        streams: into how many the text is cut.
        context: see `sliding_windows`.
        stride: see `sliding_windows`.

    Raises:
        InputError: a stream is shorter than the context.
    """
    length = num_tokens // streams
    if length < context:
        raise InputError(
            f"{num_tokens} tokens in {streams} streams are {length} in each, less than the context of {context}",
            where="--drop-incomplete",
            remedy="Use fewer streams, a shorter context, or leave the option out: then every token is scored.",
        )
    windows: list[Window] = []
    for number in range(streams):
        own = sliding_windows(length, context=context, stride=stride, start=number * length)
        windows += [window for window in own if window.end - window.begin == context]
    return windows
