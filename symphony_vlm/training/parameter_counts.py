"""How many parameters a recipe's model has, which of them each stage trains, and the memory that takes at least.

Everything is counted on modules that training would build, on the meta device: in seconds, without memory or network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from symphony_vlm.config.models import KnownModel
from symphony_vlm.config.recipe import ModelConfig, Recipe, StageConfig
from symphony_vlm.errors import InputError
from symphony_vlm.model.adapters import LoRA, add_adapters_, freeze_adapted_
from symphony_vlm.model.base_model import BaseModel
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.loading import resolve_model_folder
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.installation import install_moe_
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.training.contrastive import ContrastiveModel
from symphony_vlm.training.parts import check_architectures
from symphony_vlm.training.skeleton import (
    embedding_rows,
    folder_config,
    language_config,
    meta_language_model,
    meta_model,
)
from symphony_vlm.training.trainer import freeze_except

__all__ = ["Count", "RecipeCounts", "StageCount", "count_folder", "count_known", "count_modules", "count_recipe"]

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters in all, and those that take part in computing one token."""

    total: int
    active: int


@dataclass(frozen=True, kw_only=True)
class StageCount:
    """What a stage trains, and the bytes of its weights, gradients and optimizer in one process."""

    name: str
    total: int
    trainable: dict[str, int]
    """By module."""
    weights: int
    gradients: int
    optimizer: int

    @property
    def memory(self) -> int:
        """Bytes of all three. Activations come on top."""
        return self.weights + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        sizes = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        trained = sum(self.trainable.values())
        return {"name": self.name, "total": self.total, "trainable": trained, "modules": self.trainable, "bytes": sizes}


@dataclass(frozen=True, kw_only=True)
class RecipeCounts:
    """The model at the end of the recipe, and its stages."""

    modules: dict[str, Count]
    stages: list[StageCount]

    @property
    def whole(self) -> Count:
        """Of all modules together."""
        counts = self.modules.values()
        return Count(total=sum(c.total for c in counts), active=sum(c.active for c in counts))

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``, see the contract of ``config params``."""
        modules = {name: {"total": count.total, "active": count.active} for name, count in self.modules.items()}
        summary: dict[str, Any] = {"total": self.whole.total, "active": self.whole.active, "modules": modules}
        return summary | {"stages": [stage.to_dict() for stage in self.stages]}


def count_modules(model: nn.Module) -> dict[str, Count]:
    """Parameters by top-level module; a parameter with two names counts where it is first.

    Of a sparse layer's experts, the share K / E is active.
    """
    experts: dict[str, tuple[int, int]] = {}
    for name, layer in sparse_layers(model):
        config = layer.router.config
        experts |= {f"{name}.experts.{n}": (config.num_experts_per_tok, config.num_experts) for n, _ in _own(layer)}
    totals: dict[str, int] = defaultdict(int)
    active: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        module, size = name.partition(".")[0], parameter.numel()
        k, e = experts.get(name, (1, 1))
        totals[module] += size
        active[module] += size * k // e
    return {name: Count(total=totals[name], active=active[name]) for name in totals}


def _own(layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return layer.experts.named_parameters()


def count_recipe(recipe: Recipe) -> RecipeCounts:
    """Counts a recipe's model and stages.

    Raises:
        InputError: a part's architecture is not known offline, or a stage trains modules that the model has not.
    """
    check_architectures(recipe.model)
    if recipe.is_language:
        return _count_language(recipe)
    model = _starting_model(recipe.model)
    stages: list[StageCount] = []
    from_files = recipe.model.start is None and recipe.model.language.name is not None
    for stage in recipe.stages:
        if stage.kind == "contrastive":
            stages.append(_count_stage(stage, _contrastive_model(recipe.model), 4))
        elif stage.kind == "text":
            language_model = model.language_model.requires_grad_(True)
            stages.append(_count_stage(stage, language_model, 4, module="language_model"))
            from_files = False
        else:
            if stage.upcycle:
                assert recipe.model.moe is not None
                install_moe_(model, MoEConfig.from_dict(recipe.model.moe))
            freeze_except(model, stage.train)
            trained = model if stage.lora is None else _adapted(stage, model)
            stages.append(_count_stage(stage, trained, _language_bytes(recipe.model) if from_files else 4))
            from_files = False
    return RecipeCounts(modules=count_modules(model), stages=stages)


def _count_language(recipe: Recipe) -> RecipeCounts:
    model = meta_language_model(recipe.model)
    stages = [_count_stage(stage, model, 4, module="language_model") for stage in recipe.stages]
    return RecipeCounts(modules=count_modules(model), stages=stages)


def count_folder(folder: str) -> dict[str, Count]:
    """Counts a saved model by its configuration: ours, or any causal LM.

    Raises:
        InputError: there is no such model.
    """
    config = folder_config(resolve_model_folder(folder), "config params")
    if isinstance(config, SymphonyVLMConfig):
        return count_modules(_built(config))
    with torch.device("meta"):
        return count_modules(AutoModelForCausalLM.from_config(config))


def count_known(known: KnownModel) -> dict[str, Count]:
    """Counts a part by its entry in ``configs/models``; a vision tower without its pooling head."""
    config = AutoConfig.for_model(**known.architecture)
    config.vision_use_head = False
    auto_class = AutoModel if known.kind == "vision" else AutoModelForCausalLM
    with torch.device("meta"):
        return count_modules(auto_class.from_config(config))


def _built(config: SymphonyVLMConfig) -> SymphonyVLMForConditionalGeneration:
    with torch.device("meta"):
        return SymphonyVLMForConditionalGeneration(config)


def _starting_model(model: ModelConfig) -> SymphonyVLMForConditionalGeneration:
    if model.start is None:
        return meta_model(model)
    folder = resolve_model_folder(model.start)
    if not Path(folder).is_dir():
        problem = "a saved model can be counted in a local folder only"
        raise InputError(problem, where=f"model.start {folder!r}", remedy="Download it and give its folder.")
    return _built(SymphonyVLMConfig.from_pretrained(folder))


def _adapted(stage: StageConfig, model: SymphonyVLMForConditionalGeneration) -> SymphonyVLMForConditionalGeneration:
    """A copy with the stage's adapters; the next stage gets the model with its adapters merged, which is as it was."""
    assert stage.lora is not None
    adapted = _built(model.config)
    with torch.device("meta"):
        add_adapters_(adapted, LoRA(**stage.lora.model_dump()), BaseModel(name="", fingerprint=""))
    freeze_except(adapted, stage.train)
    freeze_adapted_(adapted)
    return adapted


def _contrastive_model(model: ModelConfig) -> ContrastiveModel:
    if model.tower.architecture is None:
        raise InputError("a contrastive stage trains a new encoder", where="model.vision.architecture")
    rows = embedding_rows(model, language_config(model))
    with torch.device("meta"):
        return ContrastiveModel(model.tower.architecture, rows)


def _language_bytes(model: ModelConfig) -> int:
    """Bytes of each of the pretrained language model's weights as its files have them."""
    dtype = language_config(model).dtype
    return 2 if dtype in SIXTEEN_BITS else 4


def _count_stage(stage: StageConfig, model: nn.Module, language_bytes: int, *, module: str = "") -> StageCount:
    """Bytes as `parts.keep_precision_` leaves them: what trains is fp32, and its gradients and AdamW's two averages.

    DeepSpeed in bf16 has all weights and gradients in 16 bits, and fp32 copies of what trains beside the averages.
    """
    zero = stage.engine.startswith("zero") and stage.bf16
    trainable: dict[str, int] = defaultdict(int)
    weights = gradients = optimizer = total = 0
    for name, parameter in model.named_parameters():
        part, size = module or name.partition(".")[0], parameter.numel()
        total += size
        frozen_bytes = language_bytes if part == "language_model" and stage.bf16 else 4
        if parameter.requires_grad:
            trainable[part] += size
            weights, gradients = weights + (2 if zero else 4) * size, gradients + (2 if zero else 4) * size
            optimizer += (12 if zero else 8) * size
        else:
            weights += (2 if zero else frozen_bytes) * size
    return StageCount(
        name=stage.name,
        total=total,
        trainable=dict(trainable),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
    )
