"""Errors as OpenAI's API has them: ``{"error": {"message", "type", "param", "code"}}`` and a status code."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from symphony_vlm.serving.jobs import Failed

__all__ = ["ApiError", "failed_answer", "from_validation"]

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A request that gets an error as its answer.

    Args:
        status: HTTP status code.
        message: what is wrong and what to do, for the client's user.
        code: a short name for programs.
        param: the field at fault.
        retry_after: seconds after which asking again makes sense.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_CODES = {
    "json_invalid": "invalid_json",
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
}


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields. What the client sent is not repeated at length."""
    first = error.errors(include_url=False, include_context=True)[0]
    param = first.get("ctx", {}).get("param") or _path(first["loc"])
    code = _CODES.get(first["type"], "invalid_value")
    problem = first["msg"]
    if code == "unknown_parameter":
        problem = "There is no such parameter"
    elif code == "invalid_value" and isinstance(first["input"], (str, int, float, bool)):
        shown = repr(first["input"])
        problem += f", not {shown if len(shown) <= 60 else shown[:57] + '...'}"
    return ApiError(400, f"{param}: {problem}." if param else f"{problem}.", code=code, param=param)


def _path(location: tuple[int | str, ...]) -> str | None:
    """``messages[0].content[1].text``; the kind that pydantic puts behind the number of a part is left out."""
    path = ""
    for i, step in enumerate(location):
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (i >= 2 and location[i - 2] == "content" and isinstance(location[i - 1], int)):
            path += f".{step}" if path else step
    return path or None


def failed_answer(failed: Failed) -> ApiError:
    """An answer that could not be generated."""
    if failed.out_of_memory:
        message = f"The model ran out of memory (reference {failed.reference}). Ask with less text or fewer pictures."
        return ApiError(503, message, code="out_of_memory", retry_after=5)
    message = f"The model failed; the server's log has the error under the reference {failed.reference}."
    return ApiError(500, message, code="internal_error")
