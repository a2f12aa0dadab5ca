"""Answers questions about images in batches. Each picture is encoded once for all of its questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from symphony_vlm.evaluation.answer import Answer, prompt_facts
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.likelihood import choose
from symphony_vlm.evaluation.options import Options
from symphony_vlm.evaluation.prompts import can_share_prefixes, order_by_picture, read_prompts
from symphony_vlm.model.model_input import ModelInput, model_input
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["AnswersItems", "Predictor"]


class AnswersItems(Protocol):
    """What the runner needs of a model."""

    def encode_images(self, images: Sequence[np.ndarray]) -> Sequence[Any]:
        """Anything that stands for uint8 ``[H, W, 3]`` images, one for each."""

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Any] | None]) -> Sequence[str]:
        """One answer per item, a plain text or an `Answer`; features of its images in order, or None without."""


class EncodesPictures(Protocol):
    """A vision tower that several models have."""

    def features(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """Arguments of ``project_image_features`` for uint8 ``[H, W, 3]`` images."""


class Predictor:
    """Greedy answers of one model.

    Args:
        model: in evaluation mode, with its processor.
        batch_size: questions per batch.
        max_new_tokens: longest answer.
        options: item -> its options, the likeliest of which is the answer, or None; default: all answers are written.
        encoder: the vision tower, where other models have it too; default: the model's own.
        share_prefixes: whether questions about the same picture are read together up to its end (`prompts`), where
            the language model allows it.
    """

    def __init__(
        self,
        model: SymphonyVLMForConditionalGeneration,
        *,
        batch_size: int,
        max_new_tokens: int,
        options: Callable[[EvaluationItem], Options | None] | None = None,
        encoder: EncodesPictures | None = None,
        share_prefixes: bool = True,
    ) -> None:
        assert model.processor is not None
        self._model = model
        self._processor = model.processor
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._options = options or (lambda item: None)
        self._encoder = encoder
        self._share = share_prefixes and can_share_prefixes(model)

    @property
    def model(self) -> SymphonyVLMForConditionalGeneration:
        """The model that answers."""
        return self._model

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Features of uint8 ``[H, W, 3]`` images as the language model reads them, ``[n_i, D]`` each."""
        features: list[Tensor] = []
        for start in range(0, len(images), self._batch_size):
            chosen = list(images[start : start + self._batch_size])
            if self._encoder is None:
                inputs = self._processor.image_processor(chosen)
                features += self._model.get_image_features(**inputs.to(self._model.device))
            else:
                features += self._model.project_image_features(*self._encoder.features(chosen))
        return features

    def model_input(self, pixels: np.ndarray) -> ModelInput:
        """What the model sees of uint8 ``[H, W, 3]``, before normalisation."""
        return model_input(self._processor.image_processor, pixels)

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]) -> list[Answer]:
        """One answer per item.

        Args:
            items: questions.
            features: for each item the features of its images in order, or None.
        """
        # The answers return to the order of the items.
        order = order_by_picture([item.image_key for item in items], [len(item.question) for item in items])
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            batch = self._answer_batch([items[i] for i in chosen], [features[i] for i in chosen])
            answers.update(zip(chosen, batch, strict=True))
        return [answers[i] for i in range(len(items))]

    def _answer_batch(
        self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]
    ) -> list[Answer]:
        offered = {i: options for i, item in enumerate(items) if (options := self._options(item)) is not None}
        written = [i for i in range(len(items)) if i not in offered]
        answers: dict[int, Answer] = {}
        if offered:
            chosen = [items[i] for i in offered], [features[i] for i in offered], list(offered.values())
            answers.update(zip(offered, self._choose(*chosen), strict=True))
        if written:
            texts = self._write([items[i] for i in written], [features[i] for i in written])
            answers.update(zip(written, texts, strict=True))
        return [answers[i] for i in range(len(items))]

    def _choose(
        self,
        items: Sequence[EvaluationItem],
        features: Sequence[Sequence[Tensor] | None],
        options: Sequence[Options],
    ) -> list[Answer]:
        return choose(self._model, items, features, options, share=self._share)

    @torch.no_grad()
    def _write(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]) -> list[Answer]:
        prompts = read_prompts(self._model, [item.messages for item in items], features, share=self._share)
        ids = self._model.generate(**prompts.for_generate, max_new_tokens=self._max_new_tokens, do_sample=False)
        new = ids[:, prompts.inputs["input_ids"].shape[1] :]
        texts = self._processor.decode_answers(new)
        facts = zip(prompt_facts(prompts.inputs), self._generation_facts(new), strict=True)
        return [Answer(text, prompt | generated) for text, (prompt, generated) in zip(texts, facts, strict=True)]

    def _generation_facts(self, new_BS: Tensor) -> list[dict[str, Any]]:
        stops = torch.tensor(self._processor.stop_token_ids, device=new_BS.device)
        facts = []
        for row in torch.isin(new_BS, stops).tolist():
            # The token that ends the answer is one that was generated; padding behind it is not.
            stopped = True in row
            length = row.index(True) + 1 if stopped else len(row)
            facts.append({"n_new_tokens": length, "stop_reason": "stop" if stopped else "length"})
        return facts
