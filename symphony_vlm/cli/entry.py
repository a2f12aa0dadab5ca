"""The entry point: runs a command and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from symphony_vlm.cli.application import app
from symphony_vlm.cli.plugins import import_plugins
from symphony_vlm.errors import InputError, Stopped

__all__ = ["main"]


STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns bad input into one line and exit code 2.

    ``--debug`` anywhere on the line keeps the traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch's tensors on a CPU in pages of 2 MiB, where the system has them: it reads this before the first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _quiet_libraries()
    try:
        import_plugins()
        code = app(arguments, standalone_mode=False, prog_name="symphony-vlm")
        if code == STOPPED:  # newer typer returns the code, older ones raise
            raise KeyboardInterrupt
    except InputError as error:
        if debug:
            raise
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    except Stopped as stopped:
        typer.secho(str(stopped), err=True, fg="yellow")
        sys.exit(stopped.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.secho("stopped; run the same command again to continue", err=True, fg="yellow")
        sys.exit(STOPPED)
    except Exception as error:  # our fault, or the machine's: one line unless somebody wants to debug it
        if debug or not _is_usage(error):
            if debug:
                raise
            typer.secho(f"failed: {type(error).__name__}: {error}", err=True, fg="red")
            typer.secho("add --debug for the traceback", err=True)
            sys.exit(1)
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _is_usage(error: Exception) -> bool:
    """Whether typer's parser refused the command line."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _quiet_libraries() -> None:
    """Libraries' own bars and notices would bury ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
