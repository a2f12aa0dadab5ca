"""Opens whatever shall be evaluated: a model of ours, or any image-text model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.stock_predictor import StockPredictor, load_stock_model
from symphony_vlm.evaluation.task import EvaluationItem
from symphony_vlm.model.loading import load, model_type_of, resolve_model_folder

__all__ = ["AnswersQuestions", "OpenedModel", "open_model"]


class AnswersQuestions(Protocol):
    """What the runner needs of a model."""

    def encode_images(self, images: Sequence[np.ndarray]) -> Sequence[Any]:
        """Something per uint8 ``[H, W, 3]`` image, that `answer` takes for it."""

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Any]) -> list[str]:
        """One answer per item; `features` has for each item what its images became, or None."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model in memory."""

    model: Any
    processor: Any
    router: str
    """As results name it: the preset, ``dense``, or for a model of transformers its ``model_type``."""
    is_stock: bool

    def predictor(self, *, batch_size: int, max_new_tokens: int) -> AnswersQuestions:
        """A predictor of this model; arguments as in `Predictor`."""
        if self.is_stock:
            return StockPredictor(self.model, self.processor, batch_size=batch_size, max_new_tokens=max_new_tokens)
        return Predictor(self.model, batch_size=batch_size, max_new_tokens=max_new_tokens)


def open_model(name: str, *, device: str | None = None, dtype: str = "auto") -> OpenedModel:
    """Opens a model for evaluation, by the ``model_type`` of its config.json.

    Args:
        name: folder of a model or of a finished run, or a hub name.
        device: e.g. ``cuda``; default: the accelerator if there is one, else the CPU.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``.

    Raises:
        InputError: no model there, or none that can be asked about images.
    """
    found = _model_type(name)
    if found in ("symphony_vlm", "symphony_lm"):
        ours = load(name, device=device, dtype=dtype)
        router = ours.config.moe["router"] if ours.config.moe else "dense"
        return OpenedModel(model=ours, processor=ours.processor, router=router, is_stock=False)
    stock, processor = load_stock_model(name, device=device, dtype=dtype)
    return OpenedModel(model=stock, processor=processor, router=str(stock.config.model_type), is_stock=True)


def _model_type(name: str) -> str | None:
    folder = resolve_model_folder(name)
    found = model_type_of(folder)
    if found is not None:
        return found
    from transformers.configuration_utils import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(folder)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(first, where=name, remedy="Give a local folder, or a hub id while online.") from error
    return values.get("model_type")
