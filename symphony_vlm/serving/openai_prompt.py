"""From a request's messages to token ids and pictures, within the server's limits."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from symphony_vlm.data.images import image_from_base64, load_image
from symphony_vlm.data.sample import ImagePart, Message, Role, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.serving.jobs import Picture
from symphony_vlm.serving.openai_errors import ApiError
from symphony_vlm.serving.openai_schema import ChatRequest, ImageUrlPart, RequestMessage
from symphony_vlm.serving.request_limits import RequestLimits
from symphony_vlm.serving.uploads import for_visitors

if TYPE_CHECKING:
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["Prompt", "PromptMaker"]

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request, ready for the model."""

    input_ids: list[int]
    pictures: tuple[Picture, ...]
    room: int
    """Most tokens that the answer may have."""


class PromptMaker:
    """Reads messages for one model; may be called from several threads.

    Args:
        model: with its processor.
        limits: see `RequestLimits`.
    """

    def __init__(self, model: SymphonyVLMForConditionalGeneration, limits: RequestLimits) -> None:
        assert model.processor is not None
        self._processor = model.processor
        self._limits = limits
        self._positions: int | None = getattr(model.config.text_config, "max_position_embeddings", None)
        # A tokenizer cannot be borrowed by two threads while one of them sets it up.
        self._tokenizing = threading.Lock()

    def read(self, request: ChatRequest) -> Prompt:
        """The prompt of a request.

        Raises:
            ApiError: the messages, a picture or their lengths cannot be used.
        """
        self._check_order(request.messages)
        self._check_sizes(request.messages)
        pictures: list[Picture] = []
        messages = []
        for number, message in enumerate(request.messages):
            parts: list[TextPart | ImagePart] = []
            for place, part in enumerate(message.content):
                if isinstance(part, ImageUrlPart):
                    param = f"messages[{number}].content[{place}].image_url"
                    parts.append(ImagePart(index=len(pictures)))
                    pictures.append(self._picture(part.image_url.url, param))
                else:
                    # A line feed behind pictures, as in LLaVA's training data, and between texts.
                    parts.append(TextPart(text=f"\n{part.text}" if parts else part.text))
            messages.append(Message(role=_ROLES[message.role], parts=tuple(parts)))
        ids = self._encode(messages, [picture.num_tokens for picture in pictures])
        room = self._limits.max_tokens
        if self._positions is not None:
            room = min(room, self._positions - len(ids))
        if room < 1:
            raise _too_long(f"{len(ids):,} tokens with their pictures", f"{self._positions:,} positions")
        return Prompt(input_ids=ids, pictures=tuple(pictures), room=room)

    def _check_order(self, messages: list[RequestMessage]) -> None:
        for number, message in enumerate(messages):
            param = f"messages[{number}]"
            if _ROLES[message.role] == "system" and number > 0:
                raise _invalid("A system message can only be the first.", f"{param}.role")
            if message.role != "user" and any(isinstance(part, ImageUrlPart) for part in message.content):
                raise _invalid("Only a user's message can have pictures.", f"{param}.content")
            if message.role != "assistant" and all(_is_blank(part) for part in message.content):
                raise _invalid("The message is empty.", f"{param}.content")
        if messages[-1].role != "user":
            raise _invalid("The last message must be the user's.", f"messages[{len(messages) - 1}].role")

    def _check_sizes(self, messages: list[RequestMessage]) -> None:
        parts = [part for message in messages for part in message.content]
        num_images = sum(isinstance(part, ImageUrlPart) for part in parts)
        if num_images > self._limits.max_images:
            raise _invalid(f"{num_images} pictures; the limit is {self._limits.max_images}.", "messages")
        num_characters = sum(len(part.text) for part in parts if not isinstance(part, ImageUrlPart))
        if num_characters > self._limits.max_characters:
            raise _too_long(f"{num_characters:,} characters", f"a limit of {self._limits.max_characters:,}")

    def _picture(self, url: str, param: str) -> Picture:
        try:
            if url[:5].lower() != "data:":
                raise InputError(
                    "is not a data URL; this server fetches nothing from the network: send "
                    "'data:image/<type>;base64,...'",
                    where="image",
                )
            reference = image_from_base64(url, name="image", max_bytes=self._limits.max_image_bytes)
            image = load_image(reference, max_pixels=self._limits.max_pixels)
        except InputError as error:
            raise _invalid(for_visitors(error), param, code="invalid_image") from error
        assert reference.data is not None
        (num_tokens,) = self._processor.count_image_tokens([(image.height, image.width)])
        key = hashlib.sha256(reference.data).hexdigest()
        return Picture(key=key, inputs=self._processor.image_processor(image), num_tokens=num_tokens)

    def _encode(self, messages: list[Message], num_image_tokens: list[int]) -> list[int]:
        try:
            with self._tokenizing:
                return self._processor.encode(
                    messages, generation_prompt=True, num_image_tokens=num_image_tokens
                ).input_ids
        except InputError as error:
            raise _invalid(f"{error.problem.rstrip('.')}.", "messages") from error


def _is_blank(part: object) -> bool:
    return not isinstance(part, ImageUrlPart) and not getattr(part, "text", "").strip()


def _invalid(message: str, param: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {message}", code=code, param=param)


def _too_long(found: str, limit: str) -> ApiError:
    message = f"The messages have {found}, and there is {limit} for them and the answer. Send less."
    return ApiError(400, message, code="context_length_exceeded", param="messages")
