"""What a visitor is told when something of ours goes wrong; the log has all of it, under a short reference."""

from __future__ import annotations

import logging
import re
import secrets

from symphony_vlm.errors import InputError
from symphony_vlm.serving.uploads import for_visitors

__all__ = ["fault_text"]

_log = logging.getLogger(__name__)

_PATH = re.compile(r"(?<![\w/])(?:/[\w.+@~-]+){2,}/?")
_MAX_LETTERS = 200


def fault_text(error: BaseException) -> str:
    """One or two sentences: the visitor's own mistake, or ours with a reference under which the log has the traceback.

    Call it inside the ``except`` block. After a lack of memory the accelerator's cache is given back.
    """
    if isinstance(error, InputError):
        return for_visitors(error)
    reference = secrets.token_hex(3)
    _log.exception("reference %s: a visitor's request failed", reference)
    if _is_lack_of_memory(error):
        _release_memory()
        return f"The model ran out of memory. Ask with fewer words or smaller pictures. (Reference {reference})"
    return f"{type(error).__name__}: {_first_line(str(error))} (Reference {reference})"


def _is_lack_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError of accelerators is a RuntimeError by another name; that of the CPU is a plain one.
    words = ("out of memory", "can't allocate memory", "not enough memory")
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def _release_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(text: str) -> str:
    line = _PATH.sub("…", text.strip().split("\n")[0])
    return line if len(line) <= _MAX_LETTERS else f"{line[: _MAX_LETTERS - 1]}…"
