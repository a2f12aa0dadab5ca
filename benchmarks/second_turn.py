"""Time to the first token of a conversation's second turn, with and without what the first has left.

A random model with experts, and a picture of 576 tokens. The whole is the first turn: picture processor, vision tower
and prompt. In the second turn the picture is encoded already; the baseline computes the whole conversation again, the
other contender its new tokens only. Both must choose the same token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

from benchmarks.measure import Case, Plan, Work
from symphony_vlm.data.templates import get_template
from symphony_vlm.data.tokenizer import train_tokenizer
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.vision import VisionConfig
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.serving.chat import ChatSession

__all__ = ["PLAN", "cases", "picture_model"]

PLAN = Plan(rounds=3, alternations=4, seconds=0.005)

_QUESTIONS = ("How many shapes are there?", "What is left of the circle?")
"""Asked in turn, so that the second turn before has left no more than the first turn did."""


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """One conversation.

    Args:
        tiny: sizes for a test of the benchmark.
        device: where the model is.
    """
    size, layers = (32, 1) if tiny else (256, 6)
    model = picture_model(size, layers, image_size=56 if tiny else 336).to(device)
    picture = Image.effect_noise((400, 300), 60).convert("RGB")
    yield Case(
        settings={"hidden size": size, "layers": layers, "image tokens": model.config.num_image_tokens},
        contenders={
            "second turn, all computed": _second_turn(model, picture, reuse_prefix=False),
            "second turn, prefix kept": _second_turn(model, picture, reuse_prefix=True),
        },
        whole=("first turn", _first_turn(model, picture)),
    )


def _first_turn(model: SymphonyVLMForConditionalGeneration, picture: Image.Image) -> Work:
    def run() -> Sequence[Tensor]:
        session = ChatSession(model)
        session.add_image(picture)
        session.ask("What color is the circle?", max_new_tokens=1)
        return ()

    return run


def _second_turn(model: SymphonyVLMForConditionalGeneration, picture: Image.Image, *, reuse_prefix: bool) -> Work:
    session = ChatSession(model, reuse_prefix=reuse_prefix)
    session.add_image(picture)
    session.ask("What color is the circle?", max_new_tokens=8)
    turns = session._turns
    questions = itertools.cycle(_QUESTIONS)

    def run() -> Sequence[Tensor]:
        session._turns = turns
        answer = session.ask(next(questions), max_new_tokens=1)
        return (torch.tensor([*map(ord, answer)]),)

    return run


def picture_model(size: int, layers: int, image_size: int) -> SymphonyVLMForConditionalGeneration:
    """A random model with experts and a picture of ``(image_size / 14)^2`` tokens."""
    template = get_template("compact")
    markers = [marker for marker in template.special_tokens if marker != template.answer_end]
    tokenizer = train_tokenizer([*_QUESTIONS] * 20, vocab_size=400, special_tokens=markers, end_token="<|end|>")
    num_tokens = (image_size // 14) ** 2
    images = SymphonyImageProcessor(image_size=image_size)
    processor = SymphonyVLMProcessor(images, tokenizer, num_image_tokens=num_tokens, template="compact")
    tower = {"image_size": image_size, "patch_size": 14, "width": size, "layers": layers, "head_width": 32}
    architecture = {"embed_dim": size, "vision_cfg": tower}
    vision = VisionConfig(backend="open_clip", architecture=architecture, image_size=image_size, feature_layer=-1)
    text = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=size // 4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = SymphonyVLMConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_id=processor.image_token_id,
        num_image_tokens=num_tokens,
        grid_pinpoints=images.grid_pinpoints,
    )
    torch.manual_seed(0)
    model = SymphonyVLMForConditionalGeneration(config)
    model.upcycle_(MoEConfig(num_experts=4, router="symphony_smoe"))
    model.processor = processor
    return model.eval()
