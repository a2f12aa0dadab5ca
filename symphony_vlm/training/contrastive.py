"""The encoder stage: a small open_clip CLIP trained on image-caption pairs with open_clip's own loss.

Shape letters: B batch, L caption length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from symphony_vlm.data.collator import ConversationDataset, EncodedSample
from symphony_vlm.data.conversation import EncodedConversation
from symphony_vlm.data.images import load_image
from symphony_vlm.data.mixture import SampleList
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.training.consumption import SourcedConversations

__all__ = ["CaptionCollator", "ContrastiveModel", "encode_caption", "save_open_clip"]


@dataclass
class ContrastiveOutput(ModelOutput):
    """Loss and its parts (batch accuracy of matching images to captions)."""

    loss: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None


class ContrastiveModel(nn.Module):
    """An open_clip CLIP with the contrastive loss inside, as Hugging Face's Trainer wants it.

    Args:
        architecture: open_clip's ``{embed_dim, vision_cfg, text_cfg}``.
        vocab_size: of the captions' tokenizer.
    """

    def __init__(self, architecture: dict[str, Any], vocab_size: int) -> None:
        super().__init__()
        from open_clip import CLIP, ClipLoss

        # open_clip pools the text at the position of the largest id, so the end of a caption gets one of its own.
        self.end_token_id = vocab_size
        text_cfg = {"context_length": 64, **architecture.get("text_cfg", {}), "vocab_size": vocab_size + 1}
        self.architecture = {**architecture, "text_cfg": text_cfg}
        self.clip = CLIP(**self.architecture)
        self.loss = ClipLoss()

    @property
    def context_length(self) -> int:
        """L."""
        length: int = self.architecture["text_cfg"]["context_length"]
        return length

    def forward(self, pixel_values: Tensor, captions: Tensor, labels: Tensor | None = None) -> ContrastiveOutput:
        """Symmetric InfoNCE over the batch (CLIP, arXiv 2103.00020).

        Args:
            pixel_values: ``[B, 3, H, W]``.
            captions: ``[B, L]`` ids, the end token last, then padding.
            labels: ignored; the diagonal is the target.
        """
        # Convolutions of few channels run a quarter faster on a CPU with the channels innermost. Only the input is laid
        # out so: the layout passes from layer to layer, and weights in it could not be written to a checkpoint.
        images, texts, scale = self.clip(pixel_values.contiguous(memory_format=torch.channels_last), captions)
        matched = (images @ texts.T).argmax(-1) == torch.arange(len(images), device=images.device)
        return ContrastiveOutput(
            loss=self.loss(images, texts, scale), loss_parts={"matched": matched.float().mean().detach()}
        )


def encode_caption(sample: Sample, tokenizer: Any) -> EncodedConversation:
    """The caption (the last answer) of a sample, as ids."""
    caption = sample.messages[-1].text
    ids = tokenizer.encode(caption, add_special_tokens=False, split_special_tokens=True)
    return EncodedConversation(input_ids=ids, labels=ids, image_order=(0,))


@dataclass(frozen=True)
class CaptionCollator:
    """Stacks the images and right-pads the captions to the model's context."""

    context_length: int
    end_token_id: int
    normalize: Callable[[list[np.ndarray]], Tensor]

    def __call__(self, samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
        """``pixel_values`` ``[B, 3, H, W]``, ``captions`` ``[B, L]``; a caption longer than the context is cut."""
        captions = torch.zeros(len(samples), self.context_length, dtype=torch.long)
        for row, sample in enumerate(samples):
            ids = [*sample["input_ids"][: self.context_length - 1].tolist(), self.end_token_id]
            captions[row, : len(ids)] = torch.tensor(ids)
        pixels = self.normalize([sample["images"][0] for sample in samples])
        return {"pixel_values": pixels, "captions": captions, "labels": captions}


def save_open_clip(
    model: ContrastiveModel, folder: Path, *, image_mean: Sequence[float], image_std: Sequence[float]
) -> None:
    """Writes the encoder in open_clip's own layout, loadable with ``open_clip.create_model("local-dir:FOLDER")``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": model.architecture,
        "preprocess_cfg": {"mean": list(image_mean), "std": list(image_std), "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))


def caption_dataset(
    samples: SampleList,
    tokenizer: Any,
    to_square: Callable[[Any], np.ndarray],
    load: Callable[[ImageRef], Image.Image] = load_image,
    augment: Callable[[ImageRef, Image.Image], Image.Image] | None = None,
) -> ConversationDataset:
    """Image-caption pairs; samples without an image are left out by the caller."""
    return SourcedConversations(
        samples,
        encode=lambda sample: encode_caption(sample, tokenizer),
        to_square=to_square,
        load=load,
        augment=augment,
    )
