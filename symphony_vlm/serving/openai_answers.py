"""What the server answers, in the shapes of OpenAI's chat completions."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from symphony_vlm.serving.jobs import Finished

__all__ = ["END_OF_STREAM", "Answer", "sse"]

END_OF_STREAM = b"data: [DONE]\n\n"


class Answer:
    """The envelope of one answer, whole or in pieces.

    Args:
        model: the model's name.
        prompt_tokens: length of the prompt, pictures included.
    """

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = model
        self._prompt_tokens = prompt_tokens

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        """A ``chat.completion``."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
        return self._envelope("chat.completion", [choice]) | {"usage": self._usage(end)}

    def chunk(self, delta: dict[str, str], *, reason: str | None = None, wants_usage: bool) -> bytes:
        """A ``chat.completion.chunk`` as a server-sent event."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        # With include_usage every chunk has the field, and the last alone a value.
        return self._event([choice], {"usage": None} if wants_usage else {})

    def usage_chunk(self, end: Finished) -> bytes:
        """The chunk without a choice that ends a stream with ``include_usage``."""
        return self._event([], {"usage": self._usage(end)})

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return sse(self._envelope("chat.completion.chunk", choices) | more)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _usage(self, end: Finished) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": end.num_tokens,
            "total_tokens": self._prompt_tokens + end.num_tokens,
        }


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    # Escaped, the line separators of Unicode cannot end an event early in a client that splits at them.
    return f"data: {json.dumps(value)}\n\n".encode()
