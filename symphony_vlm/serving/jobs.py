"""Questions that wait to be answered together, and what becomes of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from symphony_vlm.serving.sampling import SamplingSettings
from symphony_vlm.serving.token_text import TokenText
from symphony_vlm.serving.visible_text import VisibleText

if TYPE_CHECKING:
    from transformers.feature_extraction_utils import BatchFeature

    from symphony_vlm.model.processor import SymphonyVLMProcessor

__all__ = ["Event", "Failed", "Finished", "Job", "Picture", "Piece", "Row"]


@dataclass(frozen=True)
class Piece:
    """Some more of the answer's text."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The answer is complete."""

    reason: Literal["stop", "length"]
    num_tokens: int
    """Generated, the token that ends the answer included."""


@dataclass(frozen=True)
class Failed:
    """There will be no answer, or no more of it. The log has the error under this reference."""

    out_of_memory: bool
    reference: str


Event = Piece | Finished | Failed


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, ready for the vision tower."""

    key: str
    """Equal for equal pictures."""
    inputs: BatchFeature
    num_tokens: int


@dataclass(kw_only=True, eq=False)
class Job:
    """One question with what is needed to answer it. `emit` is called from the scheduler's thread."""

    input_ids: list[int]
    pictures: tuple[Picture, ...]
    """In the order of their placeholders."""
    settings: SamplingSettings
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set it, and no more is computed for this question than the token it is at."""


class Row:
    """A job's row in a batch: turns its tokens into text and knows when it has ended.

    Args:
        job: the question.
        processor: of the model.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, job: Job, processor: SymphonyVLMProcessor, stop_ids: Sequence[int]) -> None:
        self.job = job
        self.finished = False
        self.has_spoken = False
        """Whether a piece of text has been given out."""
        self._stop_ids = stop_ids
        self._visible = VisibleText((processor.answer_end, *job.settings.stop))
        self._text = TokenText(processor.tokenizer)
        self._num_tokens = 0

    def take(self, token: int) -> None:
        """The next token of this row; nothing happens once it has ended."""
        if self.finished:
            return
        if self.job.cancelled.is_set():
            self.finished = True
            return
        self._num_tokens += 1
        if token in self._stop_ids:
            self._finish("stop")
            return
        self._say(self._visible.add(self._text.add(token)))
        if self._visible.ended:
            self._finish("stop")
        elif self._num_tokens >= self.job.settings.max_tokens:
            self._finish("length")

    def fail(self, out_of_memory: bool, reference: str) -> None:
        """Ends the row without the rest of its answer."""
        self.finished = True
        self.job.emit(Failed(out_of_memory, reference))

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self.finished = True
        self._say(self._visible.add(self._text.rest()))
        if self._visible.ended:
            reason = "stop"
        self._say(self._visible.rest())
        self.job.emit(Finished(reason, self._num_tokens))

    def _say(self, text: str) -> None:
        if text:
            self.has_spoken = True
            self.job.emit(Piece(text))
