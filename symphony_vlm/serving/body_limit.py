"""A limit on the size of requests, for servers that would read any body into memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from symphony_vlm.serving.uploads import MAX_PICTURES, MAX_UPLOAD_BYTES

__all__ = ["MAX_BODY_BYTES", "BodyLimit"]

MAX_BODY_BYTES = 2**20
"""Of everything but an upload: some fifty times the longest question."""
_MAX_UPLOAD_BODY = (MAX_PICTURES + 1) * MAX_UPLOAD_BYTES
"""A browser may send all pictures of a question in one request; each file has its own limit too."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class BodyLimit:
    """ASGI middleware: answers 413 to a larger request, whether or not it announces its length.

    Args:
        app: what it stands in front of.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = _MAX_UPLOAD_BODY if scope["path"].rstrip("/").endswith("/upload") else MAX_BODY_BYTES
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > limit:
            await _refuse(send)
            return
        received = 0
        begun = refused = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _TooLargeError
            return message

        async def replaced(message: Message) -> None:
            # The application may catch the exception, and answers something else then.
            nonlocal begun, refused
            if received > limit and not begun:
                if not refused:
                    refused = True
                    await _refuse(send)
                return
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, replaced)
        except _TooLargeError:
            await replaced({"type": "http.response.start"})


class _TooLargeError(Exception):
    pass


async def _refuse(send: Send) -> None:
    text = b'{"error": "the request is too large"}'
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": text})
