"""Commands that talk to a model: the terminal chat and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from symphony_vlm.cli.application import app

__all__: list[str] = []


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    image: Annotated[Optional[list[Path]], typer.Option(help="Picture; may be given several times.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="One question; without it, an interactive chat.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
) -> None:
    """Ask a model about a picture, in the terminal.

    Example: symphony-vlm chat --model runs/quickstart/symphony_smoe/model --image a.png --prompt "What shape is it?"
    """
    from symphony_vlm.serving.terminal import run_terminal_chat

    run_terminal_chat(model, [*(image or [])], prompt, max_new_tokens=max_new_tokens)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    compare: Annotated[Optional[str], typer.Option(help="A second model, which answers beside the first.")] = None,  # noqa: UP045
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 7860,
) -> None:
    """Open a chat page in the browser.

    Example: symphony-vlm demo --model runs/quickstart/symphony_smoe/model
    """
    from symphony_vlm.serving.gradio_app import launch

    launch(model, compare, host=host, port=port)
