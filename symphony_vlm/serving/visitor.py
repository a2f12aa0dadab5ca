"""What the server keeps of one open page: questions, their uploads, answers, and a chat session for each model."""

from __future__ import annotations

import html
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from symphony_vlm.serving.uploads import Upload

if TYPE_CHECKING:
    from symphony_vlm.serving.chat import ChatSession
    from symphony_vlm.serving.routing_view import RoutingView

__all__ = ["Exchange", "Shown", "Visitor", "notice", "said"]

Shown = dict[str, Any]
"""A message as the page's chat shows it."""


@dataclass(kw_only=True)
class Exchange:
    """A question, and what came of it in each model's conversation."""

    text: str
    uploads: tuple[Upload, ...]
    question: Shown
    replies: list[list[Shown]]
    """By model: its answer, a notice, or both."""
    answered: list[bool]
    """By model: whether its session remembers the question."""


class Visitor:
    """One open page. gradio copies the empty one for each page; events change their page's in place.

    No dataclass: of these gradio makes dictionaries.

    Attributes:
        sessions: by model, what it remembers; None before the first question.
        exchanges: the questions so far.
        conversation: counts new chats, so that an answer still on its way notices that nobody waits for it.
        idle: set while no answer is being written.
        stopping: set when the answers to this question are to end.
        view: the number of a model and the routing of its conversation, until something is said.
    """

    sessions: list[ChatSession | None]
    exchanges: list[Exchange]
    view: tuple[int, RoutingView] | None

    def __init__(self, num_models: int) -> None:
        self.num_models = num_models
        self.conversation = 0
        self.idle = threading.Event()
        self.idle.set()
        self.stopping = threading.Event()
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Visitor:
        return Visitor(self.num_models)

    def clear(self) -> None:
        """Forgets everything that was said."""
        self.sessions = [None] * self.num_models
        self.exchanges, self.view = [], None

    def stop(self) -> None:
        """Ends the answers that are being written; what is there stays."""
        self.stopping.set()
        for session in self.sessions:
            if session is not None:
                session.stop()

    def shown(self, model: int) -> list[Shown]:
        """One model's conversation as the page shows it."""
        return [message for exchange in self.exchanges for message in (exchange.question, *exchange.replies[model])]

    def exchange_at(self, model: int, index: int) -> int | None:
        """Which exchange the message with this number in a model's shown conversation belongs to."""
        for number, exchange in enumerate(self.exchanges):
            length = 1 + len(exchange.replies[model])
            if 0 <= index < length:
                return number
            index -= length
        return None

    def rewind(self, number: int) -> Exchange:
        """Forgets an exchange and all after it, and returns it.

        Raises:
            InputError: an answer is being generated.
        """
        for model, session in enumerate(self.sessions):
            if session is not None:
                session.rewind(sum(exchange.answered[model] for exchange in self.exchanges[:number]))
        gone = self.exchanges[number]
        del self.exchanges[number:]
        self.view = None
        return gone

    def last_with_picture(self) -> Exchange | None:
        """The last question about a picture of its own."""
        return next((exchange for exchange in reversed(self.exchanges) if exchange.uploads and exchange.text), None)


def said(role: str, text: str) -> Shown:
    """A message for the chat component, which takes tags for HTML even with Markdown off: letter by letter."""
    return {"role": role, "content": [{"type": "text", "text": html.escape(text, quote=False)}]}


def notice(title: str, text: str) -> Shown:
    """What stands in an answer's place when there is none."""
    return {**said("assistant", text), "metadata": {"title": title}}
