"""Chat in the terminal: one question with its answer on standard output, or a loop.

Standard output carries answers and nothing else, so that it can be piped; notes and errors go to standard error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import unicodedata
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from symphony_vlm.errors import InputError
from symphony_vlm.serving.terminal_commands import Commands, note
from symphony_vlm.serving.terminal_history import line_editing

if TYPE_CHECKING:
    from symphony_vlm.serving.chat import ChatSession

__all__ = ["run_terminal_chat"]

_log = logging.getLogger(__name__)


def run_terminal_chat(
    model: str,
    images: list[Path],
    prompt: str | None,
    *,
    settings: Mapping[str, Any],
    history: bool = True,
    **loading: Any,
) -> None:
    """Answers one question, or talks until the user leaves.

    Args:
        model: folder of a model or of a finished run, or a hub name.
        images: pictures for the first question.
        prompt: the only question; None: an interactive chat.
        settings: for `ChatSession.stream`: longest answer, temperature.
        history: keeps what was typed for the next chat (`terminal_history`).
        loading: for `symphony_vlm.load`.

    Raises:
        InputError: the model or a picture cannot be opened, or (with a prompt) the question cannot be asked.
    """
    from symphony_vlm.model.loading import load
    from symphony_vlm.serving.chat import ChatSession, read_picture

    # Before the model, which may take a minute to load.
    pictures = [read_picture(path) for path in images]
    note(f"loading {model}")
    session = ChatSession(load(model, **loading))
    for picture in pictures:
        session.add_image(picture)
    if prompt is not None:
        typer.echo(_printable(session.ask(prompt, **settings)))
        return
    commands = Commands(session, Console(stderr=True, highlight=False), pictures)
    with line_editing(keep=history) as problem:
        if problem:
            note(problem)
        _talk(session, commands, settings)


def _talk(session: ChatSession, commands: Commands, settings: Mapping[str, Any]) -> None:
    waiting = f"; {commands.waiting()} attached to your first question" if session.num_pending_images else ""
    note(f"Ask a question; /help lists the commands{waiting}.")
    while True:
        try:
            line = _read_line()
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            break
        if line.strip() == "/quit":
            break
        with _reported():
            if line.startswith("/"):
                commands.run(line.strip())
            elif line.strip():
                _answer(session, line.strip(), settings)
    note("Goodbye.")


def _answer(session: ChatSession, question: str, settings: Mapping[str, Any]) -> None:
    pieces = session.stream(question, **settings)
    try:
        _show(pieces)
    except KeyboardInterrupt:
        typer.echo()
        note("Stopped; this question and its answer are left out of the conversation.")
    finally:
        pieces.close()


def _show(pieces: Iterable[str]) -> None:
    shown = False
    try:
        for piece in pieces:
            typer.echo(_printable(piece), nl=False)
            shown = True
    except Exception:
        if shown:
            typer.echo()
        raise
    typer.echo()
    if not shown:
        note("(an empty answer)")


@contextlib.contextmanager
def _reported() -> Generator[None, None, None]:
    """Turns an error into one line; the chat goes on."""
    try:
        yield
    except InputError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
    except Exception as error:
        _log.debug("a question failed", exc_info=True)
        typer.secho(f"failed: {type(error).__name__}: {error}", err=True, fg="red")


def _read_line() -> str:
    both = sys.stdin.isatty() and sys.stdout.isatty()
    return input("> " if both else "")


def _printable(text: str) -> str:
    """Without control characters, with which a model could steer the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
