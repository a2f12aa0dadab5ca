"""Opens the language model that shall be evaluated: a causal LM of ours, of Hugging Face, or the one inside a VLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from symphony_vlm.errors import InputError
from symphony_vlm.model.loading import load, load_language_model, model_type_of, resolve_model_folder

__all__ = ["OpenedLanguageModel", "open_language_model"]


@dataclass(frozen=True, kw_only=True)
class OpenedLanguageModel:
    """A causal LM in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    router: str
    """The preset, or ``dense``."""

    @property
    def max_positions(self) -> int | None:
        """Longest input, None if its configuration names none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def open_language_model(name: str, *, device: str | None = None, dtype: str = "auto") -> OpenedLanguageModel:
    """Opens a causal LM by the ``model_type`` of its config.json.

    Args:
        name: folder of a causal LM, of a vision-language model or of a finished run, or a hub name.
        device: e.g. ``cuda``; default: the accelerator if there is one, else the CPU.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``.

    Raises:
        InputError: no causal LM there, or none with a tokenizer.
    """
    folder = resolve_model_folder(name)
    if model_type_of(folder) == "symphony_vlm":
        vlm = load(folder, device=device, dtype=dtype)
        assert vlm.processor is not None
        router = vlm.config.moe["router"] if vlm.config.moe else "dense"
        return OpenedLanguageModel(model=vlm.language_model, tokenizer=vlm.processor.tokenizer, router=router)
    model = load_language_model(folder, device=device, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"has no tokenizer that can be opened: {str(error).splitlines()[0][:200]}",
            where=name,
            remedy="Save the tokenizer beside the model (tokenizer.save_pretrained).",
        ) from error
    moe = getattr(model.config, "moe", None)
    return OpenedLanguageModel(model=model, tokenizer=tokenizer, router=moe["router"] if moe else "dense")
