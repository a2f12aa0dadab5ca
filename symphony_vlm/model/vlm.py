"""The vision-language model. Read this file first: it is the map of the package.

::

    pixel_values --vision tower--> features_TPC --projector, packing--> features of each image --.
    input_ids ---embed--> text_BSD -----------------------------------------------------------+--merge--> embeds_BSD
                                                                                |
         language model (any Hugging Face causal LM): [ attention, FFN | SparseMoE ] x layers
                           SparseMoE: router -> dispatch -> experts -> combine
                           router:    gate -> (token graph) -> (expert graph) -> top-K
                                                                                |
         logits --> loss = cross entropy + weighted router losses --> output (loss parts, router record)

Shape letters: B batch, S sequence, N images, T tiles of all images (one an image, but with anyres), P features per
tile, C vision hidden size, D hidden size, V vocabulary.
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
from symphony_vlm.model.anyres import new_image_newline, pack_image_features, tile_grid_of
from symphony_vlm.model.attention import document_arguments
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.merge import images_of_rows, merge_image_features, position_ids_from_mask
from symphony_vlm.model.pretrained import SymphonyOutput, SymphonyPreTrainedModel
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.projector import build_projector
from symphony_vlm.model.registration import register
from symphony_vlm.model.turns import separate_turns
from symphony_vlm.model.vision import VisionConfig, build_vision_tower
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.documents import Documents
from symphony_vlm.moe.expert_parallel import sharded_experts
from symphony_vlm.moe.installation import install_moe_
from symphony_vlm.moe.precision import computing_dtype
from symphony_vlm.moe.upcycle import upcycle_

__all__ = ["SymphonyVLMForConditionalGeneration"]

IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_features")


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
        self.tile_grid = tile_grid_of(config.grid_pinpoints, self.vision_tower.config)
        self.image_newline = None if self.tile_grid is None else new_image_newline(config.hidden_size)
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
        image_sizes: Tensor | None = None,
        vision_features: Tensor | None = None,
        image_features: Sequence[Tensor] | Tensor | None = None,
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
            input_ids: ``[B, S]``, with a placeholder for each feature of each image.
            pixel_values: ``[T, 3, H, W]``, the images (their tiles) of all sequences in reading order.
            image_sizes: ``[N, 2]``, height and width of each image; needed where images become tiles.
            vision_features: ``[T, P, C]``, the vision tower's output, instead of `pixel_values`; T may be 0.
            image_features: ``[n_i, D]`` of each image, output of `get_image_features`, instead of `pixel_values`.
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
        if image_features is None and vision_features is not None and len(vision_features):
            image_features = self.project_image_features(vision_features, image_sizes)
        elif image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values, image_sizes)
        elif image_features is None and _is_empty(past_key_values):
            # In the place of the images' pass, as other ranks may be in it now.
            idle = self._idle_vision_pass(vision_features) if self._others_wait_for_vision() else None
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.get_input_embeddings()(input_ids)
            # A step of `generate`, which never chooses the placeholder: to look for it would make the device wait.
            if image_features is not None or input_ids.shape[1] > 1 or _is_empty(past_key_values):
                image_token_id = self.config.image_token_id
                inputs_embeds = merge_image_features(inputs_embeds, image_features, input_ids, image_token_id)
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
        return self._run_language_model(
            labels,
            ignore_index=self.config.ignore_index,
            num_items_in_batch=num_items_in_batch,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Features of each image as the language model reads them, ``[n_i, D]``; arguments as in `forward`."""
        features_TPC = self.vision_tower(pixel_values.to(computing_dtype(self.vision_tower)))
        return self.project_image_features(features_TPC, image_sizes)

    def project_image_features(self, features_TPC: Tensor, image_sizes: Tensor | None = None) -> list[Tensor]:
        """The second half of `get_image_features`: from the vision tower's output, which a cache may hold.

        Raises:
            ValueError: images become tiles, and `image_sizes` is missing or of other images.
        """
        features_TPD: Tensor = self.projector(features_TPC.to(computing_dtype(self.projector)))
        if self.tile_grid is None:
            return list(features_TPD)
        if image_sizes is None:
            raise ValueError("with anyres pixel_values needs image_sizes, both from the processor")
        sizes = [(height, width) for height, width in image_sizes.tolist()]
        assert self.image_newline is not None
        return pack_image_features(features_TPD, sizes, self.tile_grid, self.image_newline)

    def _others_wait_for_vision(self) -> bool:
        """Whether other processes need this one in the tower and the projector, images or not.

        Data parallelism of any kind waits for a gradient of each parameter that trains. One process alone needs the
        pass where nothing else trains, for its loss must have a gradient.
        """
        if self._vision_is_sharded():
            return True
        parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        needed = parallel or not any(p.requires_grad for p in self.language_model.parameters())
        parameters = (*self.vision_tower.parameters(), *self.projector.parameters())
        return needed and self.training and torch.is_grad_enabled() and any(p.requires_grad for p in parameters)

    def _vision_is_sharded(self) -> bool:
        """Whether FSDP2 (which gives modules an ``unshard``), ZeRO-3 or expert parallelism has spread them."""
        if any(next(sharded_experts(part), None) is not None for part in (self.vision_tower, self.projector)):
            return True
        parameters = [*self.vision_tower.parameters(), *self.projector.parameters()]
        sharded = any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in parameters)
        return sharded or hasattr(self, "unshard")

    def _idle_vision_pass(self, vision_features: Tensor | None = None) -> Tensor:
        """Zero, by way of the tower and the projector, whose gradients become zeros.

        With `vision_features` (none of them here) the tower runs nowhere, and not here either.

        Sharded parameters are gathered, and gradients reduced, by all ranks together: a rank whose batch has no image
        must take part, or the others would wait for it for ever.
        """
        modes = [(part, part.training) for part in (self.vision_tower, self.projector)]
        size = self.vision_tower.config.input_size
        recorder = nullcontext() if self.routing is None else self.routing.idle_images()
        try:
            for part, _ in modes:
                part.eval()  # a blank image must not enter running means
            with recorder:
                if vision_features is None:
                    dtype = computing_dtype(self.vision_tower)
                    features_NPC = self.vision_tower(torch.zeros(1, 3, size, size, device=self.device, dtype=dtype))
                else:
                    features_NPC = vision_features.new_zeros(1, *vision_features.shape[1:])
                features_NPD = self.projector(features_NPC.to(computing_dtype(self.projector)))
        finally:
            for part, mode in modes:
                part.train(mode)
        zero: Tensor = 0 * features_NPD.sum()
        return zero if self.image_newline is None else zero + 0 * self.image_newline.sum()

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
        opened = [open_image(image) for image in listed]
        counts = self.processor.count_image_tokens([(image.height, image.width) for image in opened])
        inputs = self.processor.encode_prompts([[Message(role="user", parts=(*parts, text))]], [counts])
        if opened:
            inputs.update(self.processor.image_processor(opened))
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
        size = self.vision_tower.config.input_size
        text = torch.randint(0, self.config.text_config.vocab_size, (1, 16), generator=generator, device="cpu")
        # The placeholder's id stands for the picture alone.
        text[text == self.config.image_token_id] = (self.config.image_token_id + 1) % self.config.text_config.vocab_size
        num_tokens, num_tiles = self.config.num_image_tokens, 1
        inputs = {}
        if self.tile_grid is not None:
            inputs["image_sizes"] = torch.tensor([[size, 2 * size]])
            num_tokens = self.tile_grid.num_tokens((size, 2 * size), num_tokens)
            num_tiles = self.tile_grid.num_tiles((size, 2 * size))
        picture = torch.full((1, num_tokens), self.config.image_token_id, device="cpu")
        inputs["pixel_values"] = torch.randn(num_tiles, 3, size, size, generator=generator, device="cpu")
        inputs["input_ids"] = torch.cat([text[:, :4], picture, text[:, 4:]], dim=1)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def train(self, mode: bool = True) -> SymphonyVLMForConditionalGeneration:
        """Training mode, but not for a frozen tower or projector: its batch norms and dropout must not act."""
        super().train(mode)
        for part in (self.vision_tower, self.projector):
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but the image placeholder is never an answer: the next step would want an image there.

        Keys and values are kept unless the call says otherwise: transformers' Trainer leaves ``use_cache: false`` in
        the settings of whatever it trains, and each token would then read the whole prompt again.
        """
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = True
        if kwargs.get("vision_features") is not None:
            sizes = kwargs.pop("image_sizes", None)
            kwargs["image_features"] = self.project_image_features(kwargs.pop("vision_features"), sizes)
        kwargs["suppress_tokens"] = sorted({self.config.image_token_id, *(kwargs.get("suppress_tokens") or ())})
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images enter with the prompt, of which a cache may hold the beginning; later steps have text tokens only."""
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        first = kwargs.get("is_first_iteration", False)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = inputs.get("past_key_values")
        if first or _is_empty(cache):
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
        images = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        if expand_size > 1 and input_ids is not None:
            placeholders = (input_ids == self.config.image_token_id).sum(1).tolist()
            images = self._repeat_images(images, placeholders, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        assert input_ids is not None
        return input_ids, kwargs | images

    def _repeat_images(self, images: dict[str, Any], placeholders: list[int], times: int) -> dict[str, Any]:
        """Image inputs for a batch each of whose rows, with so many placeholders, is repeated."""
        pixels, sizes, features = (images[name] for name in IMAGE_INPUTS)
        if pixels is None and features is None:
            return images
        tiles = [1] * len(pixels if features is None else features)
        tokens = [self.config.num_image_tokens] * len(tiles)
        if self.tile_grid is not None and sizes is not None:
            listed = [(height, width) for height, width in sizes.tolist()]
            tiles = [self.tile_grid.num_tiles(size) for size in listed]
            tokens = [self.tile_grid.num_tokens(size, self.config.num_image_tokens) for size in listed]
        if features is not None:
            tokens = [len(part) for part in features]
        rows = images_of_rows(placeholders, tokens)
        order = [index for row in rows for _ in range(times) for index in row]
        if pixels is not None:
            by_image = pixels.split(tiles)
            pixels = torch.cat([by_image[index] for index in order])
        sizes = None if sizes is None else sizes[order]
        features = None if features is None else [features[index] for index in order]
        return dict(zip(IMAGE_INPUTS, (pixels, sizes, features), strict=True))

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


def _is_empty(cache: Cache | None) -> bool:
    """Whether no token has gone before. Unlike a static cache's length this is known without asking the device."""
    return cache is None or not cache.is_initialized


register("model")
