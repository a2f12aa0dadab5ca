"""Answers questions about images in batches. Each picture is encoded once for all of its questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from symphony_vlm.evaluation.task import EvaluationItem
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["Answer", "AnswersItems", "Predictor"]


class Answer(str):
    """An answer's text that also knows how it came about.

    Args:
        text: the answer.
        facts: for the record: ``prompt_sha256``, ``n_prompt_tokens``, ``n_new_tokens``, ``stop_reason`` and others.
    """

    facts: Mapping[str, Any]

    def __new__(cls, text: str, facts: Mapping[str, Any]) -> Answer:
        """A string with facts."""
        answer = super().__new__(cls, text)
        answer.facts = facts
        return answer


class AnswersItems(Protocol):
    """What the runner needs of a model."""

    def encode_images(self, images: Sequence[np.ndarray]) -> Sequence[Any]:
        """Anything that stands for uint8 ``[H, W, 3]`` images, one for each."""

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Any] | None]) -> Sequence[str]:
        """One answer per item, a plain text or an `Answer`; features of its images in order, or None without."""


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

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]) -> list[Answer]:
        """One answer per item.

        Args:
            items: questions.
            features: for each item the features of its images in order, or None.
        """
        # Batches of equal length waste no padding; the answers return to the order of the items.
        order = sorted(range(len(items)), key=lambda i: len(items[i].question))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            batch = self._answer_batch([items[i] for i in chosen], [features[i] for i in chosen])
            answers.update(zip(chosen, batch, strict=True))
        return [answers[i] for i in range(len(items))]

    @torch.no_grad()
    def _answer_batch(
        self, items: Sequence[EvaluationItem], features: Sequence[Sequence[Tensor] | None]
    ) -> list[Answer]:
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
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.decode_answers(new)
        facts = zip(prompt_facts(inputs), self._generation_facts(new), strict=True)
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


def prompt_facts(inputs: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Of each row of left-padded ``input_ids`` and ``attention_mask``: its length and the sha256 of its ids as JSON."""
    facts = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        prompt = ids[len(ids) - sum(mask) :]
        digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
        facts.append({"prompt_sha256": digest, "n_prompt_tokens": len(prompt)})
    return facts
