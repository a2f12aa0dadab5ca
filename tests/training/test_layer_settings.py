"""Settings of how layers run: compiled, or with their activations given up, and how batches come to the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch._dynamo.utils import counters
from transformers import AutoConfig, CLIPVisionConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from symphony_vlm.config.recipe import Recipe
from symphony_vlm.config.stage import StageConfig
from symphony_vlm.errors import InputError
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.vision import VisionConfig, build_vision_tower
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.training.activation_checkpointing import checkpoint_layers_
from symphony_vlm.training.compilation import compile_layers_
from symphony_vlm.training.fitting import _loading
from symphony_vlm.training.profiling import parts_of
from symphony_vlm.training.run import train

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
IMAGE = 3


def build(moe: MoEConfig) -> Model:
    """The parts of ``symphony_4b`` and ``symphony_7b``, small: CLIP at two scales, Phi-3."""
    architecture = CLIPVisionConfig(image_size=16, patch_size=8, **SIZES).to_dict()
    vision = VisionConfig(backend="transformers", architecture=architecture, image_size=16, scales=(1, 2))
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = AutoConfig.for_model("phi3", vocab_size=32, num_key_value_heads=2, **SIZES, **tokens)
    num_tokens = build_vision_tower(vision).num_tokens
    config = SymphonyVLMConfig(
        vision_config=vision.to_dict(), text_config=text, image_token_id=IMAGE, num_image_tokens=num_tokens
    )
    torch.manual_seed(0)
    model = Model(config)
    model.upcycle_(moe)
    return model.train()


def step(model: Model, length: int) -> tuple[torch.Tensor, ...]:
    """Loss and gradients of two conversations, one of them padded, under autocast."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 32, (2, length), generator=generator)
    ids[:, 1 : 1 + model.config.num_image_tokens] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss
    loss.backward()
    return (loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize(
    ("moe", "graphs"),
    [
        # Of tower and language model one each.
        pytest.param(MoEConfig(router="symphony_smoe", modules=("projector",)), 2, id="symphony_4b"),
        # And of the layers with experts attention and norm.
        pytest.param(MoEConfig(router="symphony_smoe", layers="alternate"), 4, id="symphony_7b"),
    ],
)
def test_layers_are_compiled_once_and_whole_for_all_lengths(moe: MoEConfig, graphs: int) -> None:
    """With activation checkpointing and autocast; ``eager`` takes them apart and computes what stands there."""
    model, plain = build(moe), build(moe)
    for each in (model, plain):
        checkpoint_layers_(each, [""])
    torch._dynamo.reset()
    counters.clear()
    compile_layers_(model, torch.device("cpu"), backend="eager")
    for length in (14, 17, 21):
        observed, expected = step(model, length), step(plain, length)
        assert all(torch.equal(a, b) for a, b in zip(observed, expected, strict=True))
        assert counters["stats"]["unique_graphs"] == 1 + graphs, "and one of the trial of the compiler"
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_some_layers_of_some_parts_are_checkpointed() -> None:
    model = build(MoEConfig(modules=("projector",)))
    expected = step(model, 16)
    found: dict[str, list[bool]] = {}
    for parts, every in (([""], 1), (["language_model"], 2), (["vision_tower", "language_model"], 3)):
        checkpoint_layers_(model, parts, every=every)
        for name in ("vision_tower", "language_model"):
            layers = [m for m in model.get_submodule(name).modules() if isinstance(m, GradientCheckpointingLayer)]
            found[f"{parts}/{every}/{name}"] = [layer.gradient_checkpointing for layer in layers]
        assert all(torch.equal(a, b) for a, b in zip(step(model, 16), expected, strict=True))
    assert list(found.values()) == [
        [True] * 3,  # of four the last is not needed for the features of the one before
        [True] * 4,
        [False] * 3,
        [True, False, True, False],
        [True, False, False],
        [True, False, False, True],
    ]


def test_a_stage_checkpoints_a_part(only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    losses = []
    for number, value in enumerate((False, ["language_model"])):
        recipe = only_stage("instruct", max_steps=2, log_steps=1, gradient_checkpointing=value, checkpoint_every=2)
        train(recipe, tmp_path / str(number), console=quiet)
        log = [json.loads(line) for line in (tmp_path / str(number) / "log.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[0] == losses[1]
    with pytest.raises(InputError, match="vision_tower has no layers of transformers"):  # it is open_clip's
        train(only_stage("instruct", gradient_checkpointing=["vision_tower"]), tmp_path / "tower", console=quiet)


def test_parts_are_those_of_a_multimodal_stage() -> None:
    settings: dict[str, Any] = {"name": "a", "kind": "text", "gradient_checkpointing": ["language_model"]}
    with pytest.raises(ValidationError, match="belongs to multimodal stages"):
        StageConfig.model_validate(settings)
    settings |= {"kind": "multimodal", "train": {"projector": 1e-3}}
    assert StageConfig.model_validate(settings).checkpointed_parts == ["language_model"]
    with pytest.raises(ValidationError):
        StageConfig.model_validate({**settings, "gradient_checkpointing": ["projector"]})


def test_on_cuda_batches_come_ahead_of_time_from_pinned_memory() -> None:
    stage = StageConfig(name="a", kind="text", dataloader_workers=2)
    assert _loading(stage, cuda=False, augments=False) == {
        "dataloader_num_workers": 2,
        "dataloader_pin_memory": False,
    }
    found = _loading(stage, cuda=True, augments=False)
    assert found["dataloader_pin_memory"] and found["accelerator_config"] == {"non_blocking": True}
    assert found["dataloader_persistent_workers"] and found["dataloader_prefetch_factor"] > 1
    # Augmentation draws by the epoch, which the main process tells the workers that it starts.
    assert not _loading(stage, cuda=True, augments=True)["dataloader_persistent_workers"]
    # PyTorch refuses both where there is no worker.
    alone = _loading(stage.model_copy(update={"dataloader_workers": 0}), cuda=True, augments=False)
    assert not {"dataloader_persistent_workers", "dataloader_prefetch_factor"} & alone.keys()


def test_a_profile_tells_parts_apart_and_leaves_compiled_layers_whole() -> None:
    model = build(MoEConfig(layers="alternate"))
    found = set(parts_of(model).values())
    assert found == {
        "model, rest", "vision tower", "projector", "language model, rest", "language attention", "experts", "routers",
        "language feed-forward", "head and loss",
    }  # fmt: skip
    compile_layers_(model, torch.device("cpu"), backend="eager")
    assert set(parts_of(model).values()) == found - {"language attention", "language feed-forward"}
