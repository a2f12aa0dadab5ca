"""Starts the OpenAI-compatible server, and ends it without losing an answer."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from symphony_vlm.errors import InputError
from symphony_vlm.serving.listening import listen

if TYPE_CHECKING:
    import uvicorn

    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
    from symphony_vlm.serving.batching import BatchScheduler
    from symphony_vlm.serving.request_limits import RequestLimits

__all__ = ["running_server", "serve"]


def serve(
    model_name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    limits: RequestLimits,
    max_batch: int = 16,
    max_waiting: int = 128,
    shutdown_seconds: int = 60,
    **loading: Any,
) -> None:
    """Answers requests until SIGTERM or Ctrl-C; then those that have begun are finished and no others taken.

    Args:
        model_name: folder of a model or of a finished run, or a hub name.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_key: what clients must send; None lets everybody in.
        name: what clients call the model; default: the name of its folder.
        limits: of one request.
        max_batch: most questions answered together.
        max_waiting: most questions that wait for their turn.
        shutdown_seconds: how long requests that have begun may take to end.
        loading: for `symphony_vlm.load`.

    Raises:
        InputError: the model cannot be opened, or the port is taken.
    """
    from symphony_vlm.model.loading import load
    from symphony_vlm.serving.page_style import page_title

    api_key = None if api_key is None else api_key.strip()
    if api_key == "":
        raise InputError("the key is empty", where="--api-key", remedy="Leave it out, or give one.")
    if api_key is not None and not api_key.isascii():
        raise InputError("the key has letters that no HTTP header can hold", where="--api-key")
    with listen(host, port) as listener:
        typer.secho(f"loading {model_name}", err=True, dim=True)
        model = load(model_name, **loading)
        settings: dict[str, Any] = {"max_batch": max_batch, "max_waiting": max_waiting, "limits": limits}
        name = name or page_title(model_name)
        with running_server(model, name, api_key=api_key, shutdown_seconds=shutdown_seconds, **settings) as server:
            address, bound = listener.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            typer.echo(f"Model {name!r} at http://{shown}:{bound}/v1; Ctrl-C stops.", err=True)
            if api_key is None and not ipaddress.ip_address(address).is_loopback:
                typer.secho("Everybody who reaches this address may ask: there is no --api-key.", err=True, fg="yellow")
            with _ends_quietly():
                server.run(sockets=[listener])


@contextlib.contextmanager
def running_server(
    model: SymphonyVLMForConditionalGeneration,
    name: str,
    *,
    limits: RequestLimits,
    api_key: str | None = None,
    max_batch: int = 16,
    max_waiting: int = 128,
    shutdown_seconds: int = 60,
) -> Iterator[uvicorn.Server]:
    """A server with its scheduler, not yet listening; arguments as in `serve`."""
    import uvicorn

    from symphony_vlm.serving.batching import BatchScheduler
    from symphony_vlm.serving.openai_api import Api
    from symphony_vlm.serving.openai_prompt import PromptMaker

    scheduler = BatchScheduler(model, max_batch=max_batch, max_waiting=max_waiting)
    try:
        api = Api(
            name=name,
            scheduler=scheduler,
            prompts=PromptMaker(model, limits),
            limits=limits,
            # Those that run, those that wait, and as many again on their way in and out.
            max_requests=2 * (max_batch + max_waiting),
            api_key=api_key,
        )
        yield uvicorn.Server(
            uvicorn.Config(
                api.build(),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                # Behind a proxy nothing here depends on who asks.
                proxy_headers=False,
                timeout_graceful_shutdown=shutdown_seconds,
            )
        )
    finally:
        _close(scheduler)


def _close(scheduler: BatchScheduler) -> None:
    # The server has waited for its answers already; what is left now has lost its client.
    scheduler.close(timeout=0)
    scheduler.close(timeout=10)


@contextlib.contextmanager
def _ends_quietly() -> Iterator[None]:
    """Being asked to stop is no error: uvicorn raises the signals it was sent again when it has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
