"""Registers our classes with transformers' Auto classes, part by part as those are imported (see ``_imports.py``)."""

from __future__ import annotations

from typing import Literal

__all__ = ["register"]


def register(part: Literal["config", "model", "language_model", "image_processor", "processor"]) -> None:
    """Registers one kind of class. Registering again is harmless."""
    from symphony_vlm.model.configuration import SymphonyLMConfig, SymphonyVLMConfig

    if part == "config":
        from transformers.models.auto.configuration_auto import AutoConfig

        for config_class in (SymphonyVLMConfig, SymphonyLMConfig):
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    elif part == "model":
        from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

        from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

        AutoModelForImageTextToText.register(SymphonyVLMConfig, SymphonyVLMForConditionalGeneration, exist_ok=True)
    elif part == "language_model":
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM

        from symphony_vlm.model.language_model import SymphonyForCausalLM

        AutoModelForCausalLM.register(SymphonyLMConfig, SymphonyForCausalLM, exist_ok=True)
    elif part == "image_processor":
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        from symphony_vlm.model.image_processor import SymphonyImageProcessor

        AutoImageProcessor.register(
            SymphonyVLMConfig,
            image_processor_classes={"pil": SymphonyImageProcessor, "torchvision": SymphonyImageProcessor},
            exist_ok=True,
        )
    else:
        from transformers.models.auto.processing_auto import AutoProcessor

        from symphony_vlm.model.processor import SymphonyVLMProcessor

        AutoProcessor.register(SymphonyVLMConfig, SymphonyVLMProcessor, exist_ok=True)
