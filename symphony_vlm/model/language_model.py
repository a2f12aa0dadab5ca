"""A causal LM with sparse layers by itself: any Hugging Face causal LM after `upcycle_` or `symphonize_`, saved."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache

from symphony_vlm.model.configuration import SymphonyLMConfig
from symphony_vlm.model.pretrained import SymphonyOutput, SymphonyPreTrainedModel
from symphony_vlm.model.registration import register
from symphony_vlm.moe.installation import install_moe_

__all__ = ["SymphonyForCausalLM"]

IGNORE_INDEX = -100


class SymphonyForCausalLM(SymphonyPreTrainedModel, GenerationMixin):
    """A causal LM with sparse layers, opened by ``AutoModelForCausalLM`` from a folder with ``symphony_lm``."""

    config_class = SymphonyLMConfig
    # A checkpoint of the language model alone, which a model converted in place writes, lacks this prefix.
    base_model_prefix = "language_model"

    def __init__(self, config: SymphonyLMConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.routing = install_moe_(self, config.moe_config)
        self.post_init()

    @property
    def moe_modules(self) -> dict[str, Any]:
        """Where experts can be, see `moe.feed_forward.placements`."""
        return {"language": self.language_model}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SymphonyOutput:
        """One pass of the language model; with `labels` the loss contains the weighted router losses.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``, 1 for real tokens.
            position_ids: ``[B, S]``.
            past_key_values: cache of earlier tokens.
            inputs_embeds: ``[B, S, D]``, instead of `input_ids`.
            labels: ``[B, S]``, -100 where nothing is learnt; position s + 1 is what position s predicts.
            num_items_in_batch: supervised tokens in the whole optimizer step, see `loss.training_loss`.
            kwargs: for the language model.
        """
        return self._run_language_model(
            labels,
            ignore_index=IGNORE_INDEX,
            num_items_in_batch=num_items_in_batch,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The language model's own: some have rules (Phi-3 drops its cache where its rotary factors change)."""
        inputs: dict[str, Any] = self.language_model.prepare_inputs_for_generation(*args, **kwargs)
        return inputs


register("language_model")
