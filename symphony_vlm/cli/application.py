"""What every command shares: the application, common options, where messages and summaries go."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["Json", "Overrides", "app", "config_app", "console", "data_app", "finish", "names"]

app = typer.Typer(
    name="symphony-vlm",
    help="Train, evaluate and talk to vision-language models with mixture-of-experts and Symphony routers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make and inspect data.", no_args_is_help=True)
config_app = typer.Typer(help="Show recipes.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable summary as the last line.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings, e.g. stages.instruct.epochs=2", metavar="A.B=C")]


def console() -> Console:
    """Where messages and progress go: standard error."""
    # Log lines stay whole where there is no terminal to wrap them for.
    return Console(stderr=True, highlight=False, soft_wrap=True)


def finish(summary: dict[str, Any], as_json: bool, text: str) -> None:
    """The last thing a command prints: its summary for programs, or a text for people."""
    typer.echo(json.dumps(summary) if as_json else text)


def names(text: str) -> list[str]:
    """The names in a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
