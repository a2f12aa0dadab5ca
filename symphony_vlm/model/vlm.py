"""The vision-language model. Read this file first: it is the map of the package.

::

    pixel_values --vision tower--> features_NPC --projector--> features_NPD --.
    input_ids ---embed--> text_BSD -----------------------------------------+--merge--> embeds_BSD
                                                                                |
         language model (any Hugging Face causal LM): [ attention, FFN | SparseMoE ] x layers
                           SparseMoE: router -> dispatch -> experts -> combine
                           router:    gate -> (token graph) -> (expert graph) -> top-K
                                                                                |
         logits --> loss = cross entropy + weighted router losses --> output (loss parts, router record)

Shape letters: B batch, S sequence, N images, P features per image, C vision hidden size, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache

from symphony_vlm.data.images import ImageLike, open_image
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.model.attention import document_arguments
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.merge import merge_image_features, position_ids_from_mask
from symphony_vlm.model.pretrained import SymphonyOutput, SymphonyPreTrainedModel
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.projector import build_projector
from symphony_vlm.model.registration import register
from symphony_vlm.model.turns import separate_turns
from symphony_vlm.model.vision import VisionConfig, build_vision_tower
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.documents import Documents
from symphony_vlm.moe.installation import install_moe_
from symphony_vlm.moe.upcycle import upcycle_

__all__ = ["SymphonyVLMForConditionalGeneration"]


class SymphonyVLMForConditionalGeneration(SymphonyPreTrainedModel, GenerationMixin):
    """Vision tower + projector + causal LM; the feed-forward layers of each may be mixtures of experts."""

    config_class = SymphonyVLMConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")

    def __init__(self, config: SymphonyVLMConfig) -> None:
        super().__init__(config)
        self.vision_tower = build_vision_tower(VisionConfig.from_dict(config.vision_config or {}))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.projector = build_projector(config.projector, self.vision_tower.hidden_size, config.hidden_size)
        self.processor: SymphonyVLMProcessor | None = None
        """Set by `symphony_vlm.load`; needed by `chat`."""
        self.routing = None
        if config.moe_config is not None:
            self.routing = install_moe_(self, config.moe_config)
        self.post_init()

    @property
    def moe_modules(self) -> dict[str, nn.Module]:
        """Where experts can be, see `moe.feed_forward.placements`."""
        return {"language": self.language_model, "projector": self, "vision": self.vision_tower}

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
        turn_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SymphonyOutput:
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
            turn_ids: ``[B, S]``, with `attention_mask`: turns that shall not see each other, see `turns`.
            document_ids: ``[B, S]``, instead of `attention_mask` and `position_ids`: which document of a packed row
                each token belongs to, -1 for padding, see `moe.documents`.

        Raises:
            ValueError: placeholders and image features differ in number, or arguments exclude each other.
        """
        idle = None
        if image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        elif image_features is None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            # In the place of the images' pass, as other ranks may be in it now.
            idle = self._idle_vision_pass() if self._others_wait_for_vision() else None
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            text_BSD = self.get_input_embeddings()(input_ids)
            inputs_embeds = merge_image_features(text_BSD, image_features, input_ids, self.config.image_token_id)
        if idle is not None:
            inputs_embeds = inputs_embeds + idle
        if document_ids is not None:
            others = (attention_mask, position_ids, past_key_values, turn_ids)
            if any(other is not None for other in others):
                raise ValueError("document_ids excludes attention_mask, position_ids, past_key_values and turn_ids")
            kwargs |= document_arguments(Documents.from_ids(document_ids), self.language_model)
            attention_mask, position_ids = kwargs.pop("attention_mask"), kwargs.pop("position_ids")
        elif turn_ids is not None:
            if attention_mask is None:
                raise ValueError("turn_ids needs attention_mask, which says where padding begins")
            attention_mask, position_ids = separate_turns(
                turn_ids,
                attention_mask,
                implementation=self.language_model.config._attn_implementation,
                dtype=inputs_embeds.dtype,
            )
        elif position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = position_ids_from_mask(attention_mask)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return self._output(outputs, labels, self.config.ignore_index, num_items_in_batch)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected features of images: ``[N, 3, H, W] -> [N, P, D]``."""
        dtype = next(self.language_model.parameters()).dtype
        features_NPC = self.vision_tower(pixel_values.to(dtype))
        features_NPD: Tensor = self.projector(features_NPC)
        return features_NPD

    def _others_wait_for_vision(self) -> bool:
        """Whether other processes need this one in the tower and the projector, images or not.

        Data parallelism of any kind waits for a gradient of each parameter that trains.
        """
        if self._vision_is_sharded():
            return True
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        parameters = (*self.vision_tower.parameters(), *self.projector.parameters())
        return parallel and self.training and torch.is_grad_enabled() and any(p.requires_grad for p in parameters)

    def _vision_is_sharded(self) -> bool:
        """Whether FSDP2 (which gives modules an ``unshard``) or ZeRO-3 has spread the tower or the projector."""
        parameters = [*self.vision_tower.parameters(), *self.projector.parameters()]
        sharded = any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in parameters)
        return sharded or hasattr(self, "unshard")

    def _idle_vision_pass(self) -> Tensor:
        """Zero, by way of the tower and the projector, whose gradients become zeros.

        Sharded parameters are gathered, and gradients reduced, by all ranks together: a rank whose batch has no image
        must take part, or the others would wait for it for ever.
        """
        modes = [(part, part.training) for part in (self.vision_tower, self.projector)]
        size = self.vision_tower.config.image_size
        recorder = nullcontext() if self.routing is None else self.routing.idle_images()
        try:
            for part, _ in modes:
                part.eval()  # a blank image must not enter running means
            with recorder:
                features_NPD = self.get_image_features(torch.zeros(1, 3, size, size, device=self.device))
        finally:
            for part, mode in modes:
                part.train(mode)
        return 0 * features_NPD.sum()

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
        """Turns dense layers into mixtures of experts, in place, proving equal logits (`moe.upcycle`)."""
        upcycle_(self, moe, seed=seed)

    def probe_inputs(self) -> dict[str, Tensor]:
        """Fixed random inputs for a proof of equal logits: one picture and some text (`moe.proof`)."""
        generator = torch.Generator().manual_seed(0)
        size = self.vision_tower.config.image_size
        text = torch.randint(0, self.config.text_config.vocab_size, (1, 16), generator=generator)
        # The placeholder's id stands for the picture alone.
        text[text == self.config.image_token_id] = (self.config.image_token_id + 1) % self.config.text_config.vocab_size
        picture = torch.full((1, self.config.num_image_tokens), self.config.image_token_id)
        pixels = torch.randn(1, 3, size, size, generator=generator)
        inputs = {"input_ids": torch.cat([text[:, :4], picture, text[:, 4:]], dim=1), "pixel_values": pixels}
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

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

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fills in what no checkpoint provided. Loading builds on the meta device, so nothing may stay raw memory."""
        super().initialize_weights()
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


register("model")
