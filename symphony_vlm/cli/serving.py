"""Commands that let people and programs talk to a model: the terminal chat, the page, the server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from symphony_vlm.cli.application import app

__all__: list[str] = []

Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1 or mps; default: cuda if there is one.")]  # noqa: UP045
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Quantize = Annotated[str, typer.Option(help="none, 8bit or 4bit; with the extra qlora.")]


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    image: Annotated[Optional[list[Path]], typer.Option(help="Picture; may be given several times.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="One question; without it, an interactive chat.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest answer; above: drawn.", min=0)] = 0.0,
    history: Annotated[bool, typer.Option(help="Keep what was typed for the next chat (arrow keys).")] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
) -> None:
    """Ask a model about a picture, in the terminal.

    Example: symphony-vlm chat --model runs/quickstart/symphony_smoe/model --image a.png --prompt "What shape is it?"
    """
    from symphony_vlm.serving.terminal import run_terminal_chat

    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    loading = {"device": device, "dtype": dtype, "quantization": quantize}
    run_terminal_chat(model, [*(image or [])], prompt, settings=settings, history=history, **loading)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    compare: Annotated[Optional[str], typer.Option(help="A second model, which answers beside the first.")] = None,  # noqa: UP045
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 7860,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
) -> None:
    """Open a chat page in the browser.

    Example: symphony-vlm demo --model runs/quickstart/symphony_smoe/model
    """
    from symphony_vlm.serving.gradio_app import launch

    launch(model, compare, host=host, port=port, device=device, dtype=dtype, quantization=quantize)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What clients must send. In the variable it is not seen by ps.", envvar="SYMPHONY_VLM_API_KEY"
        ),
    ] = None,
    model_name: Annotated[Optional[str], typer.Option(help="What clients call the model; default: its folder.")] = None,  # noqa: UP045
    max_batch: Annotated[int, typer.Option(help="Most questions answered together.", min=1)] = 16,
    max_waiting: Annotated[int, typer.Option(help="Most questions that wait for their turn.", min=1)] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer that a request may ask for.", min=1)] = 1024,
    max_images: Annotated[int, typer.Option(help="Most pictures in one request.", min=0)] = 16,
    max_request_mb: Annotated[int, typer.Option(help="Largest request in MiB.", min=1)] = 32,
    shutdown_seconds: Annotated[int, typer.Option(help="Time that running answers have after SIGTERM.", min=1)] = 60,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
) -> None:
    """Serve a model to programs, as OpenAI's chat completions.

    Example: symphony-vlm serve --model runs/quickstart/symphony_smoe/model --port 8000
    """
    from symphony_vlm.serving.request_limits import RequestLimits
    from symphony_vlm.serving.server import serve as run

    limits = RequestLimits(max_body_bytes=max_request_mb * 2**20, max_images=max_images, max_tokens=max_new_tokens)
    run(
        model,
        host=host,
        port=port,
        api_key=api_key,
        name=model_name,
        limits=limits,
        max_batch=max_batch,
        max_waiting=max_waiting,
        shutdown_seconds=shutdown_seconds,
        device=device,
        dtype=dtype,
        quantization=quantize,
    )
