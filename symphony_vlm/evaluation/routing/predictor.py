"""A predictor that also takes down what the routers decide about each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from symphony_vlm.evaluation.answer import Answer
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.options import Options
from symphony_vlm.evaluation.predictor import EncodesPictures, Predictor
from symphony_vlm.evaluation.routing.capture import PromptCapture
from symphony_vlm.evaluation.routing.cell_routing import CleanRouting, DriftRouting
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["RoutedPredictor"]


class RoutedPredictor(Predictor):
    """Answers as `Predictor` does, and the answers' facts have a field ``routing``.

    Args:
        model: as of `Predictor`, and so are `batch_size`, `max_new_tokens`, `options` and `encoder`.
        capture: of the same model.
        sink: what becomes of the routing.
    """

    def __init__(
        self,
        model: SymphonyVLMForConditionalGeneration,
        *,
        capture: PromptCapture,
        sink: CleanRouting | DriftRouting,
        batch_size: int,
        max_new_tokens: int,
        options: Callable[[EvaluationItem], Options | None] = lambda item: None,
        encoder: EncodesPictures | None = None,
    ) -> None:
        super().__init__(
            model,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            options=options,
            encoder=encoder,
            share_prefixes=False,  # what is taken down is one pass over the whole prompts
        )
        self._capture = capture
        self._sink = sink

    def _write(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]) -> list[Answer]:
        with self._capture.first_pass():
            answers = super()._write(items, features)
        return self._with_routing(items, answers)

    def _choose(
        self,
        items: Sequence[EvaluationItem],
        features: Sequence[Sequence[Tensor] | None],
        options: Sequence[Options],
    ) -> list[Answer]:
        with self._capture.first_pass():
            answers = super()._choose(items, features, options)
        return self._with_routing(items, answers)

    def _with_routing(self, items: Sequence[EvaluationItem], answers: Sequence[Answer]) -> list[Answer]:
        found: list[dict[str, Any]] = self._sink.add([item.id for item in items], self._capture.taken())
        return [
            Answer(answer, {**answer.facts, "routing": facts}) for answer, facts in zip(answers, found, strict=True)
        ]
