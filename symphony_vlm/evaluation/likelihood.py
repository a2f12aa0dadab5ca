"""Scores the options of multiple choices by the likelihood that a model gives their texts.

A prompt is read once; its KV cache and the logits behind it serve all of its options. An option of one token, such as
a letter, costs nothing more.

Shape letters: B prompts, R options of all prompts, S longest option, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symphony_vlm.data.sample import Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.answer import Answer, prompt_facts
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.options import Options
from symphony_vlm.evaluation.prompts import Features, Prompts, read_prompts
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["OptionScore", "choose", "option_scores"]


@dataclass(frozen=True)
class OptionScore:
    """How likely one option's text is after the prompt."""

    log_probability: float
    """Sum over its tokens, without the end of the answer."""
    n_tokens: int

    @property
    def per_token(self) -> float:
        """The mean."""
        return self.log_probability / self.n_tokens


def choose(
    model: SymphonyVLMForConditionalGeneration,
    items: Sequence[EvaluationItem],
    features: Features,
    options: Sequence[Options],
    *,
    share: bool = False,
) -> list[Answer]:
    """The likeliest option of each item, the first of equals.

    Args:
        model: in evaluation mode, with its processor.
        items: questions, one batch.
        features: for each item the features of its images in order, or None.
        options: of each item.
        share: see `read_prompts`.

    Returns:
        Answers whose facts hold the log probabilities, and under ``prediction_per_token`` what the mean over tokens
        in place of the sum would have chosen.
    """
    asked = [
        item if offered.question is None else replace(item, question=offered.question)
        for item, offered in zip(items, options, strict=True)
    ]
    prompts = read_prompts(model, [item.messages for item in asked], features, share=share)
    scores = option_scores(model, asked, features, [offered.texts for offered in options], prompts=prompts)
    return [
        _answer(offered, found, facts)
        for offered, found, facts in zip(options, scores, prompt_facts(prompts.inputs), strict=True)
    ]


def _answer(options: Options, scores: Sequence[OptionScore], facts: dict[str, Any]) -> Answer:
    order = range(len(scores))
    best = max(order, key=lambda i: scores[i].log_probability)
    best_per_token = max(order, key=lambda i: scores[i].per_token)
    # The last digits depend on the batch.
    found = {
        "n_new_tokens": 0,
        "stop_reason": "likelihood",
        "options": list(options.texts),
        "log_probabilities": [round(score.log_probability, 3) for score in scores],
        "n_option_tokens": [score.n_tokens for score in scores],
        "prediction_per_token": options.answers[best_per_token],
    }
    return Answer(options.answers[best], facts | found)


@torch.no_grad()
def option_scores(
    model: SymphonyVLMForConditionalGeneration,
    items: Sequence[EvaluationItem],
    features: Features,
    texts: Sequence[Sequence[str]],
    *,
    prompts: Prompts | None = None,
) -> list[list[OptionScore]]:
    """Log probabilities of texts as answers to items.

    Args:
        model: in evaluation mode, with its processor.
        items: questions.
        features: for each item the features of its images in order, or None.
        texts: for each item at least one text.
        prompts: the same, if they are already encoded; what they have read is used up.

    Raises:
        InputError: an option is empty, or the tokenizer cannot write it.
    """
    assert model.processor is not None
    prompts = prompts or read_prompts(model, [item.messages for item in items], features, share=False)
    ids_R = [
        _option_ids(model.processor, item, images, text)
        for item, images, offered in zip(items, features, texts, strict=True)
        for text in offered
    ]
    prompt_R = [index for index, offered in enumerate(texts) for _ in offered]
    output = model(**prompts.for_forward, use_cache=True, logits_to_keep=1)
    first_BV = output.logits[:, -1].float().log_softmax(-1)
    sums_R = torch.stack([first_BV[prompt, ids[0]] for prompt, ids in zip(prompt_R, ids_R, strict=True)]).double()
    longer = [row for row, ids in enumerate(ids_R) if len(ids) > 1]
    if longer:
        rest = _rest(
            model, prompts.inputs, output.past_key_values, [prompt_R[row] for row in longer], [ids_R[r] for r in longer]
        )
        sums_R[torch.tensor(longer, device=sums_R.device)] += rest
    scores = iter([OptionScore(total, len(ids)) for total, ids in zip(sums_R.tolist(), ids_R, strict=True)])
    return [[next(scores) for _ in offered] for offered in texts]


def _rest(
    model: SymphonyVLMForConditionalGeneration,
    inputs: dict[str, Tensor],
    cache: Any,
    prompt_R: Sequence[int],
    ids_R: Sequence[Sequence[int]],
) -> Tensor:
    """``[R]`` log probability of all tokens but the first, behind the cached prompts; changes the cache."""
    device = inputs["input_ids"].device
    longest = max(map(len, ids_R)) - 1
    prompts = torch.tensor(prompt_R, device=device)
    cache.batch_select_indices(prompts)
    padded_RS = torch.tensor([[*ids, *[0] * (longest + 1 - len(ids))] for ids in ids_R], device=device)
    real_RS = torch.tensor([[n < len(ids) for n in range(longest + 1)] for ids in ids_R], device=device)
    # Padding stands on the right, where no token sees it; it only must not be an image.
    mask_RS = torch.cat([inputs["attention_mask"][prompts], real_RS[:, :-1].long()], dim=1)
    positions_RS = inputs["position_ids"][prompts, -1:] + torch.arange(1, longest + 1, device=device)
    output = model(
        input_ids=padded_RS[:, :-1], attention_mask=mask_RS, position_ids=positions_RS, past_key_values=cache
    )
    log_RSV = output.logits.float().log_softmax(-1)
    found_RS = log_RSV.gather(-1, padded_RS[:, 1:, None])[..., 0].double()
    return torch.where(real_RS[:, 1:], found_RS, 0.0).sum(-1)


def _option_ids(
    processor: SymphonyVLMProcessor, item: EvaluationItem, images: Sequence[Tensor] | None, text: str
) -> list[int]:
    """The tokens of an answer as training writes it, without its end."""
    counts = None if images is None else [len(image) for image in images]
    answer = Message(role="assistant", parts=(TextPart(text=text),))
    messages = [*item.messages, answer]
    whole = processor.encode(messages, num_image_tokens=counts, origin=f"item {item.id!r}, option {text!r}")
    prompt = processor.encode(item.messages, num_image_tokens=counts, generation_prompt=True).input_ids
    if whole.input_ids[: len(prompt)] != prompt:
        raise InputError(
            "the tokenizer writes the prompt in another way when this answer follows", where=f"option {text!r}"
        )
    ids = whole.input_ids[len(prompt) :]
    stops = processor.stop_token_ids
    ids = ids[: next((n for n, token in enumerate(ids) if token in stops), len(ids))]
    if not ids:
        raise InputError("an option without a token", where=f"item {item.id!r}", remedy="Give --scoring generate.")
    return ids
