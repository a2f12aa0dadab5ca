"""The routes of the OpenAI-compatible server. docs/serving.md describes them.

starlette is imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from symphony_vlm.serving.batching import BatchScheduler, Closed, QueueFull
from symphony_vlm.serving.jobs import Event, Failed, Job, Piece
from symphony_vlm.serving.openai_answers import END_OF_STREAM, Answer, sse
from symphony_vlm.serving.openai_errors import ApiError, failed_answer, from_validation
from symphony_vlm.serving.openai_prompt import Prompt, PromptMaker
from symphony_vlm.serving.openai_schema import ChatRequest
from symphony_vlm.serving.request_limits import RequestLimits

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["Api"]

_LOOK_SECONDS = 0.25
"""How often a request that waits for its next word looks whether its client is still there."""
_PREPARING = 4
"""Requests whose pictures are decoded at the same time."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Api:
    """The application's state.

    Attributes:
        name: of the model, as clients ask for it.
        scheduler: answers the questions.
        prompts: reads the requests' messages.
        limits: of one request.
        max_requests: most requests at a time, from their first byte to their last; the next is told to come later.
        api_key: None lets everybody in.
    """

    name: str
    scheduler: BatchScheduler
    prompts: PromptMaker
    limits: RequestLimits
    max_requests: int
    api_key: str | None = None

    def __post_init__(self) -> None:
        self._active = 0
        self._started = int(time.time())
        self._preparing = asyncio.Semaphore(_PREPARING)

    def build(self) -> Starlette:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{model:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._complete), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _answer_error, HTTPException: _answer_http, Exception: _answer_fault}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            self._check_key(request)
            return await handler(request)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        if not hmac.compare_digest(given, self.api_key.encode()):
            message = "Wrong API key." if given else "An API key is required: send 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key")

    async def _health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        state = {"status": "ok" if self.scheduler.is_open else "closing", "model": self.name}
        counts = {"running": self.scheduler.num_running, "waiting": self.scheduler.num_waiting}
        return JSONResponse({**state, **counts}, 200 if self.scheduler.is_open else 503)

    def _description(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._started, "owned_by": "symphony_vlm"}

    async def _models(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        self._check_model(request.path_params["model"])
        return JSONResponse(self._description())

    def _check_model(self, name: str) -> None:
        if name != self.name:
            message = f"There is no model {name[:100]!r} here; the model is {self.name!r}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def _complete(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        with contextlib.ExitStack() as place:
            place.enter_context(self._place())
            asked = await self._read(request)
            async with self._preparing:
                prompt = await asyncio.to_thread(self.prompts.read, asked)
            events = self._submit(asked, prompt, place)
            answer = Answer(self.name, len(prompt.input_ids))
            if asked.stream:
                # Before the first word an error still gets its own status.
                first = await _next_event(request, events)
                if isinstance(first, Failed):
                    raise failed_answer(first)
                return _event_stream(self._chunks(request, asked, answer, first, events), place.pop_all())
            text = ""
            while isinstance(event := await _next_event(request, events), Piece):
                text += event.text
            if isinstance(event, Failed):
                raise failed_answer(event)
            return JSONResponse(answer.whole(text, event))

    @contextlib.contextmanager
    def _place(self) -> Any:
        """A request's place among those that are allowed at a time."""
        if self._active >= self.max_requests:
            raise _busy()
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def _read(self, request: Request) -> ChatRequest:
        # A page of somebody else's that a browser shows can send forms and plain text here unasked, but not JSON.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The content type must be application/json.", code="unsupported_media_type")
        try:
            body = await asyncio.wait_for(_read_body(request, self.limits.max_body_bytes), self.limits.body_seconds)
        except asyncio.TimeoutError as error:
            message = f"The request did not arrive within {self.limits.body_seconds:g} seconds."
            raise ApiError(408, message, code="request_timeout") from error
        try:
            asked = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error) from None
        self._check_model(asked.model)
        return asked

    def _submit(self, asked: ChatRequest, prompt: Prompt, place: contextlib.ExitStack) -> asyncio.Queue[Event]:
        """Puts the question into the line; leaving `place` takes it out again."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            # The loop is closed if the server ended before its answers.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        settings = asked.settings(prompt.room)
        job = Job(input_ids=prompt.input_ids, pictures=prompt.pictures, settings=settings, emit=emit)
        place.callback(job.cancelled.set)
        try:
            self.scheduler.submit(job)
        except QueueFull as error:
            raise _busy() from error
        except Closed as error:
            message = "The server is shutting down."
            raise ApiError(503, message, code="shutting_down", retry_after=5) from error
        return events

    async def _chunks(
        self, request: Request, asked: ChatRequest, answer: Answer, event: Event, events: asyncio.Queue[Event]
    ) -> AsyncIterator[bytes]:
        usage = asked.wants_usage
        yield answer.chunk({"role": "assistant", "content": ""}, wants_usage=usage)
        while isinstance(event, Piece):
            yield answer.chunk({"content": event.text}, wants_usage=usage)
            event = await _next_event(request, events)
        if isinstance(event, Failed):
            yield sse(failed_answer(event).body())
            return
        yield answer.chunk({}, reason=event.reason, wants_usage=usage)
        if usage:
            yield answer.usage_chunk(event)
        yield END_OF_STREAM


def _busy() -> ApiError:
    return ApiError(429, "The server has no room for another request now.", code="queue_full", retry_after=1)


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, at most so many bytes.

    The rest of one that is too long is read and thrown away: to a client that is still sending, an answer with a
    closed connection would look like a network fault.
    """
    body = bytearray()
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
    if size > limit:
        message = f"The request is longer than {limit:,} bytes. Send smaller pictures, or fewer."
        raise ApiError(413, message, code="request_too_large")
    return bytes(body)


async def _next_event(request: Request, events: asyncio.Queue[Event]) -> Event:
    """The next event of an answer.

    Raises:
        ApiError: the client has gone; nobody will read it.
    """
    while True:
        try:
            return await asyncio.wait_for(events.get(), _LOOK_SECONDS)
        except asyncio.TimeoutError:
            if await request.is_disconnected():
                raise ApiError(499, "The client has closed the connection.", code="client_closed") from None


def _event_stream(chunks: AsyncIterator[bytes], place: contextlib.ExitStack) -> Response:
    """A stream of server-sent events that leaves `place` at its end, whoever ends it and however early."""
    from starlette.responses import StreamingResponse

    class EventStream(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            with place, contextlib.suppress(ApiError):
                await super().__call__(scope, receive, send)

    # Proxies that collect answers before they pass them on leave these alone.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventStream(chunks, media_type="text/event-stream", headers=headers)


async def _answer_error(request: Request, error: ApiError) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _answer_http(request: Request, error: Any) -> Response:
    """Starlette's own: no such route, no such method."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path[:100]}: {error.detail}."
    return await _answer_error(request, ApiError(error.status_code, message, code=code))


async def _answer_fault(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this, and uvicorn logs it.
    return await _answer_error(
        request, ApiError(500, "The server failed; its log has the error.", code="internal_error")
    )
