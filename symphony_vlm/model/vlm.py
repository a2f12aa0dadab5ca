"""The vision-language model. Read this file first: it is the map of the package.

::

    pixel_values --vision tower--> features_NPC --projector--> features_NPD --.
    input_ids ---embed--> text_BSD -----------------------------------------+--merge--> embeds_BSD
                                                                                |
         language model (any Hugging Face causal LM): [ attention, FFN | SparseMoE ] x layers
                           SparseMoE: router -> dispatch -> experts -> combine
                           router:    gate -> (expert graph) -> top-K
                                                                                |
         logits --> loss = cross entropy + weighted router losses --> output (loss parts, router record)

Shape letters: B batch, S sequence, N images, P features per image, C vision hidden size, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from symphony_vlm.data.images import ImageLike, open_image
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.loss import training_loss
from symphony_vlm.model.merge import merge_image_features, position_ids_from_mask
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.projector import build_projector
from symphony_vlm.model.registration import register
from symphony_vlm.model.vision import VisionConfig, build_vision_tower
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.recording import RoutingRecorder, sparse_layers
from symphony_vlm.moe.upcycle import install_moe_, upcycle_

__all__ = ["SymphonyVLMForConditionalGeneration", "SymphonyVLMOutput"]


@dataclass
class SymphonyVLMOutput(ModelOutput):
    """Output of the model. `loss_parts` has the detached parts of the loss by name, see `loss.training_loss`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    loss_parts: dict[str, Tensor] | None = None


class SymphonyVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision tower + projector + causal LM whose feed-forward layers may be mixtures of experts."""

    config_class = SymphonyVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Loading in bfloat16 must leave gates and graphs in fp32 (and the graphs' integer counters alone).
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["router.gate", "router.expert_graph.adjacency_EE"]

    def __init__(self, config: SymphonyVLMConfig) -> None:
        super().__init__(config)
        self.vision_tower = build_vision_tower(VisionConfig.from_dict(config.vision_config or {}))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.projector = build_projector(config.projector, self.vision_tower.hidden_size, config.hidden_size)
        self.processor: SymphonyVLMProcessor | None = None
        """Set by `symphony_vlm.load`; needed by `chat`."""
        self.routing: RoutingRecorder | None = None
        if config.moe_config is not None:
            self.routing = install_moe_(self.language_model, config.moe_config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SymphonyVLMOutput:
        """One pass over merged image and text tokens.

        Args:
            input_ids: ``[B, S]``, with `num_image_tokens` placeholders per image.
            pixel_values: ``[N, 3, H, W]``, the images of all sequences in reading order.
            image_features: ``[N, P, D]``, output of `get_image_features`, instead of `pixel_values`.
            attention_mask: ``[B, S]``, 1 for real tokens; padding may be on either side.
            position_ids: ``[B, S]``; default: counted over real tokens.
            past_key_values: cache of earlier tokens.
            inputs_embeds: ``[B, S, D]``, instead of `input_ids`: no merge takes place.
            labels: ``[B, S]``, -100 where nothing is learnt.
            num_items_in_batch: supervised tokens in the whole optimizer step, see `loss.training_loss`.

        Raises:
            ValueError: placeholders and image features differ in number.
        """
        if image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            text_BSD = self.get_input_embeddings()(input_ids)
            inputs_embeds = merge_image_features(text_BSD, image_features, input_ids, self.config.image_token_id)
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = position_ids_from_mask(attention_mask)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        loss, parts = None, None
        if labels is not None:
            loss, parts = training_loss(
                outputs.logits,
                labels,
                self.routing,
                ignore_index=self.config.ignore_index,
                num_items_in_batch=num_items_in_batch,
            )
        return SymphonyVLMOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loss_parts=parts,
        )

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected features of images: ``[N, 3, H, W] -> [N, P, D]``."""
        dtype = next(self.projector.parameters()).dtype
        features_NPC = self.vision_tower(pixel_values.to(dtype))
        features_NPD: Tensor = self.projector(features_NPC)
        return features_NPD

    @torch.no_grad()
    def chat(
        self,
        question: str,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        max_new_tokens: int = 128,
        **generation: Any,
    ) -> str:
        """Answers one question, greedily unless told otherwise.

        Args:
            question: the user's words; nothing in them is taken for a marker.
            images: files or Pillow images, put before the question.
            max_new_tokens: longest answer.
            generation: further arguments of ``generate``.

        Raises:
            InputError: an image cannot be read, or the model was loaded without its processor.
        """
        if self.processor is None:
            raise InputError("no processor", where="chat", remedy="Open the model with symphony_vlm.load(folder).")
        listed: list[Any] = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        parts = [ImagePart(index=i) for i in range(len(listed))]
        text = TextPart(text=f"\n{question}" if listed else question)
        inputs = self.processor.encode_prompts([[Message(role="user", parts=(*parts, text))]])
        if listed:
            inputs["pixel_values"] = self.processor.image_processor([open_image(i) for i in listed])["pixel_values"]
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        generation.setdefault("do_sample", False)
        ids = self.generate(**inputs, max_new_tokens=max_new_tokens, **generation)
        answer: str = self.processor.decode_answers(ids[:, inputs["input_ids"].shape[1] :])[0]
        return answer

    def upcycle_(self, moe: MoEConfig, *, seed: int = 0) -> None:
        """Turns the dense language model into a mixture of experts, in place, proving equal logits (`moe.upcycle`)."""
        if self.routing is not None:
            raise InputError("the model already has sparse layers", where="upcycle", remedy="Start from a dense model.")
        self.routing = upcycle_(self.language_model, moe, seed=seed)
        self.config.moe = moe.to_dict()

    def train(self, mode: bool = True) -> SymphonyVLMForConditionalGeneration:
        """Training mode, but not for a frozen tower or projector: its batch norms and dropout must not act."""
        super().train(mode)
        for part in (self.vision_tower, self.projector):
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but the image placeholder is never an answer: the next step would want an image there."""
        kwargs["suppress_tokens"] = sorted({self.config.image_token_id, *(kwargs.get("suppress_tokens") or ())})
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images enter with the prompt; with a cache, later steps have only new text tokens."""
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features")}
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            inputs |= images
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats sequences for beams and samples; a sequence's images are repeated together, in their order."""
        images = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_features")}
        if expand_size > 1 and input_ids is not None:
            placeholders = (input_ids == self.config.image_token_id).sum(1)
            per_row = (placeholders // max(1, self.config.num_image_tokens)).tolist()
            for name, value in images.items():
                if value is not None:
                    rows = [row for row in value.split(per_row) for _ in range(expand_size)]
                    images[name] = torch.cat(rows)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        assert input_ids is not None
        return input_ids, kwargs | images

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        embedding: nn.Module = self.language_model.get_input_embeddings()
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        head: nn.Module = self.language_model.get_output_embeddings()
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's head."""
        self.language_model.set_output_embeddings(value)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fills in what no checkpoint provided. Loading builds on the meta device, so nothing may stay raw memory."""
        super().initialize_weights()
        std = getattr(self.config.text_config, "initializer_range", 0.02)
        for _, layer in sparse_layers(self):
            layer.reset(std=std)
        self._restore_tower_buffers()

    def _restore_tower_buffers(self) -> None:
        """Non-persistent buffers of third-party towers (rotary tables of some timm trunks) survive no meta device."""
        persistent = set(self.vision_tower.state_dict())
        lost = {name for name, _ in self.vision_tower.named_buffers() if name not in persistent}
        if not lost or self.vision_tower.config.backend != "open_clip":
            return
        with torch.device("cpu"):
            fresh = dict(build_vision_tower(self.vision_tower.config).named_buffers())
        for name, buffer in self.vision_tower.named_buffers():
            if name in lost and buffer.device.type != "meta":
                buffer.copy_(fresh[name])

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing, extra or misshapen weight is an error that names it.

        A graph missing from the checkpoint becomes the identity: that is how a plain router's checkpoint is opened
        with a Symphony router.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # Transformers' own error for a mismatch names no weight; let it pass there and raise ours below.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if ".expert_graph." not in key)
        faults = {"missing": missing, "unexpected": sorted(info["unexpected_keys"])}
        faults["mismatched"] = [
            f"{key}: {tuple(saved)} in the file, {tuple(needed)} in the model"
            for key, saved, needed in sorted(info["mismatched_keys"])
        ]
        problems = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in faults.items() if keys]
        if problems:
            raise InputError(
                f"the weights do not fit the configuration: {'; '.join(problems)}",
                where=str(name),
                remedy="Compare config.json with the weights; they must come from one save.",
            )
        _align_memory(model)
        return (model, info) if wants_info else model


def _align_memory(model: nn.Module) -> None:
    """Copies CPU weights that safetensors mapped at odd addresses.

    Matrix kernels take other paths there and round differently, so that a loaded model would differ from the saved
    one in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


register("model")
