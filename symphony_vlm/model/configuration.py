"""Configuration of the whole model. The config tree is the module tree, and is all that loading looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from symphony_vlm.errors import InputError
from symphony_vlm.model.registration import register
from symphony_vlm.moe.configuration import MoEConfig

__all__ = ["SymphonyLMConfig", "SymphonyVLMConfig"]

PROJECTORS = ("linear", "mlp2x_gelu")


class _AroundLanguageModel(PreTrainedConfig):
    """What the configurations of a model around a causal LM share."""

    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def _set_language_model(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None,
        moe: MoEConfig | dict[str, Any] | None,
        kwargs: dict[str, Any],
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.moe = MoEConfig.from_dict(moe).to_dict() if isinstance(moe, dict) else moe.to_dict() if moe else None
        # Generation and checkpoint code look these up on the top-level config.
        if text_config is not None:
            kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(name, getattr(text_config, name, None))


class SymphonyLMConfig(_AroundLanguageModel):
    """A causal LM with sparse layers.

    Args:
        text_config: any Hugging Face causal LM's config, or its dict with ``model_type``.
        moe: settings of the sparse layers, see `symphony_vlm.moe.configuration.MoEConfig`.
    """

    model_type = "symphony_lm"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        moe: MoEConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_language_model(text_config, moe, kwargs)
        super().__init__(**kwargs)

    @property
    def moe_config(self) -> MoEConfig:
        """The sparse layers' settings as an object.

        Raises:
            InputError: there are none.
        """
        if self.moe is None:
            raise InputError(
                "a symphony_lm has sparse layers, but there are no settings for them",
                where="config.moe",
                remedy="Open a dense language model with its own class.",
            )
        return MoEConfig.from_dict(self.moe)


class SymphonyVLMConfig(_AroundLanguageModel):
    """Vision tower, projector, language model, and the sparse layers inside the language model.

    Args:
        vision_config: settings of the vision tower, see `symphony_vlm.model.vision.VisionConfig`.
        text_config: any Hugging Face causal LM's config, or its dict with ``model_type``.
        moe: settings of the sparse layers, see `symphony_vlm.moe.configuration.MoEConfig`; None: a dense model.
        projector: ``linear`` or ``mlp2x_gelu`` (LLaVA-1.5).
        image_token_id: the placeholder's id in ``input_ids``; each image takes `num_image_tokens` of them.
        num_image_tokens: features per image; where images become tiles, of one tile.
        grid_pinpoints: makes images tiles (*anyres*): the heights and widths in pixels to choose from, see
            `symphony_vlm.model.anyres`. The processor's setting must be the same.
        ignore_index: the label that the loss leaves out.
        adapter: in a folder that holds adapters and not the whole model: which, and of what model, see
            `symphony_vlm.model.adapters`. None in a model that is open.
    """

    model_type = "symphony_vlm"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        moe: MoEConfig | dict[str, Any] | None = None,
        projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu",
        image_token_id: int = 0,
        num_image_tokens: int = 0,
        grid_pinpoints: Sequence[Sequence[int]] | None = None,
        ignore_index: int = -100,
        adapter: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if projector not in PROJECTORS:
            raise InputError(f"{projector!r} is not one of {', '.join(PROJECTORS)}", where="model.projector")
        self._set_language_model(text_config, moe, kwargs)
        if isinstance(self.text_config, SymphonyLMConfig):
            raise InputError(
                "the language model has sparse layers already",
                where="model.language",
                remedy="Give the dense one it was made of; a stage with upcycle: true makes it sparse.",
            )
        self.vision_config = vision_config
        self.projector = projector
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.grid_pinpoints = None if grid_pinpoints is None else [list(size) for size in grid_pinpoints]
        self.ignore_index = ignore_index
        self.adapter = adapter
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
