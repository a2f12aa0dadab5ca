"""One question to one or several models: read the uploads, ask each model in turn, keep what came of it.

Knows no gradio: a turn yields after every step, and the page draws what the visitor then has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.errors import InputError
from symphony_vlm.serving.chat import ChatSession
from symphony_vlm.serving.faults import fault_text
from symphony_vlm.serving.page_settings import Sampling
from symphony_vlm.serving.uploads import MAX_PICTURES, Upload, read_uploads
from symphony_vlm.serving.visitor import Exchange, Shown, Visitor, notice, said

if TYPE_CHECKING:
    from PIL import Image

    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["MAX_LETTERS", "WAITING", "ask_models", "read_question"]

MAX_LETTERS = 20_000
"""Of a question: more than most models have positions for, and tokenised in no time."""

WAITING = "…"
"""Stands in the answer's place until its first word."""


def read_question(
    text: str, files: Sequence[Path | Upload], save_preview: Callable[[Image.Image], str], num_models: int
) -> tuple[Exchange, list[Image.Image], InputError | None]:
    """A question as the page shows it, its pictures, and what is wrong with it.

    Args:
        text: the visitor's words.
        files: uploads, or what an earlier question kept of them.
        save_preview: puts a small copy of a picture where the browser can read it.
        num_models: how many answers there will be.
    """
    fault = None
    if len(text) > MAX_LETTERS:
        limit = f"has {len(text):,} letters; the limit is {MAX_LETTERS:,}"
        fault = InputError(f"the question {limit}", where="chat", remedy="Write a shorter one.")
        text = f"{text[:200]}…"
    elif len(files) > MAX_PICTURES:
        fault = InputError(f"{len(files)} pictures; the limit is {MAX_PICTURES}", where="chat", remedy="Attach fewer.")
    uploads: list[Upload] = []
    pictures: list[Image.Image] = []
    if fault is None:
        uploads, pictures, fault = read_uploads(files)
    message = said("user", text)
    previews = [{"path": save_preview(picture), "alt_text": "Uploaded picture"} for picture in pictures]
    message["content"] = [*previews, *(message["content"] if text else [])] or message["content"]
    exchange = Exchange(
        text=text,
        uploads=tuple(uploads),
        question=message,
        replies=[[] for _ in range(num_models)],
        answered=[False] * num_models,
    )
    return exchange, pictures, fault


def ask_models(
    models: Sequence[SymphonyVLMForConditionalGeneration],
    visitor: Visitor,
    exchange: Exchange,
    pictures: Sequence[Image.Image],
    sampling: Sampling,
) -> Iterator[int]:
    """Lets each model answer, one after the other; yields the number of the model whose reply has grown.

    Ends early, between two yields, if the visitor has begun a new chat. Errors become notices.
    """
    conversation = visitor.conversation
    for number in range(len(models)):
        exchange.replies[number] = [said("assistant", WAITING)]
    for number, model in enumerate(models):
        replies = exchange.replies[number]
        if number and visitor.stopping.is_set():
            replies[:] = [notice("Stopped", "You stopped the answers before this model's turn.")]
            yield number
            continue
        session = visitor.sessions[number] = visitor.sessions[number] or ChatSession(model)
        turns = len(session.history)
        try:
            for written in _write(session, exchange.text, pictures, sampling):
                if visitor.conversation != conversation:
                    return
                replies[0] = said("assistant", written or WAITING)
                yield number
            if replies[0] == said("assistant", WAITING):
                replies[:] = [notice("Empty answer", "The model ended its answer before the first word.")]
        except Exception as error:
            add_fault(replies, fault_text(error))
        exchange.answered[number] = len(session.history) > turns
        yield number


def add_fault(replies: list[Shown], text: str) -> None:
    """Says why there is no answer, below what was written of it."""
    if replies == [said("assistant", WAITING)]:
        replies.clear()
    replies.append(notice("⚠️ Not answered", text))


def _write(session: ChatSession, text: str, pictures: Sequence[Image.Image], sampling: Sampling) -> Iterator[str]:
    """The answer as far as it is written, again and again; first an empty one."""
    try:
        for picture in pictures:
            session.add_image(picture)
        settings: dict[str, Any] = sampling.arguments()
        pieces = session.stream(text, **settings)
        written = ""
        yield written
        try:
            for piece in pieces:
                written += piece
                yield written
        finally:
            # A page that was closed must not keep the model busy.
            if hasattr(pieces, "close"):
                pieces.close()
    finally:
        # Pictures of a turn that failed must not slip into the next question.
        session.drop_images()
