"""Opens whatever shall be evaluated: a model of ours, or any image-text model of transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from symphony_vlm.corruptions.placement import MODEL_INPUT
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.options import Options
from symphony_vlm.evaluation.predictor import AnswersItems, EncodesPictures, Predictor
from symphony_vlm.evaluation.stock_predictor import StockPredictor, load_stock_model
from symphony_vlm.model.loading import load, model_type_of, resolve_model_folder
from symphony_vlm.model.model_input import check_model_input

__all__ = ["OpenedModel", "check_corrupt_at", "open_model"]


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model in memory."""

    model: Any
    processor: Any
    router: str
    """As results name it: the preset, ``dense``, or for a model of transformers its ``model_type``."""
    is_stock: bool

    @property
    def template(self) -> str:
        """How conversations are written: the template's name, or of a model of transformers the sha256 of its text."""
        if not self.is_stock:
            return str(self.processor.template)
        return f"sha256:{hashlib.sha256(str(self.processor.chat_template).encode()).hexdigest()}"

    def predictor(
        self,
        *,
        batch_size: int,
        max_new_tokens: int,
        options: Callable[[EvaluationItem], Options | None] | None = None,
        encoder: EncodesPictures | None = None,
    ) -> AnswersItems:
        """A predictor of this model; arguments as in `Predictor`. A model of transformers encodes by itself.

        Raises:
            InputError: a model of transformers shall score options, which it does not do here.
        """
        if self.is_stock:
            if options is not None:
                raise InputError(
                    "a model of transformers writes its answers; options are scored for models trained here alone",
                    where="--scoring likelihood",
                    remedy="Leave --scoring out.",
                )
            return StockPredictor(self.model, self.processor, batch_size=batch_size, max_new_tokens=max_new_tokens)
        return Predictor(
            self.model, batch_size=batch_size, max_new_tokens=max_new_tokens, options=options, encoder=encoder
        )


def check_corrupt_at(model: OpenedModel, corrupt_at: str) -> None:
    """Refuses ``model_input`` for a model that does not see one square of a picture.

    Raises:
        InputError: it is a model of transformers, or sees tiles or several scales.
    """
    if corrupt_at != MODEL_INPUT:
        return
    if model.is_stock:
        raise InputError(
            f"{model.router!r} is a model of transformers; what it sees of a picture is known to its processor alone",
            where="corrupt_at model_input",
            remedy="Use native or long_side:N.",
        )
    check_model_input(model.processor.image_processor, model.model.vision_tower.config.scales)


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
    of_hub: str | None = values.get("model_type")
    return of_hub
