"""A conversation with a model about pictures, without any user interface.

Every interface (terminal, web page, your own) holds one `ChatSession` per user. The model may be shared.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symphony_vlm.data.images import ImageLike, open_image
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.serving.generation import Generation
from symphony_vlm.serving.prefix_cache import PrefixCache, forget_all, mark_tokens
from symphony_vlm.serving.visible_text import VisibleText

if TYPE_CHECKING:
    from PIL import Image
    from transformers.feature_extraction_utils import BatchFeature

    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["ChatSession", "read_picture"]

_ABOUT_CACHE = {
    *("use_cache", "past_key_values", "cache_implementation", "cache_config", "prefill_chunk_size"),
    *("assistant_model", "prompt_lookup_num_tokens", "generation_config"),
}
"""Arguments of ``generate`` with which a turn has a cache of its own, or none."""


def read_picture(image: ImageLike) -> Image.Image:
    """A picture that a person gave, as upright RGB.

    Raises:
        InputError: it cannot be read; unlike the readers of data sets, the message suggests another picture.
    """
    try:
        return open_image(image)
    except InputError as error:
        raise InputError(error.problem, where=error.where, remedy="Choose another picture.") from error


class ChatSession:
    """A conversation of many turns, each with any number of pictures.

    Users' words stay text: a ``<image>`` or an end marker that somebody types is read as those letters. A turn that
    fails, or whose stream is closed before its end, leaves the history as it was, and its pictures wait for the next
    question.

    A picture is encoded once, and a turn computes its own tokens only: keys and values of those before are kept
    (`prefix_cache`), for the conversations used last.

    Args:
        model: a model with its processor, as `symphony_vlm.load` gives it. Several sessions may share it, but only
            one may generate at a time.
        system: a system message instead of the template's own.
        reuse_prefix: False computes the whole conversation again in every turn.

    Raises:
        InputError: the model has no processor.
    """

    def __init__(
        self,
        model: SymphonyVLMForConditionalGeneration,
        *,
        system: str | None = None,
        reuse_prefix: bool = True,
    ) -> None:
        if model.processor is None:
            raise InputError("no processor", where="chat", remedy="Open the model with symphony_vlm.load(folder).")
        self.model = model
        self._processor: SymphonyVLMProcessor = model.processor
        self._system = () if system is None else (Message(role="system", parts=(TextPart(text=system),)),)
        self._turns: tuple[Message, ...] = ()
        self._pictures: tuple[_Picture, ...] = ()
        self._pending: list[_Picture] = []
        self._prefix = PrefixCache() if reuse_prefix else None
        self._generation: Generation | None = None
        self._answering = False

    @property
    def history(self) -> tuple[Message, ...]:
        """The messages so far, the system message (if one was given) first. Replaced, never changed, by a turn."""
        return (*self._system, *self._turns)

    @property
    def image_features(self) -> tuple[Tensor, ...]:
        """What the model was given of the pictures in the history, in their order, ``[n, D]`` each."""
        return tuple(self._encode(picture) for picture in self._pictures)

    @property
    def num_pending_images(self) -> int:
        """How many pictures wait for the next question."""
        return len(self._pending)

    def add_image(self, image: ImageLike) -> None:
        """Attaches a picture to the next question, after those attached before.

        Raises:
            InputError: it cannot be read. Nothing is attached then.
        """
        self._pending.append(self._read(image))

    def replace_images(self, images: Sequence[ImageLike]) -> None:
        """Puts other pictures in the place of those of the conversation and those that wait, say corrupted ones.

        What was said stays; from the next turn on the model sees the new pictures.

        Args:
            images: one for each, those of the conversation first.

        Raises:
            InputError: an answer is being generated, a picture cannot be read, or they are not as many as before.
                Nothing is replaced then.
        """
        self._require_idle()
        known = len(self._pictures)
        if len(images) != known + len(self._pending):
            raise InputError(f"{len(images)} pictures for {known + len(self._pending)}", where="replace_images")
        read = [self._read(image) for image in images]
        self._pictures, self._pending = tuple(read[:known]), read[known:]

    def _read(self, image: ImageLike) -> _Picture:
        opened = read_picture(image)
        (num_tokens,) = self._processor.count_image_tokens([(opened.height, opened.width)])
        return _Picture(inputs=self._processor.image_processor(opened), num_tokens=num_tokens)

    def drop_images(self) -> None:
        """Forgets the pictures that wait for the next question."""
        self._pending.clear()

    def reset(self) -> None:
        """Starts a new conversation: forgets all messages and pictures.

        Raises:
            InputError: an answer is being generated.
        """
        self._require_idle()
        self._turns, self._pictures = (), ()
        self._pending.clear()
        if self._prefix is not None:
            self._prefix.clear()

    def rewind(self, num_questions: int) -> None:
        """Forgets every question, with its pictures and its answer, after the first few; a retry asks it again.

        Args:
            num_questions: how many stay.

        Raises:
            InputError: an answer is being generated.
        """
        self._require_idle()
        self._turns = self._turns[: 2 * num_questions]
        pictures = [part for message in self._turns for part in message.parts if isinstance(part, ImagePart)]
        self._pictures = self._pictures[: len(pictures)]

    def ask(self, text: str, *, max_new_tokens: int = 128, temperature: float = 0.0, **generation: Any) -> str:
        """The whole answer to a question; arguments and errors as in `stream`."""
        for _ in self.stream(text, max_new_tokens=max_new_tokens, temperature=temperature, **generation):
            pass
        return self._turns[-1].text

    def stream(
        self, text: str, *, max_new_tokens: int = 128, temperature: float = 0.0, **generation: Any
    ) -> Generator[str, None, None]:
        """The answer piece by piece, as it is generated; the pieces joined are the answer.

        Close the iterator to give the turn up, or call `stop` to keep the answer so far.

        Args:
            text: the user's words.
            max_new_tokens: longest answer; less where the model's positions end before.
            temperature: 0 takes the likeliest token each time; above 0 tokens are drawn, the higher the freer.
            generation: further arguments of ``generate``.

        Raises:
            InputError: the question is empty, a setting is out of range, or the conversation does not fit into the
                model's positions.
        """
        self._require_idle()
        _check_settings(text, max_new_tokens, temperature)
        turn = self._prepare(text, max_new_tokens)
        suppressed = {self._processor.image_token_id, *(generation.pop("suppress_tokens", None) or ())}
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        # A generated placeholder would be a picture that does not exist.
        arguments = {"max_new_tokens": turn.room, "suppress_tokens": sorted(suppressed), **sampling, **generation}
        return self._answer(turn, arguments)

    def stop(self) -> None:
        """Ends the answer after the token it is at, from any thread; what was generated so far is the answer.

        Without an answer in progress this does nothing.
        """
        if (generation := self._generation) is not None:
            generation.stop()

    def _require_idle(self) -> None:
        if self._answering:
            raise InputError("an answer is still being generated", where="chat", remedy="Wait for it, or close it.")

    def _prepare(self, text: str, max_new_tokens: int) -> _Turn:
        pictures = tuple(self._pending)
        images = tuple(ImagePart(index=len(self._pictures) + i) for i in range(len(pictures)))
        # A line feed between pictures and words, as in LLaVA's training data.
        question = Message(role="user", parts=(*images, TextPart(text=f"\n{text}" if images else text)))
        counts = [picture.num_tokens for picture in (*self._pictures, *pictures)]
        prompt = self._processor.encode_prompts([[*self.history, question]], [counts])
        length = prompt["input_ids"].shape[1]
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - length)
        if room < 1:
            first = not self._turns
            raise InputError(
                f"the {'question' if first else 'conversation'} has {length:,} tokens with its pictures, and the model "
                f"has {limit:,} positions for it and the answer",
                where="chat",
                remedy="Ask with fewer words or pictures." if first else "Start a new conversation.",
            )
        return _Turn(question=question, pictures=pictures, prompt=prompt, room=room)

    def _answer(self, turn: _Turn, arguments: dict[str, Any]) -> Generator[str, None, None]:
        self._require_idle()
        self._answering = True
        try:
            inputs: dict[str, Any] = {name: tensor.to(self.model.device) for name, tensor in turn.prompt.items()}
            pictures = (*self._pictures, *turn.pictures)
            new_pictures, keeping = self._go_on_from_prefix(turn, pictures, inputs, arguments)
            if features := [self._encode(picture) for picture in new_pictures]:
                inputs["image_features"] = features
            with keeping:
                self._generation = generation = Generation(self.model, self._processor, {**inputs, **arguments})
                visible = VisibleText((self._processor.answer_end,))
                for piece in generation.pieces():
                    if new := visible.add(piece):
                        yield new
                    if visible.ended:
                        generation.stop()
                ids = generation.result().sequences
            answer = self._processor.decode_answers(ids[:, inputs["input_ids"].shape[1] :])[0]
            if rest := answer[visible.length :]:
                yield rest
            self._commit(turn, answer)
        except torch.OutOfMemoryError:
            forget_all()
            raise
        finally:
            self._generation = None
            self._answering = False

    def _go_on_from_prefix(
        self, turn: _Turn, pictures: Sequence[_Picture], inputs: dict[str, Any], arguments: dict[str, Any]
    ) -> tuple[Sequence[_Picture], contextlib.AbstractContextManager[None]]:
        """Adds the cache to the inputs; returns the pictures it lacks, and what has to surround the generation."""
        token = self._processor.image_token_id
        ids: list[int] = inputs["input_ids"][0].tolist()
        marks = mark_tokens(ids, token, [(picture.number, picture.num_tokens) for picture in pictures])
        reused = 0
        prefix = None if _ABOUT_CACHE & arguments.keys() else self._prefix
        if prefix is not None:
            cache, reused = prefix.take(marks)
            if cache is not None:
                inputs["past_key_values"] = cache
        elif self._prefix is not None:
            self._prefix.clear()
        # Pictures stand in the prompt in their order, and the cache ends inside of none.
        known = ids[:reused].count(token)
        ends = itertools.accumulate(picture.num_tokens for picture in pictures)
        return pictures[sum(end <= known for end in ends) :], self._keeping(prefix, marks, len(ids))

    @contextlib.contextmanager
    def _keeping(self, prefix: PrefixCache | None, marks: list[int], prompt_length: int) -> Generator[None, None, None]:
        """Keeps the cache of the generation inside, also of one that was stopped half-way."""
        try:
            yield
        finally:
            # The thread must have ended, however the turn did; what it computed is good unless it failed.
            if self._generation is not None and not self._generation.close() and prefix is not None:
                output = self._generation.result()
                prefix.put(output.past_key_values, [*marks, *output.sequences[0, prompt_length:].tolist()])

    @torch.no_grad()
    def _encode(self, picture: _Picture) -> Tensor:
        """Features ``[n, D]``; computed once, also if the turn has to be tried again."""
        if picture.features is None:
            (picture.features,) = self.model.get_image_features(**picture.inputs.to(self.model.device))
        return picture.features

    def _commit(self, turn: _Turn, answer: str) -> None:
        reply = Message(role="assistant", parts=(TextPart(text=answer),))
        self._turns = (*self._turns, turn.question, reply)
        self._pictures = (*self._pictures, *turn.pictures)
        del self._pending[: len(turn.pictures)]


@dataclass(kw_only=True)
class _Picture:
    inputs: BatchFeature
    """What the image processor made of it."""
    num_tokens: int
    features: Tensor | None = None
    number: int = field(default_factory=itertools.count().__next__)
    """No other picture has it."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A question that is ready to be answered."""

    question: Message
    pictures: tuple[_Picture, ...]
    prompt: dict[str, Tensor]
    room: int
    """Most tokens that the answer may have."""


def _check_settings(text: str, max_new_tokens: int, temperature: float) -> None:
    if not text.strip():
        raise InputError("the question is empty", where="chat", remedy="Write a question.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError("the question has bytes that are not UTF-8 text", where="chat")
    if max_new_tokens < 1:
        raise InputError(f"{max_new_tokens} must be at least 1", where="max_new_tokens")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"{temperature} must be 0 (the likeliest answer) or more", where="temperature")
