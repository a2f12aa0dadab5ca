"""Dynamic batching: questions that wait at the same time are answered in one pass after the other.

One thread alone runs the model. It takes the questions that wait, pads them on the left to one length, and generates
until the last of them has ended; what arrives meanwhile waits for the next batch. Each question has its own settings
and random numbers, and its answer does not depend on its companions (but for the rounding of sums in half precision).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from symphony_vlm.errors import InputError
from symphony_vlm.serving.jobs import Job, Picture, Row
from symphony_vlm.serving.sampling import RowSampler

if TYPE_CHECKING:
    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["BatchScheduler", "Closed", "QueueFull"]

_PICTURES_KEPT = 32
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many questions wait as may wait."""


class Closed(Exception):
    """The scheduler is closing and takes no more questions."""


class BatchScheduler:
    """Answers jobs in batches, in a thread of its own that lives until `close`.

    Args:
        model: with its processor; nobody else may use it meanwhile.
        max_batch: most questions answered together.
        max_waiting: most questions that wait.
        gather_seconds: how long an idle scheduler waits for companions of the first question.

    Raises:
        InputError: the model has no processor.
    """

    def __init__(
        self,
        model: SymphonyVLMForConditionalGeneration,
        *,
        max_batch: int = 16,
        max_waiting: int = 128,
        gather_seconds: float = 0.005,
    ) -> None:
        if model.processor is None:
            raise InputError("no processor", where="serve", remedy="Open the model with symphony_vlm.load(folder).")
        self._model = model
        self._processor = model.processor
        self._stop_ids = _stop_ids(model, model.processor)
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._gather_seconds = gather_seconds
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._running: list[Job] = []
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Questions in the batch that is being answered."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Questions that wait for their batch."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """Whether it takes and answers questions."""
        return not self._closed and self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Puts a question into the line; its events come by ``job.emit``.

        Raises:
            QueueFull: too many wait.
            Closed: no more questions are taken.
        """
        with self._changed:
            if not self.is_open:
                raise Closed
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull
            self._waiting.append(job)
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Answers what waits, takes nothing more, and ends the thread.

        Args:
            timeout: seconds to wait for that; then the questions left are given up.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        for job in (*self._waiting, *self._running):
            job.cancelled.set()

    def _run(self) -> None:
        while jobs := self._next_batch():
            self._running = jobs
            self._answer([self._row(job) for job in jobs])
            self._running = []

    def _row(self, job: Job) -> Row:
        return Row(job, self._processor, self._stop_ids)

    def _next_batch(self) -> list[Job]:
        """The next questions in the line; none only if it is closed and empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                until = time.monotonic() + self._gather_seconds
                while len(self._waiting) < self._max_batch and not self._closed:
                    if not self._changed.wait(max(0.0, until - time.monotonic())):
                        break
                jobs: list[Job] = []
                while self._waiting and len(jobs) < self._max_batch:
                    job = self._waiting.popleft()
                    if not job.cancelled.is_set():
                        jobs.append(job)
                if jobs or (self._closed and not self._waiting):
                    return jobs

    def _answer(self, rows: list[Row]) -> None:
        """Generates; after an error those who have heard nothing yet are asked again, each alone."""
        reference = secrets.token_hex(4)
        out_of_memory = False
        try:
            self._generate(rows)
        except Exception as error:
            out_of_memory = _is_out_of_memory(error)
            _log.exception("error %s in a batch of %d", reference, len(rows))
        # Outside of the handler: the error holds the frames, and with them the memory, of the pass that failed.
        if out_of_memory:
            self._features.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for row in rows:
            if row.finished:
                continue
            if len(rows) > 1 and not row.has_spoken and not row.job.cancelled.is_set():
                self._answer([self._row(row.job)])
            else:
                row.fail(out_of_memory, reference)

    @torch.no_grad()
    def _generate(self, rows: list[Row]) -> None:
        jobs = [row.job for row in rows]
        inputs: dict[str, Any] = self._processor.pad_prompts([job.input_ids for job in jobs])
        inputs = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
        features = [self._encode(picture) for job in jobs for picture in job.pictures]
        self._model.generate(
            **inputs,
            image_features=features or None,
            max_new_tokens=max(job.settings.max_tokens for job in jobs),
            do_sample=False,
            num_beams=1,
            eos_token_id=self._stop_ids,
            logits_processor=LogitsProcessorList([RowSampler([job.settings for job in jobs])]),
            stopping_criteria=StoppingCriteriaList([_FeedRows(rows)]),
        )

    def _encode(self, picture: Picture) -> Tensor:
        """Features ``[n, D]``. Those of the last pictures are kept: a conversation sends its pictures every turn."""
        found = self._features.pop(picture.key, None)
        if found is None:
            (found,) = self._model.get_image_features(**picture.inputs.to(self._model.device))
        self._features[picture.key] = found
        while len(self._features) > _PICTURES_KEPT:
            self._features.popitem(last=False)
        return found


class _FeedRows(StoppingCriteria):
    """Hands every row its new token, and ends the generation when all rows have ended."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token)
        ended = [row.finished for row in self._rows]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _stop_ids(model: SymphonyVLMForConditionalGeneration, processor: SymphonyVLMProcessor) -> list[int]:
    """Tokens that end an answer: the template's, the tokenizer's, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id
    listed = [] if own is None else [own] if isinstance(own, int) else [*own]
    return sorted({*processor.stop_token_ids, *listed})


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Neither the CPU's allocator nor Apple's has an exception of its own.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
