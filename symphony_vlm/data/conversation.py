"""Conversations to token ids and labels, segment by segment.

Every piece of a conversation (a role marker, the user's words, an image, an answer) is tokenised on its own and carries
its own label, so that the mask never depends on finding text again inside tokens. Users' words are tokenised with
special tokens switched off: whatever they type stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from symphony_vlm.data.sample import Message
from symphony_vlm.data.segments import Place, SegmentTokenizer, join_segments
from symphony_vlm.data.templates import Layout, Template, check_markers
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORE_INDEX", "EncodedConversation", "encode_conversation"]

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class EncodedConversation:
    """Token ids and labels of one conversation, images as runs of the placeholder id."""

    input_ids: list[int]
    labels: list[int]
    """`IGNORE_INDEX` outside of answers."""
    image_order: tuple[int, ...]
    """Indices of the sample's images in the order in which their placeholders stand."""


def encode_conversation(
    messages: Sequence[Message],
    *,
    template: Layout,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    num_image_tokens: int | Sequence[int],
    generation_prompt: bool = False,
    max_length: int | None = None,
    origin: str = "conversation",
) -> EncodedConversation:
    """Tokenises a conversation.

    Args:
        messages: turns; a missing system message is replaced by the template's default.
        template: the layout, see `resolve_template`.
        tokenizer: must know the template's markers.
        image_token_id: placeholder id, written `num_image_tokens` times for each image.
        num_image_tokens: features per image, or of each of the sample's images where they differ.
        generation_prompt: ends with the marker that opens the answer (inference); else answers are required.
        max_length: longest sequence; the end is cut, but never inside an image. An answer that is cut is supervised
            as far as it goes, without an end token: the model is not taught to stop there.
        origin: file and record for error messages.

    Raises:
        InputError: an answer's tokens do not decode to the answer, nothing is supervised, the limit would cut an
            image, or the template refuses the conversation; the message names the sample. Or the tokenizer lacks the
            template's markers.
    """
    pieces = _segment_tokenizer(template, tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int]] = []
    order: list[int] = []
    place: Place = "start"
    if template.bos and tokenizer.bos_token_id is not None:
        ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE_INDEX)
    segments = template.segments(messages, tokenizer=tokenizer, generation_prompt=generation_prompt, origin=origin)
    for kind, text, image in join_segments(segments, generation_prompt=generation_prompt):
        supervised = 0
        if kind == "image":
            count = num_image_tokens if isinstance(num_image_tokens, int) else num_image_tokens[image]
            new = [image_token_id] * count
            spans.append((len(ids), len(ids) + count))
            order.append(image)
            place = "special"
        elif kind in ("marker", "close"):
            new = pieces.marker(text, place)
            place = pieces.place_after(new, place)
            if kind == "close":
                supervised = _closing_length(pieces, new, text, origin)
        else:
            new = pieces.words(text, place)
            place = "text"
            if kind == "answer":
                pieces.check_round_trip(new, text, origin)
                supervised = len(new)
        ids += new
        labels += new[:supervised] + [IGNORE_INDEX] * (len(new) - supervised)
    if max_length is not None and len(ids) > max_length:
        _check_images_fit(spans, len(ids), max_length, origin)
        ids, labels = ids[:max_length], labels[:max_length]
    if not generation_prompt and all(label == IGNORE_INDEX for label in labels):
        raise InputError(
            f"no supervised token among {len(ids)}" + (f" (limit {max_length})" if max_length else ""),
            where=origin,
            remedy="The record needs an answer, within max_length.",
        )
    return EncodedConversation(input_ids=ids, labels=labels, image_order=tuple(order))


_SEGMENT_TOKENIZERS: WeakKeyDictionary[Any, dict[tuple[Layout, int], SegmentTokenizer]] = WeakKeyDictionary()


def _segment_tokenizer(template: Layout, tokenizer: Any) -> SegmentTokenizer:
    """Made once for a template and a tokenizer (and again when tokens were added to it)."""
    known = _SEGMENT_TOKENIZERS.setdefault(tokenizer, {})
    key = (template, len(tokenizer))
    if key not in known:
        if isinstance(template, Template):
            check_markers(template, tokenizer)
        known[key] = SegmentTokenizer(tokenizer, template.markers)
    return known[key]


def _closing_length(pieces: SegmentTokenizer, ids: list[int], text: str, origin: str) -> int:
    length = pieces.closing_length(ids)
    if length is None:
        raise InputError(f"the tokenizer has no single token for the end of an answer in {text[:40]!r}", where=origin)
    return length


def _check_images_fit(spans: Sequence[tuple[int, int]], length: int, max_length: int, origin: str) -> None:
    lost = next(((a, b) for a, b in spans if b > max_length), None)
    if lost is not None:
        raise InputError(
            f"{length} tokens, and the limit of {max_length} would cut an image's {lost[1] - lost[0]} tokens",
            where=origin,
            remedy="Raise max_length, or split the record.",
        )
