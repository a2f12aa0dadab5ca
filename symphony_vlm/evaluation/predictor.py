"""Answers questions about images in batches. Each picture is encoded once for all of its questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symphony_vlm.evaluation.task import EvaluationItem
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["Predictor"]


class Predictor:
    """Greedy answers of one model.

    Args:
        model: in evaluation mode, with its processor.
        batch_size: questions per batch.
        max_new_tokens: longest answer.
    """

    def __init__(self, model: SymphonyVLMForConditionalGeneration, *, batch_size: int, max_new_tokens: int) -> None:
        assert model.processor is not None
        self._model = model
        self._processor = model.processor
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Features of uint8 ``[H, W, 3]`` images as the language model reads them, ``[n_i, D]`` each."""
        features: list[Tensor] = []
        for start in range(0, len(images), self._batch_size):
            inputs = self._processor.image_processor(list(images[start : start + self._batch_size]))
            features += self._model.get_image_features(**inputs.to(self._model.device))
        return features

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]) -> list[str]:
        """One answer per item.

        Args:
            items: questions.
            features: for each item the features of its images in order, or None.
        """
        # Batches of equal length waste no padding; the answers return to the order of the items.
        order = sorted(range(len(items)), key=lambda i: len(items[i].question))
        answers = [""] * len(items)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            texts = self._answer_batch([items[i] for i in chosen], [features[i] for i in chosen])
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
        return answers

    @torch.no_grad()
    def _answer_batch(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]) -> list[str]:
        present = [image for images in features for image in images or ()]
        counts = [None if images is None else [len(image) for image in images] for images in features]
        inputs: dict[str, Any] = self._processor.encode_prompts([item.messages for item in items], counts)
        inputs = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
        ids = self._model.generate(
            **inputs,
            image_features=present or None,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
        )
        return self._processor.decode_answers(ids[:, inputs["input_ids"].shape[1] :])
