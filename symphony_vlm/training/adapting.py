"""Adapters of a stage: what model they sit on, where that is saved, and that they start equal after a restart."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import set_seed

from symphony_vlm.config.lora import LoRAConfig
from symphony_vlm.config.recipe import StageConfig
from symphony_vlm.model.adapters import LoRA, add_adapters_, freeze_adapted_
from symphony_vlm.model.base_model import BaseModel
from symphony_vlm.model.quantization import quantize_
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.training.fitting import RunContext, replace_folder
from symphony_vlm.training.trainer import freeze_except

__all__ = ["adapt_", "own_base"]


def own_base(stage: StageConfig, context: RunContext) -> Path:
    """Where a stage keeps the model under its adapters if no earlier stage has saved it."""
    return context.folder / stage.name / "base"


def adapt_(
    model: SymphonyVLMForConditionalGeneration,
    lora: LoRAConfig,
    stage: StageConfig,
    context: RunContext,
    saved: str | Path | None,
) -> None:
    """Puts a stage's adapters on its model and freezes what does not train.

    Args:
        model: as the stage begins with it.
        lora: the stage's setting.
        stage: its settings.
        context: the run's.
        saved: the folder or hub name that has this model; None: it is saved into the stage's folder first.
    """
    if saved is None:
        saved = own_base(stage, context)
        if not saved.is_dir():
            replace_folder(saved, partial(_save, model))
    base = BaseModel.at(saved)
    if lora.quantization != "none":
        quantize_(model, lora.quantization, torch.bfloat16 if stage.bf16 else torch.float32)
    # Whether the model was assembled or opened, which takes other random numbers, the adapters start the same.
    set_seed(context.recipe.seed)
    add_adapters_(model, LoRA(**lora.model_dump()), base)
    freeze_except(model, stage.train)
    freeze_adapted_(model)


def _save(model: SymphonyVLMForConditionalGeneration, folder: Path) -> None:
    assert model.processor is not None
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
