"""``generate`` in a thread of its own, whose text is read as it comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation import GenerateDecoderOnlyOutput

if TYPE_CHECKING:
    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["Generation"]


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


class Generation:
    """``model.generate`` in a thread of its own, which starts at once."""

    def __init__(
        self,
        model: SymphonyVLMForConditionalGeneration,
        processor: SymphonyVLMProcessor,
        arguments: dict[str, Any],
    ) -> None:
        self._model = model
        self._stopping = threading.Event()
        self._streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._output: GenerateDecoderOnlyOutput | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(arguments,), name="generate", daemon=True)
        self._thread.start()

    def _run(self, arguments: dict[str, Any]) -> None:
        criteria = [*arguments.pop("stopping_criteria", ()), _StopWhenSet(self._stopping)]
        try:
            self._output = self._model.generate(
                **arguments,
                streamer=self._streamer,
                stopping_criteria=StoppingCriteriaList(criteria),
                return_dict_in_generate=True,
            )
        except BaseException as error:  # it belongs to the consumer, whatever it is
            self._error = error
            # Otherwise the consumer would wait for ever.
            self._streamer.on_finalized_text("", stream_end=True)

    def pieces(self) -> Iterator[str]:
        """Text as it comes; ends when generation ends, also by an error."""
        yield from self._streamer

    def result(self) -> GenerateDecoderOnlyOutput:
        """What ``generate`` returned, after the end; raises what the generation raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output

    def stop(self) -> None:
        """Asks the generation to end after the token it is at."""
        self._stopping.set()

    def close(self) -> BaseException | None:
        """Stops, and waits for the thread; returns what the generation raised, if anything."""
        self.stop()
        self._thread.join()
        return self._error
