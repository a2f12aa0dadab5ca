"""The chat page: upload a picture, ask, read the answer as it is written, and see how the model came to it.

This file opens models and serves the page; `page` lays it out, `events` answers clicks, `turns` asks the models.
gradio is imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import typer

from symphony_vlm.serving.body_limit import BodyLimit
from symphony_vlm.serving.examples import draw_examples
from symphony_vlm.serving.listening import listen
from symphony_vlm.serving.page_style import page_title, stylesheet, theme
from symphony_vlm.serving.uploads import MAX_UPLOAD_BYTES, private_upload_folder

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["build_app", "launch"]

MAX_WAITING = 32
"""Questions in the queue, over all visitors; the next one is told to come back later."""

_FORGET_SECONDS = 24 * 3600


def launch(
    model_name: str,
    compare: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    block: bool = True,
    **loading: Any,
) -> gr.Blocks:
    """Opens the chat page and serves it until it is interrupted.

    Args:
        model_name: folder of a model or of a finished run, or a hub name.
        compare: a second model, which answers every question too.
        host: address to listen on; ``0.0.0.0`` for every address of the machine.
        port: port to listen on; 0 takes a free one.
        block: False returns at once; close the app with its ``close()``.
        loading: for `symphony_vlm.load`.

    Raises:
        InputError: a model cannot be opened, or the port is taken.
    """
    from starlette.middleware import Middleware

    port = _usable_port(host, port)
    typer.secho(f"loading {model_name}{f' and {compare}' if compare else ''}", err=True, dim=True)
    app = build_app(model_name, compare, **loading)
    app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    app.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_UPLOAD_BYTES,
        app_kwargs={"middleware": [Middleware(BodyLimit)]},
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme(_import_gradio()),
        css=stylesheet(),
    )
    if block:
        _wait(app)
    return app


def build_app(model_name: str, compare: str | None = None, **loading: Any) -> gr.Blocks:
    """The page, not yet served.

    Args:
        model_name: folder of a model or of a finished run, or a hub name.
        compare: a second model.
        loading: for `symphony_vlm.load`.

    Raises:
        InputError: a model cannot be opened.
    """
    from symphony_vlm.model.loading import load
    from symphony_vlm.serving.page import Page

    names = [model_name] if compare is None else [model_name, compare]
    models = [load(name, **loading) for name in names]
    titles = _distinct([page_title(name) for name in names])
    uploads = private_upload_folder()
    gr = _import_gradio()
    title = " and ".join(titles)
    with gr.Blocks(
        title=f"{title} · symphony_vlm", analytics_enabled=False, fill_height=True, delete_cache=(3600, _FORGET_SECONDS)
    ) as app:
        Page(gr, models, titles, draw_examples(uploads / "examples"), uploads).build(app, title)
    return app


def _distinct(titles: list[str]) -> list[str]:
    if len(set(titles)) == len(titles):
        return titles
    return [f"{title} ({letter})" for title, letter in zip(titles, "AB", strict=True)]


def _import_gradio() -> Any:
    """gradio, asked beforehand not to report its use."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def _usable_port(host: str, port: int) -> int:
    """Tries the address, before the model takes its time to load."""
    with listen(host, port) as probe:
        free: int = probe.getsockname()[1]
        return free


def _wait(app: gr.Blocks) -> None:
    stopped = threading.Event()
    if threading.current_thread() is threading.main_thread():
        # How containers stop a program; without this the uploads would stay behind.
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        typer.echo(f"Open {app.local_url} in a browser; Ctrl-C stops.", err=True)
        stopped.wait()
    except KeyboardInterrupt:
        typer.echo(err=True)
    finally:
        app.close(verbose=False)
