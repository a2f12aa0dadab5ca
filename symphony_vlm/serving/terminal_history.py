"""What was typed in earlier chats, for the arrow keys."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

__all__ = ["history_file", "line_editing"]

_LINES = 1000


def history_file() -> Path:
    """Where lines are kept: in the user's state folder, as the XDG Base Directory Specification has it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "symphony_vlm" / "chat_history"


@contextlib.contextmanager
def line_editing(*, keep: bool) -> Generator[str | None, None, None]:
    """Arrow keys while the chat runs, on a terminal; gives what went wrong with the file, if anything.

    Args:
        keep: reads the lines of earlier chats, and adds those of this one at its end.
    """
    readline = _readline()
    if readline is None or not keep:
        yield None
        return
    file = history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Nobody else's to read: questions are private.
        file.touch(mode=0o600)
        readline.read_history_file(file)
    except OSError as error:
        yield f"what you type is not kept: {error}"
        return
    readline.set_history_length(_LINES)
    before = readline.get_current_history_length()
    try:
        yield None
    finally:
        new = readline.get_current_history_length() - before
        with contextlib.suppress(OSError):
            # Another chat may have added lines meanwhile; libedit on a Mac cannot append.
            if hasattr(readline, "append_history_file"):
                readline.append_history_file(new, file)
            else:
                readline.write_history_file(file)


def _readline() -> Any:
    """The library, whose import alone gives `input` its arrow keys; None on Windows and without a terminal."""
    if not sys.stdin.isatty():
        return None
    try:
        import readline
    except ImportError:
        return None
    return readline
