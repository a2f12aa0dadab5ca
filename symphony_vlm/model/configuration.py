"""Configuration of the whole model. The config tree is the module tree, and is all that loading looks at."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from symphony_vlm.errors import InputError
from symphony_vlm.model.registration import register
from symphony_vlm.moe.configuration import MoEConfig

__all__ = ["SymphonyVLMConfig"]

PROJECTORS = ("linear", "mlp2x_gelu")


class SymphonyVLMConfig(PreTrainedConfig):
    """Vision tower, projector, language model, and the sparse layers inside the language model.

    Args:
        vision_config: settings of the vision tower, see `symphony_vlm.model.vision.VisionConfig`.
        text_config: any Hugging Face causal LM's config, or its dict with ``model_type``.
        moe: settings of the sparse layers, see `symphony_vlm.moe.configuration.MoEConfig`; None: a dense model.
        projector: ``linear`` or ``mlp2x_gelu`` (LLaVA-1.5).
        image_token_id: the placeholder's id in ``input_ids``; each image takes `num_image_tokens` of them.
        num_image_tokens: features per image.
        ignore_index: the label that the loss leaves out.
    """

    model_type = "symphony_vlm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        moe: MoEConfig | dict[str, Any] | None = None,
        projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu",
        image_token_id: int = 0,
        num_image_tokens: int = 0,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        if projector not in PROJECTORS:
            raise InputError(f"{projector!r} is not one of {', '.join(PROJECTORS)}", where="model.projector")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.vision_config = vision_config
        self.text_config = text_config
        self.moe = MoEConfig.from_dict(moe).to_dict() if isinstance(moe, dict) else moe.to_dict() if moe else None
        self.projector = projector
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.ignore_index = ignore_index
        # Generation and checkpoint code look these up on the top-level config.
        if text_config is not None:
            kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """The language model's hidden size."""
        assert isinstance(self.text_config, PreTrainedConfig)
        size: int = self.text_config.hidden_size
        return size

    @property
    def moe_config(self) -> MoEConfig | None:
        """The sparse layers' settings as an object, or None for a dense model."""
        return None if self.moe is None else MoEConfig.from_dict(self.moe)


register("config")
