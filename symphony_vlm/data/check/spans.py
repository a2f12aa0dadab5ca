"""A record as a line of coloured pieces: what a model reads, what it learns, where the pictures stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from symphony_vlm.data.check.tokens import Tokenization
from symphony_vlm.data.conversation import IGNORE_INDEX, EncodedConversation
from symphony_vlm.data.sample import ImagePart, Sample
from symphony_vlm.errors import InputError

__all__ = ["SampleView", "Span", "choose_places", "legend", "view_sample"]

SpanKind = Literal["context", "supervised", "marker", "image", "cut"]

_LABELS: dict[SpanKind, str] = {
    "supervised": "supervised",
    "context": "context",
    "marker": "special token",
    "image": "image",
    "cut": "cut by max_length",
}


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of a record: one token or as many as make a whole character, a run of image tokens, or a text."""

    kind: SpanKind
    text: str
    ids: tuple[int, ...] = ()
    """Token ids; of an image, the placeholder's once."""
    starts_line: bool = False
    """Whether to show it on a new line that is not in the text."""


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """One record to look at."""

    sample: Sample
    file: str
    index: int
    spans: tuple[Span, ...]
    n_tokens: int | None = None
    """None without a tokenizer."""
    n_supervised: int | None = None


def legend(views: Sequence[SampleView]) -> dict[SpanKind, str]:
    """The kinds of spans that occur, as people read them."""
    used = {span.kind for view in views for span in view.spans}
    labels = _LABELS if any(view.n_tokens is not None for view in views) else _LABELS | {"marker": "role"}
    return {kind: label for kind, label in labels.items() if kind in used}


def choose_places(n_records: int, n_wanted: int) -> list[int]:
    """Places of records to show, spread evenly: neighbours in a file are often alike."""
    n = min(n_wanted, n_records)
    return [place * n_records // n for place in range(n)]


def view_sample(sample: Sample, file: str, index: int, tokenization: Tokenization | None) -> SampleView:
    """The record in pieces: tokens if there is a tokenizer that can take it, else its texts."""
    if tokenization is None:
        return SampleView(sample=sample, file=file, index=index, spans=tuple(_text_spans(sample)))
    try:
        encoded = tokenization.encode(sample)
    except InputError:  # reported as a fault; its texts can still be shown
        return SampleView(sample=sample, file=file, index=index, spans=tuple(_text_spans(sample)))
    return SampleView(
        sample=sample,
        file=file,
        index=index,
        spans=tuple(_token_spans(encoded, tokenization, tokenization.image_tokens(sample))),
        n_tokens=len(encoded.input_ids),
        n_supervised=sum(label != IGNORE_INDEX for label in encoded.labels),
    )


def _text_spans(sample: Sample) -> Iterator[Span]:
    """Roles as markers, answers as supervised: without a template nothing more exact can be said."""
    for number, message in enumerate(sample.messages):
        yield Span(kind="marker", text=f"{message.role}: ", starts_line=number > 0)
        kind: SpanKind = "supervised" if message.role == "assistant" else "context"
        for part in message.parts:
            if isinstance(part, ImagePart):
                yield Span(kind="image", text=f"[image {sample.images[part.index].name}]")
            else:
                yield Span(kind=kind, text=part.text)


def _token_spans(encoded: EncodedConversation, made: Tokenization, image_tokens: Sequence[int]) -> Iterator[Span]:
    ids, labels = encoded.input_ids, encoded.labels
    images = iter([image_tokens[index] for index in encoded.image_order])
    special = {*made.tokenizer.all_special_ids, *made.tokenizer.get_added_vocab().values()}
    limit = len(ids) if made.max_length is None else made.max_length
    start = 0
    while start < len(ids):
        supervised = labels[start] != IGNORE_INDEX
        stop = start + 1
        count = next(images, None) if ids[start] == made.image_token_id and not supervised else None
        if count is not None:
            stop = start + count
            kind: SpanKind = "image"
            text, shown = f"[image x {stop - start}]", tuple(ids[start : start + 1])
        else:
            text = _text_of(made.tokenizer, ids[start:stop])
            # One character may take several tokens, of which none is text by itself.
            while "\ufffd" in text and stop < min(len(ids), start + 4) and ids[stop] not in special:
                stop += 1
                text = _text_of(made.tokenizer, ids[start:stop])
            kind = "supervised" if supervised else "marker" if ids[start] in special else "context"
            shown = tuple(ids[start:stop])
        yield Span(kind="cut" if start >= limit else kind, text=text, ids=shown)
        start = stop


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a few tokens as it stands in the whole: decoding alone would drop sentencepiece's first space."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(ids[0])
    missing = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
    return " " + text if missing else text
