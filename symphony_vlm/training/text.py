"""The language stage: the language model on the conversations' text alone, in blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from symphony_vlm.data.conversation import encode_conversation
from symphony_vlm.data.sample import Message, Sample, TextPart
from symphony_vlm.data.templates import resolve_template
from symphony_vlm.errors import InputError

__all__ = ["TextBlocks", "without_images"]


def without_images(messages: Sequence[Message]) -> list[Message]:
    """The same turns with image parts removed, and the line feed that separated them from the text."""
    result = []
    for message in messages:
        texts = [part.text for part in message.parts if isinstance(part, TextPart)]
        result.append(Message(role=message.role, parts=(TextPart(text="".join(texts).lstrip("\n")),)))
    return result


class TextBlocks(Dataset[dict[str, Tensor]]):
    """All conversations as one stream of tokens, cut into blocks; every token is supervised.

    Args:
        samples: conversations.
        tokenizer: with an EOS token, which separates conversations.
        template: name of the layout.
        block_size: tokens per block; the incomplete last block is left out.
    """

    def __init__(self, samples: Sequence[Sample], *, tokenizer: Any, template: str, block_size: int) -> None:
        stream: list[int] = []
        layout = resolve_template(template, tokenizer)
        for sample in samples:
            encoded = encode_conversation(
                without_images(sample.messages),
                template=layout,
                tokenizer=tokenizer,
                image_token_id=-1,
                num_image_tokens=0,
                origin=sample.origin,
            )
            stream += [*encoded.input_ids, tokenizer.eos_token_id]
        num_blocks = len(stream) // block_size
        if num_blocks == 0:
            raise InputError(
                f"{len(samples)} conversations make {len(stream)} tokens, less than one block of {block_size}",
                where="language stage",
                remedy="Lower the stage's max_length or give more text.",
            )
        self._blocks = torch.tensor(stream[: num_blocks * block_size]).view(num_blocks, block_size)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index]}
