"""The cache of a frozen tower: what it holds, what makes it invalid, and that training from it is the same training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.data.images import load_image
from symphony_vlm.data.sample import ImageRef, Message, Sample, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.training.features import encoder_key, fill_feature_cache
from symphony_vlm.training.run import train

QUIET = Console(quiet=True)


def picture(path: Path, seed: int) -> ImageRef:
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    return ImageRef(path=path, name=path.name)


def samples_of(*refs: ImageRef) -> list[Sample]:
    words = (Message(role="user", parts=(TextPart(text="what?"),)),)
    return [Sample(id=str(i), origin=f"record {i}", messages=words, images=(ref,)) for i, ref in enumerate(refs)]


@pytest.fixture
def refs(tmp_path: Path) -> list[ImageRef]:
    return [picture(tmp_path / f"{i}.png", seed=i) for i in range(5)]


def test_the_cache_holds_what_the_tower_says_of_each_picture_once(
    tiny_model: SymphonyVLMForConditionalGeneration, refs: list[ImageRef], tmp_path: Path
) -> None:
    """A copy under another name is the same picture; so are its bytes in a table."""
    copy = ImageRef(path=tmp_path / "copy.png", name="copy.png")
    assert refs[0].path is not None and copy.path is not None
    shutil.copyfile(refs[0].path, copy.path)
    inside = ImageRef(data=refs[1].path.read_bytes(), name="row 7") if refs[1].path else refs[1]
    tower, processor = tiny_model.vision_tower, tiny_model.processor.image_processor
    served = fill_feature_cache(tower, processor, [samples_of(*refs), samples_of(copy, inside)], tmp_path / "f", QUIET)
    for ref in (*refs, copy, inside):
        pixels = processor([load_image(ref)])["pixel_values"]
        with torch.no_grad():
            # Batches of other sizes take other matrix kernels.
            torch.testing.assert_close(served(ref)[0], tower(pixels), atol=1e-5, rtol=1e-5)
        assert served(ref)[1] == (20, 30)
    assert torch.equal(served(copy)[0], served(refs[0])[0])
    assert sum(len(torch_keys(path)) for path in (tmp_path / "f").rglob("*.safetensors")) == 5


def torch_keys(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt").get_tensor("keys_N")


def test_a_second_filling_encodes_only_what_is_new(
    tiny_model: SymphonyVLMForConditionalGeneration,
    refs: list[ImageRef],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower, processor = tiny_model.vision_tower, tiny_model.processor.image_processor
    fill_feature_cache(tower, processor, [samples_of(*refs[:3])], tmp_path / "f", QUIET)
    seen: list[int] = []
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda pixels: seen.append(len(pixels)) or forward(pixels))
    fill_feature_cache(tower, processor, [samples_of(*refs)], tmp_path / "f", QUIET)
    fill_feature_cache(tower, processor, [samples_of(*refs)], tmp_path / "f", QUIET)
    assert seen == [2]


CHANGES: dict[str, Callable[[SymphonyVLMForConditionalGeneration], None]] = {
    "a weight by its last bit": lambda m: _nudge(next(m.vision_tower.parameters())),
    "a buffer of statistics": lambda m: m.vision_tower.register_buffer("mean", torch.ones(1)),
    "the type of the weights": lambda m: m.vision_tower.to(torch.bfloat16) and None,
    "the mean colour": lambda m: setattr(m.processor.image_processor, "image_mean", [0.5, 0.5, 0.5]),
    "the resize mode": lambda m: setattr(m.processor.image_processor, "resize_mode", "stretch"),
}


@torch.no_grad()
def _nudge(parameter: torch.Tensor) -> None:
    first = parameter.view(-1)[:1]
    first.copy_(torch.nextafter(first, first + 1))


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_of_encoder_or_preparation_is_another_cache(
    what: str, tiny_model_factory: Callable[..., SymphonyVLMForConditionalGeneration]
) -> None:
    same, other = tiny_model_factory(), tiny_model_factory()
    keys = [encoder_key(m.vision_tower, m.processor.image_processor) for m in (same, other)]
    assert keys[0] == keys[1]
    CHANGES[what](other)
    assert encoder_key(other.vision_tower, other.processor.image_processor) != keys[0]


def test_a_broken_picture_is_named(
    tiny_model: SymphonyVLMForConditionalGeneration, refs: list[ImageRef], tmp_path: Path
) -> None:
    assert refs[2].path is not None
    refs[2].path.write_bytes(refs[2].path.read_bytes()[:60])
    processor = tiny_model.processor.image_processor
    with pytest.raises(InputError, match=r"2\.png"):
        fill_feature_cache(tiny_model.vision_tower, processor, [samples_of(*refs)], tmp_path / "f", QUIET)


def test_features_that_would_fill_the_disk_are_refused_before_they_are_computed(
    tiny_model: SymphonyVLMForConditionalGeneration,
    refs: list[ImageRef],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    processor = tiny_model.processor.image_processor
    with pytest.raises(InputError, match=r"5 pictures need about .* GiB are free.*data\.feature_cache"):
        fill_feature_cache(tiny_model.vision_tower, processor, [samples_of(*refs)], tmp_path / "f", QUIET)
    assert list((tmp_path / "f").rglob("*.safetensors")) == []


def train_tiny(output: Path, *overrides: str) -> list[dict[str, Any]]:
    """The log of a short run of the recipe ``tiny`` from its projector stage on."""
    stages = [
        "stages.0.max_steps=2",
        "stages.1.max_steps=2",
        "stages.pretrain.max_steps=4",
        "stages.instruct.max_steps=4",
    ]
    frozen = "stages.instruct.train={projector: 1.0e-3, language_model: 1.0e-3}"
    settings = ["data.scenes.train=24", "data.scenes.test=4", "data.validation_fraction=0.2", frozen, *stages]
    train(load_recipe("tiny", [*settings, *overrides]), output, console=QUIET)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] in ("pretrain", "instruct")]


CACHED = ["stages.pretrain.cache_features=true", "stages.instruct.cache_features=true"]


@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_training_from_the_cache_is_the_same_training(mode: str, tmp_path: Path) -> None:
    """Losses, validation losses and gradient norms of both multimodal stages, tiles included."""
    setting = f"model.vision.resize_mode={mode}"
    without = train_tiny(tmp_path / "without", setting)
    cached = train_tiny(tmp_path / "cached", setting, *CACHED)
    assert len(without) == len(cached) >= 6
    for plain, from_cache in zip(without, cached, strict=True):
        for name in ("loss", "eval_loss", "grad_norm", "cross_entropy"):
            # Features of batches of another size differ in the last bits, and a few steps carry that on.
            assert from_cache.get(name) == pytest.approx(plain.get(name), abs=2e-5)
    # One encoder, though the stages are two: the frozen tower's weights are its name.
    assert len(list((tmp_path / "cached" / "features").iterdir())) == 1
    assert not (tmp_path / "without" / "features").exists()


def test_with_the_cache_a_batch_without_images_passes_the_projector_but_not_the_tower(
    tiny_model: SymphonyVLMForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes are in the projector at that moment, and none of them in the tower."""
    called: list[str] = []
    for name in ("vision_tower", "projector"):
        getattr(tiny_model, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    monkeypatch.setattr(type(tiny_model), "_others_wait_for_vision", lambda self: True)
    tiny_model.vision_tower.requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    nothing = torch.empty(0, tiny_model.vision_tower.num_tokens, tiny_model.vision_tower.hidden_size)
    loss = tiny_model.train()(input_ids=ids, labels=ids, vision_features=nothing).loss
    loss.backward()
    assert called == ["projector"]
    assert all(p.grad is not None and not p.grad.any() for p in tiny_model.projector.parameters())
    torch.testing.assert_close(loss, tiny_model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_from_a_towers_output_is_generation_from_pixels(
    tiny_model: SymphonyVLMForConditionalGeneration, num_beams: int
) -> None:
    inputs = tiny_model.probe_inputs()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    expected = tiny_model.generate(**inputs, **settings)
    with torch.no_grad():
        features = tiny_model.vision_tower(inputs["pixel_values"])
    answer = tiny_model.generate(input_ids=inputs["input_ids"], vision_features=features, **settings)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize(
    "setting", ["stages.instruct.train={vision_tower: 1.0e-3}", "stages.instruct.train={vision_tower.visual: 1.0e-3}"]
)
def test_a_tower_that_trains_cannot_be_cached(setting: str) -> None:
    with pytest.raises(InputError, match="needs a multimodal stage in which the vision tower is frozen"):
        load_recipe("tiny", [setting, "stages.instruct.cache_features=true"])


def test_experts_in_the_tower_cannot_be_cached(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experts in the vision tower.*cache_features: false"):
        train_tiny(tmp_path / "run", *CACHED, "model.moe.modules=[vision]")
