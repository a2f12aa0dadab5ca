"""A conversation with a model about pictures, without any user interface.

Every interface (terminal, web page, your own) holds one `ChatSession` per user. The model may be shared.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from symphony_vlm.data.images import ImageLike, open_image
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from transformers.feature_extraction_utils import BatchFeature

    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["ChatSession", "read_picture"]


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

    Args:
        model: a model with its processor, as `symphony_vlm.load` gives it. Several sessions may share it, but only
            one may generate at a time.
        system: a system message instead of the template's own.

    Raises:
        InputError: the model has no processor.
    """

    def __init__(self, model: SymphonyVLMForConditionalGeneration, *, system: str | None = None) -> None:
        if model.processor is None:
            raise InputError("no processor", where="chat", remedy="Open the model with symphony_vlm.load(folder).")
        self.model = model
        self._processor: SymphonyVLMProcessor = model.processor
        self._system = () if system is None else (Message(role="system", parts=(TextPart(text=system),)),)
        self._turns: tuple[Message, ...] = ()
        self._features: tuple[Tensor, ...] = ()
        self._pending: list[_Picture] = []
        self._generation: _Generation | None = None
        self._answering = False

    @property
    def history(self) -> tuple[Message, ...]:
        """The messages so far, the system message (if one was given) first. Replaced, never changed, by a turn."""
        return (*self._system, *self._turns)

    @property
    def image_features(self) -> tuple[Tensor, ...]:
        """What the model was given of the pictures in the history, in their order, ``[n, D]`` each."""
        return self._features

    @property
    def num_pending_images(self) -> int:
        """How many pictures wait for the next question."""
        return len(self._pending)

    def add_image(self, image: ImageLike) -> None:
        """Attaches a picture to the next question, after those attached before.

        Raises:
            InputError: it cannot be read. Nothing is attached then.
        """
        opened = read_picture(image)
        (num_tokens,) = self._processor.count_image_tokens([(opened.height, opened.width)])
        self._pending.append(_Picture(inputs=self._processor.image_processor(opened), num_tokens=num_tokens))

    def drop_images(self) -> None:
        """Forgets the pictures that wait for the next question."""
        self._pending.clear()

    def reset(self) -> None:
        """Starts a new conversation: forgets all messages and pictures.

        Raises:
            InputError: an answer is being generated.
        """
        self._require_idle()
        self._turns, self._features = (), ()
        self._pending.clear()

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
        self._features = self._features[: len(pictures)]

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
        images = tuple(ImagePart(index=len(self._features) + i) for i in range(len(pictures)))
        # A line feed between pictures and words, as in LLaVA's training data.
        question = Message(role="user", parts=(*images, TextPart(text=f"\n{text}" if images else text)))
        counts = [len(features) for features in self._features] + [picture.num_tokens for picture in pictures]
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
            features = (*self._features, *(self._encode(picture) for picture in turn.pictures))
            if features:
                inputs["image_features"] = list(features)
            self._generation = generation = _Generation(self.model, self._processor, {**inputs, **arguments})
            visible = _VisibleText(self._processor.answer_end)
            for piece in generation.pieces():
                if new := visible.add(piece):
                    yield new
                if visible.ended:
                    generation.stop()
            answer = self._processor.decode_answers(generation.result()[:, inputs["input_ids"].shape[1] :])[0]
            if rest := answer[visible.length :]:
                yield rest
            self._commit(turn, answer, features)
        finally:
            if self._generation is not None:
                self._generation.close()
            self._generation = None
            self._answering = False

    @torch.no_grad()
    def _encode(self, picture: _Picture) -> Tensor:
        """Features ``[n, D]``; computed once, also if the turn has to be tried again."""
        if picture.features is None:
            (picture.features,) = self.model.get_image_features(**picture.inputs.to(self.model.device))
        return picture.features

    def _commit(self, turn: _Turn, answer: str, features: tuple[Tensor, ...]) -> None:
        reply = Message(role="assistant", parts=(TextPart(text=answer),))
        self._turns = (*self._turns, turn.question, reply)
        self._features = features
        del self._pending[: len(turn.pictures)]


@dataclass(kw_only=True)
class _Picture:
    inputs: BatchFeature
    """What the image processor made of it."""
    num_tokens: int
    features: Tensor | None = None


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


@dataclass
class _VisibleText:
    """What of the generated text may be shown already: no blank edges, and nothing from the end marker on."""

    end: str
    ended: bool = False
    length: int = 0
    """Of what `add` gave out."""
    _text: str = field(default="", repr=False)

    def add(self, piece: str) -> str:
        """Takes new text and returns what has become visible."""
        self._text += piece
        cut = self._text.find(self.end)
        self.ended = cut >= 0
        visible = (self._text[:cut] if self.ended else self._text[: len(self._text) - self._begun_end()]).strip()
        new = visible[self.length :]
        self.length += len(new)
        return new

    def _begun_end(self) -> int:
        """How many letters at the end of the text may be the beginning of the end marker."""
        sizes = range(min(len(self.end) - 1, len(self._text)), 0, -1)
        return next((size for size in sizes if self._text.endswith(self.end[:size])), 0)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Generation:
    """``model.generate`` in a thread of its own, which starts at once."""

    def __init__(
        self,
        model: SymphonyVLMForConditionalGeneration,
        processor: SymphonyVLMProcessor,
        arguments: dict[str, Any],
    ) -> None:
        self._model = model
        self._stopping = threading.Event()
        self._streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ids: Tensor | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(arguments,), name="generate", daemon=True)
        self._thread.start()

    def _run(self, arguments: dict[str, Any]) -> None:
        criteria = [*arguments.pop("stopping_criteria", ()), _StopWhenSet(self._stopping)]
        try:
            self._ids = self._model.generate(
                **arguments, streamer=self._streamer, stopping_criteria=StoppingCriteriaList(criteria)
            )
        except BaseException as error:  # it belongs to the consumer, whatever it is
            self._error = error
            # Otherwise the consumer would wait for ever.
            self._streamer.on_finalized_text("", stream_end=True)

    def pieces(self) -> Iterator[str]:
        """Text as it comes; ends when generation ends, also by an error."""
        yield from self._streamer

    def result(self) -> Tensor:
        """Prompt and answer ids, ``[1, S]``, after the end; raises what the generation raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._ids is not None
        return self._ids

    def stop(self) -> None:
        """Asks the generation to end after the token it is at."""
        self._stopping.set()

    def close(self) -> None:
        """Stops, and waits for the thread."""
        self.stop()
        self._thread.join()
