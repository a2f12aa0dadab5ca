"""Texts and likelihoods of whole conversations, in batches with the padding on the left.

Shape letters: B batch, S sequence, C longest continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from symphony_vlm.corruptions import image_key
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.sample import Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.integrations.prompts import Prompt
from symphony_vlm.model.merge import position_ids_from_mask
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["generate_texts", "log_likelihoods"]


@torch.no_grad()
def generate_texts(
    model: SymphonyVLMForConditionalGeneration, prompts: Sequence[Prompt], settings: Mapping[str, Any]
) -> list[str]:
    """Continues one batch of conversations.

    Args:
        model: in evaluation mode, with its processor.
        prompts: conversations that end with a question.
        settings: arguments of ``generate``.
    """
    assert model.processor is not None
    features = _image_features(model, prompts)
    counts = [[len(image) for image in images] for images in features]
    inputs = model.processor.encode_prompts([prompt.messages for prompt in prompts], counts)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    flat = [image for images in features for image in images]
    ids = model.generate(**inputs, image_features=flat or None, **settings)
    return model.processor.decode_answers(ids[:, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def log_likelihoods(
    model: SymphonyVLMForConditionalGeneration, prompts: Sequence[Prompt], continuations: Sequence[str]
) -> list[tuple[float, bool]]:
    """How likely each answer is after its conversation, in one pass over a batch.

    Args:
        model: in evaluation mode, with its processor.
        prompts: conversations that end with a question.
        continuations: an answer for each. White space around it is the template's business and is dropped, and the
            token that ends an answer does not count.

    Returns:
        For each the sum of log probabilities (natural logarithm) of the answer's tokens, and whether each of them is
        the most likely one in its place.

    Raises:
        InputError: an answer is empty.
    """
    features = _image_features(model, prompts)
    rows, lengths = [], []
    for prompt, images, text in zip(prompts, features, continuations, strict=True):
        ids, length = _ids_with_answer(model, prompt, [len(image) for image in images], text)
        rows.append(ids)
        lengths.append(length)
    assert model.processor is not None
    width, pad = max(map(len, rows)), model.processor.tokenizer.pad_token_id
    ids_BS = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    flat = [image for images in features for image in images]
    longest = max(lengths)
    output = model(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        position_ids=position_ids_from_mask(mask_BS),
        image_features=flat or None,
        use_cache=False,
        logits_to_keep=longest + 1,  # all rows end in the last column
    )
    scores_BCV = output.logits[:, -longest - 1 : -1].float().log_softmax(-1)
    targets_BC = ids_BS[:, -longest:]
    chosen_BC = scores_BCV.gather(-1, targets_BC[..., None])[..., 0]
    greedy_BC = scores_BCV.argmax(-1) == targets_BC
    return [
        (float(chosen_BC[row, -length:].sum()), bool(greedy_BC[row, -length:].all()))
        for row, length in enumerate(lengths)
    ]


def _image_features(model: SymphonyVLMForConditionalGeneration, prompts: Sequence[Prompt]) -> list[list[Tensor]]:
    """Features ``[n_i, D]`` of each prompt's pictures; what several prompts share is encoded once."""
    assert model.processor is not None
    keys = [[image_key(pixels) for pixels in prompt.images] for prompt in prompts]
    distinct = {
        key: pixels
        for prompt, listed in zip(prompts, keys, strict=True)
        for key, pixels in zip(listed, prompt.images, strict=True)
    }
    if not distinct:
        return [[] for _ in prompts]
    inputs = model.processor.image_processor(list(distinct.values())).to(model.device)
    encoded = dict(zip(distinct, model.get_image_features(**inputs), strict=True))
    return [[encoded[key] for key in listed] for listed in keys]


def _ids_with_answer(
    model: SymphonyVLMForConditionalGeneration, prompt: Prompt, num_image_tokens: list[int], text: str
) -> tuple[list[int], int]:
    """Ids of a conversation up to the end of the answer's words, and how many of them are the answer's."""
    processor = model.processor
    assert processor is not None
    answer = Message(role="assistant", parts=(TextPart(text=text.strip()),))
    encoded = processor.encode([*prompt.messages, answer], num_image_tokens=num_image_tokens)
    supervised = [i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX]
    # Earlier answers of the conversation are supervised too: the last one begins where the labels last set in.
    begin = end = supervised[-1] + 1
    while encoded.labels[begin - 1] != IGNORE_INDEX:
        begin -= 1
    ids, stop = encoded.input_ids, set(processor.stop_token_ids)
    while end > begin and (ids[end - 1] in stop or not processor.tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
    if end == begin:
        raise InputError("the answer is empty, so it has no likelihood", where="loglikelihood")
    return ids[:end], end - begin
