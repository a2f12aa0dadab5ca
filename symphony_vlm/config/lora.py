"""The setting ``lora`` of a stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from symphony_vlm.config.schema import Schema

__all__ = ["LoRAConfig"]


class LoRAConfig(Schema):
    """Low-rank adapters on the language model instead of training its weights (LoRA, arXiv 2106.09685).

    The defaults are those of LLaVA-1.5's ``finetune_lora.sh``.
    """

    rank: int = Field(default=128, gt=0)
    alpha: float = Field(default=256.0, gt=0)
    """What the adapters add is multiplied by ``alpha / rank``."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Before the adapters of linear layers; those of stacked experts have none."""
    target: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers of the language model, by the ends of their names (``q_proj``, ``self_attn.q_proj``). all-linear:
    every one. The head and what belongs to a router are never among them."""
    experts: bool = False
    """Whether the stacked weights of the experts have adapters too, one of this rank for each expert."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of the language model's frozen linear layers while the stage trains (QLoRA, arXiv 2305.14314); needs CUDA and
    bitsandbytes."""
