"""The processor: conversations, text and images to model inputs, the same way in training and inference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from symphony_vlm.data.chat_template import ChatTemplate
from symphony_vlm.data.conversation import EncodedConversation, encode_conversation
from symphony_vlm.data.images import ImageLike, image_size, open_image
from symphony_vlm.data.sample import ImagePart, ImageRef, Message
from symphony_vlm.data.templates import AUTO, Layout, get_template, resolve_template, stop_token_ids
from symphony_vlm.data.tokenizer import IMAGE_TOKEN
from symphony_vlm.errors import InputError
from symphony_vlm.model.merge import position_ids_from_mask
from symphony_vlm.model.registration import register

__all__ = ["SymphonyVLMProcessor"]


class SymphonyVLMProcessor(ProcessorMixin):
    """Tokenizer, image processor and conversation template of one model.

    Args:
        image_processor: prepares images.
        tokenizer: knows ``<image>`` and the template's markers.
        num_image_tokens: placeholders per image; where images become tiles, of one tile.
        template: name of a built-in conversation template, ``tokenizer`` for the tokenizer's own, or ``auto`` for that
            where there is one and ``vicuna_v1`` elsewhere. `self.template` and a saved processor have the choice.
        chat_template: the same as jinja text, of a saved processor. The template ``tokenizer`` is what stands there,
            so that a checkpoint stays as it is, whatever becomes of the tokenizer's files.

    Raises:
        InputError: no such template, or the tokenizer does not fit it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 576,
        template: str = AUTO,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        if template == ChatTemplate.name and chat_template is not None:
            layout: Layout = ChatTemplate.read(chat_template, tokenizer)
        else:
            layout = resolve_template(template, tokenizer)
        self.template = layout.name
        self._layouts = {layout.name: layout}
        super().__init__(image_processor, tokenizer, chat_template=chat_template or layout.to_jinja(IMAGE_TOKEN))

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder."""
        token_id: int = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return token_id

    def count_image_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Placeholders for images of these heights and widths (as shown, the EXIF orientation applied)."""
        grid = self.image_processor.tile_grid
        if grid is None:
            return [self.num_image_tokens] * len(image_sizes)
        return [grid.num_tokens(size, self.num_image_tokens) for size in image_sizes]

    def count_tokens_of_files(self, images: Sequence[ImageRef]) -> list[int] | None:
        """`count_image_tokens` of images that are not open, by their headers; None if no size matters."""
        if self.image_processor.tile_grid is None:
            return None
        return self.count_image_tokens([image_size(ref) for ref in images])

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Text with ``<image>`` marks and their images, as in other processors of transformers.

        Args:
            images: one, a list, or a list per text; Pillow images or files.
            text: one or several texts with a mark in the place of each image.
            kwargs: for the tokenizer.

        Raises:
            InputError: marks and images differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        flat = _flatten(images)
        marks = sum(item.count(IMAGE_TOKEN) for item in texts)
        if marks != len(flat):
            raise InputError(f"{marks} {IMAGE_TOKEN} marks in the text but {len(flat)} images", where="processor")
        # `apply_chat_template` passes these two for other modalities, and asks for the third with an assistant mask.
        kwargs = {name: value for name, value in kwargs.items() if name not in ("videos", "audio")}
        wants_replacements = kwargs.pop("return_text_replacement_offsets", False)
        options = {"return_tensors": "pt", "padding": len(texts) > 1, "add_special_tokens": False} | kwargs
        opened = [open_image(image) for image in flat]
        counts = iter(self.count_image_tokens([(image.height, image.width) for image in opened]))
        marks_of_texts = [_marks(item, counts) for item in texts]
        # Generation continues at the end of every row, so the padding stands on the left.
        expanded = [_expand(item, marks) for item, marks in zip(texts, marks_of_texts, strict=True)]
        inputs = dict(self.tokenizer(expanded, **({"padding_side": "left"} | options)))
        inputs.pop("token_type_ids", None)
        if wants_replacements:
            inputs["text_replacement_offsets"] = [_replacements(marks) for marks in marks_of_texts]
        if opened:
            inputs.update(self.image_processor(opened))
        return BatchFeature(inputs)

    def layout(self, template: str | None = None) -> Layout:
        """How conversations are written: the processor's own template, or a built-in one by name."""
        name = template or self.template
        if name not in self._layouts:
            self._layouts[name] = resolve_template(get_template(name).name, self.tokenizer)
        return self._layouts[name]

    @property
    def stop_token_ids(self) -> list[int]:
        """Where generation stops: at the token that closes an answer, and at the tokenizer's EOS."""
        return stop_token_ids(self.layout(), self.tokenizer)

    @property
    def answer_end(self) -> str:
        """The text that ends an answer."""
        return self.layout().stop_token or "\n"

    def encode(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        num_image_tokens: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> EncodedConversation:
        """Ids and labels of one conversation, see `data.conversation.encode_conversation`.

        Args:
            messages: the turns.
            template: instead of the processor's own.
            num_image_tokens: of each of the sample's images (`count_image_tokens`); needed where images become tiles.
            kwargs: for `encode_conversation`.

        Raises:
            InputError: see `encode_conversation`, or the images' tokens are not given but depend on their sizes.
        """
        has_images = any(isinstance(part, ImagePart) for message in messages for part in message.parts)
        if has_images and num_image_tokens is None and self.image_processor.tile_grid is not None:
            raise InputError(
                "with resize_mode: anyres the number of an image's tokens depends on its size, which is not given",
                where="num_image_tokens",
                remedy="Give processor.count_image_tokens(sizes).",
            )
        return encode_conversation(
            messages,
            template=self.layout(template),
            tokenizer=self.tokenizer,
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens if num_image_tokens is None else num_image_tokens,
            **kwargs,
        )

    def encode_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        num_image_tokens: Sequence[Sequence[int] | None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Left-padded ``input_ids``, ``attention_mask``, ``position_ids`` for generation, ``[B, S]``.

        Args:
            conversations: each ends with a question.
            num_image_tokens: for each conversation, see `encode`.
        """
        counts = num_image_tokens or [None] * len(conversations)
        rows = [
            self.encode(messages, generation_prompt=True, num_image_tokens=tokens).input_ids
            for messages, tokens in zip(conversations, counts, strict=True)
        ]
        return self.pad_prompts(rows)

    def pad_prompts(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """The same of prompts that are token ids already."""
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids_from_mask(mask)}

    def decode_answers(self, ids: torch.Tensor) -> list[str]:
        """Generated ids ``[B, S]`` (without the prompt) to texts, stripped, without their end and what follows it."""
        rows = _until(ids.tolist(), self.stop_token_ids)
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.split(self.answer_end)[0].strip() for text in texts]


def _flatten(images: Any) -> list[ImageLike]:
    """One image, a list of them or a list of lists, as `apply_chat_template` gives them, in reading order."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for item in images for image in _flatten(item)]


def _marks(text: str, counts: Iterator[int]) -> list[tuple[int, int]]:
    """Where each mark begins in the text, and how many placeholders stand for it."""
    return [(match.start(), next(counts)) for match in re.finditer(re.escape(IMAGE_TOKEN), text)]


def _expand(text: str, marks: Sequence[tuple[int, int]]) -> str:
    for start, count in reversed(marks):
        text = text[:start] + IMAGE_TOKEN * count + text[start + len(IMAGE_TOKEN) :]
    return text


def _until(rows: list[list[int]], stop_ids: list[int]) -> list[list[int]]:
    """The rows up to the first stop token."""
    ends = [next((i for i, token in enumerate(row) if token in stop_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def _replacements(marks: Sequence[tuple[int, int]]) -> list[dict[str, tuple[int, int]]]:
    """Where each mark stood in the text and what it became, in characters."""
    spans = []
    shift = 0
    for start, count in marks:
        end, new_end = start + len(IMAGE_TOKEN), start + shift + count * len(IMAGE_TOKEN)
        spans.append({"span": (start, end), "new_span": (start + shift, new_end)})
        shift = new_end - end
    return spans


register("processor")
