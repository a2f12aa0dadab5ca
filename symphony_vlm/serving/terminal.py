"""Chat in the terminal: one question with its answer on standard output, or a loop.

Standard output carries answers and nothing else, so that it can be piped; notes and errors go to standard error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import unicodedata
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from symphony_vlm.serving.chat import ChatSession

__all__ = ["run_terminal_chat"]

_log = logging.getLogger(__name__)

_HELP = """\
/image PATH   attach a picture to the next question; may be repeated
/reset        start a new conversation
/help         show this
/quit         leave (so does Ctrl-D)
Everything else is a question. Ctrl-C stops an answer. A question that begins with "/" needs a blank before it."""


def run_terminal_chat(model: str, images: list[Path], prompt: str | None, *, max_new_tokens: int) -> None:
    """Answers one question, or talks until the user leaves.

    Args:
        model: folder of a model or of a finished run, or a hub name.
        images: pictures for the first question.
        prompt: the only question; None: an interactive chat.
        max_new_tokens: longest answer.

    Raises:
        InputError: the model or a picture cannot be opened, or (with a prompt) the question cannot be asked.
    """
    from symphony_vlm.model.loading import load
    from symphony_vlm.serving.chat import ChatSession, read_picture

    # Before the model, which may take a minute to load.
    pictures = [read_picture(path) for path in images]
    _note(f"loading {model}")
    session = ChatSession(load(model))
    for picture in pictures:
        session.add_image(picture)
    if prompt is not None:
        typer.echo(_printable(session.ask(prompt, max_new_tokens=max_new_tokens)))
        return
    _enable_line_editing()
    _talk(session, max_new_tokens)


def _talk(session: ChatSession, max_new_tokens: int) -> None:
    waiting = f"; {_count_pictures(session)} attached to your first question" if session.num_pending_images else ""
    _note(f"Ask a question; /help lists the commands{waiting}.")
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
                _command(session, line.strip())
            elif line.strip():
                _answer(session, line.strip(), max_new_tokens)
    _note("Goodbye.")


def _command(session: ChatSession, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/image":
        _attach(session, argument)
    elif name == "/reset":
        session.reset()
        _note("A new conversation.")
    elif name == "/help":
        _note(_HELP)
    else:
        raise InputError(f"unknown command {name!r}", remedy="/help lists the commands.")


def _attach(session: ChatSession, argument: str) -> None:
    # People drag files into the terminal, which quotes them.
    path = argument.strip().strip("'\"")
    if not path:
        raise InputError("no path given", where="/image", remedy="Write /image PATH.")
    session.add_image(Path(path).expanduser())
    _note(f"{_count_pictures(session)} attached to your next question.")


def _answer(session: ChatSession, question: str, max_new_tokens: int) -> None:
    pieces = session.stream(question, max_new_tokens=max_new_tokens)
    try:
        _show(pieces)
    except KeyboardInterrupt:
        typer.echo()
        _note("Stopped; this question and its answer are left out of the conversation.")
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
        _note("(an empty answer)")


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


def _enable_line_editing() -> None:
    """Arrow keys and history; the import is the whole effect. Absent on Windows."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401


def _note(text: str) -> None:
    typer.secho(text, err=True, dim=True)


def _count_pictures(session: ChatSession) -> str:
    count = session.num_pending_images
    return "1 picture is" if count == 1 else f"{count} pictures are"


def _printable(text: str) -> str:
    """Without control characters, with which a model could steer the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
