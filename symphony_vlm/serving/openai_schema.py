"""What ``POST /v1/chat/completions`` takes: the part of OpenAI's request that is supported here.

A field that OpenAI has and this server has not is refused, unless its value asks for nothing (``n: 1``,
``presence_penalty: 0``, ``tools: []``): an answer that silently ignores a setting would be a wrong answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from symphony_vlm.serving.sampling import SamplingSettings

__all__ = ["ChatRequest", "ImageUrlPart", "RequestMessage", "TextContentPart"]

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not supported, with the values that ask for nothing; None always does."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextContentPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """A picture as a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Without effect: the model's own image processor decides."""


class ImageUrlPart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class RequestMessage(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextContentPart | ImageUrlPart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _text_is_one_part(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise PydanticCustomError("content", "Content is a text or a list of text and image_url parts")
        return value


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Without effect: nothing is added to hide the lengths of pieces."""


class ChatRequest(_Strict):
    """The request's fields."""

    model: str
    messages: list[RequestMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(default=None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Who asks; not used."""
    metadata: dict[str, str] | None = None
    """Not used."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_supported(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            raise PydanticCustomError("request", "The request is a JSON object")
        for name in _ASKS_FOR_NOTHING.keys() & fields.keys():
            value, known = fields[name], _ASKS_FOR_NOTHING[name]
            # To Python True is 1; to a client it is a mistake.
            neutral = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)
            if value is not None and not neutral:
                wanted = f"must be {' or '.join(map(repr, known))}" if known else "must be left out"
                problem = "It is not supported here and {wanted}"
                raise PydanticCustomError("unsupported", problem, {"param": name, "wanted": wanted})
        return {name: value for name, value in fields.items() if name not in _ASKS_FOR_NOTHING}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def settings(self, max_tokens: int) -> SamplingSettings:
        """How the answer is to be generated.

        Args:
            max_tokens: as many as the server and the model's positions allow; the request may ask for fewer.
        """
        asked = self.max_completion_tokens or self.max_tokens or max_tokens
        return SamplingSettings(
            max_tokens=min(asked, max_tokens),
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
