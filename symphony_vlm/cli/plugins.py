"""Code of one's own that every command imports first: routers and tasks that it registers are then known by name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

from symphony_vlm.errors import InputError

__all__ = ["PLUGINS_VARIABLE", "import_plugins"]

PLUGINS_VARIABLE = "SYMPHONY_VLM_PLUGINS"
"""An environment variable, so that processes which a command starts (a study's, a launcher's) have it too, and no
recipe or model that somebody else wrote can name code to be run."""


def import_plugins() -> None:
    """Imports the modules and files that `PLUGINS_VARIABLE` lists, separated by commas.

    Raises:
        InputError: one is not found, or raises an error while it is imported.
    """
    for name in filter(None, map(str.strip, os.environ.get(PLUGINS_VARIABLE, "").split(","))):
        try:
            _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except InputError as error:
            raise InputError(f"{name!r}: {error}", where=PLUGINS_VARIABLE) from error
        except Exception as error:
            raise InputError(
                f"{name!r} could not be imported: {type(error).__name__}: {error}",
                where=PLUGINS_VARIABLE,
                remedy="Name a file that ends in .py, or a module that Python finds; --debug shows where it failed.",
            ) from error


def _import_file(path: Path) -> None:
    """A file as a module of its name, unless it is already running as the program or has been imported."""
    path = path.expanduser().resolve()
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    if any(file is not None and Path(file).name == path.name and Path(file).resolve() == path for file in files):
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
