"""Opens a saved model with its processor, from a folder (a model's or a whole run's) or a hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["load", "resolve_model_folder"]


def resolve_model_folder(name: str | Path) -> str:
    """The folder to load: ``name`` itself if it holds a model, the finished model of a run's folder, or a hub name.

    Raises:
        InputError: a local path without a model; the message says what was found there.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return str(path)
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    if path.is_dir():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise InputError(
            f"the folder has no config.json and no finished run's model/ (found: {found})",
            where=str(path),
            remedy="Give the folder that save_pretrained wrote, or finish the training run first.",
        )
    looks_local = str(name).startswith((".", "/", "~")) or str(name).count("/") != 1 or path.parent.is_dir()
    if looks_local:
        raise InputError("no such model folder", where=str(name), remedy="Give the folder of a saved model or run.")
    return str(name)


def load(
    name: str | Path, *, device: str | None = None, dtype: str = "auto", **kwargs: Any
) -> SymphonyVLMForConditionalGeneration:
    """A model in evaluation mode with its processor at ``model.processor``, ready for ``model.chat(...)``.

    Args:
        name: folder of a saved model or of a finished run, or a hub name.
        device: e.g. ``cuda``; default: the accelerator if there is one, else the CPU.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``.
        kwargs: for ``from_pretrained``.

    Raises:
        InputError: no model there, or the weights do not fit the configuration.
    """
    folder = resolve_model_folder(name)
    _check_model_type(folder)
    import torch

    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

    try:
        model = SymphonyVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, **kwargs)
        model.processor = SymphonyVLMProcessor.from_pretrained(folder)
    except OSError as error:
        first = str(error).splitlines()[0]
        raise InputError(first, where=folder, remedy="Give the folder of a saved model or run.") from error
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(chosen).eval()


def _check_model_type(folder: str) -> None:
    file = Path(folder) / "config.json"
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text()).get("model_type")
    except ValueError as error:
        raise InputError(f"not valid JSON ({error})", where=str(file)) from error
    if found != "symphony_vlm":
        raise InputError(
            f"model_type is {found!r}, expected 'symphony_vlm'", where=str(file), remedy="Give a model trained here."
        )
