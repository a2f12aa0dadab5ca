"""Conversations as other programs write them, with their pictures, as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from symphony_vlm.data.images import open_image
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError

__all__ = ["Perturb", "Prompt", "prompt_of_messages", "prompt_of_text"]

Perturb = Callable[[np.ndarray], np.ndarray]
"""Takes the upright RGB pixels of a picture, uint8 ``[H, W, 3]``, and gives those that the model sees."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation that ends with a question, and its pictures in reading order."""

    messages: tuple[Message, ...]
    images: tuple[np.ndarray, ...]
    """Uint8 ``[H, W, 3]`` each."""


def prompt_of_messages(chat: Sequence[Mapping[str, Any]], perturb: Perturb, *, origin: str) -> Prompt:
    """A prompt from messages ``{role, content: [{type: text, text} | {type: image, url: Pillow image or file}]}``.

    Words that follow a turn's opening pictures stand on a new line, as in the models' training.

    Args:
        chat: the messages.
        perturb: what is done to every picture.
        origin: names the question in error messages.

    Raises:
        InputError: another kind of content or role, or a picture that cannot be read.
    """
    images: list[np.ndarray] = []
    messages = []
    for message in chat:
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise InputError(f"role {role!r} is not one of system, user, assistant", where=origin)
        parts: list[TextPart | ImagePart] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                parts.append(ImagePart(index=len(images)))
                images.append(perturb(_pixels(part.get("url"), origin)))
            elif part["type"] == "text":
                opens_with_images = bool(parts) and all(isinstance(before, ImagePart) for before in parts)
                new_line = "\n" if opens_with_images and not part["text"].startswith("\n") else ""
                parts.append(TextPart(text=new_line + part["text"]))
            else:
                raise InputError(
                    f"content of type {part['type']!r}, expected text or image",
                    where=origin,
                    remedy="Leave this task out: the models here see still pictures alone.",
                )
        messages.append(Message(role=role, parts=tuple(parts)))
    return Prompt(messages=tuple(messages), images=tuple(images))


def prompt_of_text(text: str, pictures: Sequence[Any] | None, perturb: Perturb, *, origin: str) -> Prompt:
    """One question behind its pictures; arguments as in `prompt_of_messages`."""
    content: list[dict[str, Any]] = [{"type": "image", "url": picture} for picture in pictures or ()]
    content.append({"type": "text", "text": text})
    return prompt_of_messages([{"role": "user", "content": content}], perturb, origin=origin)


def _pixels(picture: Any, origin: str) -> np.ndarray:
    if not isinstance(picture, (str, Image.Image)):
        raise InputError(f"a picture is a {type(picture).__name__}, expected a Pillow image or a file", where=origin)
    try:
        return np.asarray(open_image(picture))
    except InputError as error:
        raise InputError(f"{error.where}: {error.problem}", where=origin, remedy=error.remedy) from error
