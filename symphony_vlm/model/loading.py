"""Opens a saved model with its processor, from a folder (a model's or a whole run's) or a hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["adapter_record", "load", "load_language_model", "local_folder", "resolve_model_folder"]


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


def local_folder(name: str | Path) -> Path:
    """`resolve_model_folder`, and for a hub name the folder of its files on this machine, fetched if need be.

    Raises:
        InputError: no such model, here or on the hub.
    """
    folder = resolve_model_folder(name)
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(folder, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx", "*.h5", "*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"cannot be fetched from the hub: {str(error).splitlines()[0][:200]}",
            where=str(name),
            remedy="Give a local folder, or a hub id while online.",
        ) from error


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    quantization: str = "none",
    **kwargs: Any,
) -> SymphonyVLMForConditionalGeneration:
    """A model in evaluation mode with its processor at ``model.processor``, ready for ``model.chat(...)``.

    Args:
        name: folder of a saved model or of a finished run, or a hub name.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; default: a CUDA device if there is one, else the CPU.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``, ``float16``.
        quantization: ``none``, or the language model's linear layers in ``8bit``, or these and its experts in ``4bit``
            (`quantization`); on a CUDA device or the CPU, with the extra ``symphony-vlm[qlora]``.
        kwargs: for ``from_pretrained``.

    Raises:
        InputError: no model there, the weights do not fit the configuration, or the device, the precision or the
            quantisation is not to be had here.
    """
    folder = resolve_model_folder(name)
    found = model_type_of(folder)
    if found is not None and found != "symphony_vlm":
        remedy = "Give a model trained here."
        if found == "symphony_lm":
            remedy = "This is a language model: use symphony_vlm.load_language_model."
        where = str(Path(folder) / "config.json")
        raise InputError(f"model_type is {found!r}, expected 'symphony_vlm'", where=where, remedy=remedy)
    from symphony_vlm.model.devices import check_dtype, choose_device
    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.quantization import check_quantization, quantize_, quantize_experts_
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

    chosen = choose_device(device)
    check_dtype(dtype)
    check_quantization(quantization, chosen)
    try:
        model = SymphonyVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, **kwargs)
        model.processor = SymphonyVLMProcessor.from_pretrained(folder)
    except OSError as error:
        first = str(error).splitlines()[0]
        raise InputError(first, where=folder, remedy="Give the folder of a saved model or run.") from error
    if quantization != "none":
        quantize_(model, quantization, model.dtype)
    if quantization == "4bit":
        quantize_experts_(model, chosen)
    opened: SymphonyVLMForConditionalGeneration = model.to(chosen).eval()
    return opened


def load_language_model(
    name: str | Path, *, device: str | None = None, dtype: str = "auto", **kwargs: Any
) -> PreTrainedModel:
    """A causal LM in evaluation mode: one with sparse layers saved here (``symphony_lm``), or any of Hugging Face.

    Its tokenizer, where one was saved beside it, is opened by transformers' ``AutoTokenizer``.

    Args:
        name: folder of a saved model, or a hub name.
        device: e.g. ``cuda``; default: the accelerator if there is one, else the CPU.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``.
        kwargs: for ``from_pretrained``.

    Raises:
        InputError: no causal LM there, or the weights do not fit the configuration.
    """
    folder = resolve_model_folder(name)
    if model_type_of(folder) == "symphony_vlm":
        raise InputError("this is a vision-language model", where=folder, remedy="Use symphony_vlm.load.")
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(first, where=folder, remedy="Give the folder of a saved causal language model.") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def model_type_of(folder: str) -> str | None:
    """``model_type`` of a local folder's config.json, or None for a hub name.

    Raises:
        InputError: the file is no JSON object.
    """
    values = _configuration(folder)
    return None if values is None else str(values.get("model_type"))


def adapter_record(name: str | Path) -> dict[str, Any] | None:
    """``adapter`` in the config.json of a folder that holds adapters and not a whole model (`model.adapters`)."""
    values = _configuration(name)
    if values is None and not Path(name).exists():
        from transformers.configuration_utils import PreTrainedConfig

        try:
            values = PreTrainedConfig.get_config_dict(str(name))[0]
        except OSError:
            return None  # whoever opens the model says what is wrong with the name
    record: dict[str, Any] | None = (values or {}).get("adapter")
    return record


def _configuration(folder: str | Path) -> dict[str, Any] | None:
    file = Path(folder) / "config.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=str(file)) from error
    if not isinstance(values, dict):
        raise InputError("a configuration is a JSON object", where=str(file))
    return values
