"""Corruption while training: which pictures, how, and that workers, batches and epochs do not matter beyond that."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import DataConfig, Recipe
from symphony_vlm.corruptions import COMMON
from symphony_vlm.data.augmentation import Augmentation
from symphony_vlm.data.collator import ConversationDataset
from symphony_vlm.data.conversation import EncodedConversation
from symphony_vlm.data.sample import ImageRef, Message, Sample, TextPart
from symphony_vlm.errors import InputError


def _ref(number: int) -> ImageRef:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return ImageRef(data=file.getvalue(), name=str(number))


REFS = [_ref(number) for number in range(40)]
SAMPLES = [
    Sample(id=ref.name, origin="", images=(ref,), messages=(Message(role="user", parts=(TextPart(text="?"),)),))
    for ref in REFS
]


def _augmentation(**changes: Any) -> Augmentation:
    settings: dict[str, Any] = {"corruptions": ("gaussian_noise", "contrast"), "severities": (1, 2, 3)}
    return Augmentation(**{**settings, "probability": 0.5, "seed": 3, **changes})


def _dataset(augment: Augmentation | None) -> ConversationDataset:
    return ConversationDataset(
        SAMPLES,
        encode=lambda sample: EncodedConversation(input_ids=[1], labels=[1], image_order=(0,)),
        to_square=np.asarray,
        augment=augment,
    )


def _pixels(dataset: ConversationDataset, workers: int = 0) -> list[bytes]:
    loader: Any = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=list)
    return [item["images"][0].tobytes() for batch in loader for item in batch]


def test_a_share_of_the_pictures_is_corrupted_and_each_epoch_another() -> None:
    clean = _pixels(_dataset(None))
    augmentation = _augmentation()
    dataset = _dataset(augmentation)
    epochs = []
    for epoch in range(3):
        augmentation.set_epoch(epoch)
        epochs.append(_pixels(dataset))
    changed = [sum(a != b for a, b in zip(clean, pixels, strict=True)) for pixels in epochs]
    # 120 draws of one half: within four standard errors, 4 * sqrt(120) / 2.
    assert abs(sum(changed) - 60) <= 22
    assert len({tuple(pixels) for pixels in epochs}) == 3
    augmentation.set_epoch(1)
    assert _pixels(dataset) == epochs[1], "an epoch can be had again"


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_the_order_do_not_matter(workers: int) -> None:
    augmentation = _augmentation()
    augmentation.set_epoch(5)
    expected = [np.asarray(augmentation(ref, Image.open(io.BytesIO(ref.data or b"")))).tobytes() for ref in REFS[::-1]]
    assert _pixels(_dataset(augmentation), workers) == expected[::-1]


def test_the_same_picture_at_another_place_is_corrupted_alike(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.png"
    path.write_bytes(REFS[0].data or b"")
    image = Image.open(path).convert("RGB")
    augmentation = _augmentation(probability=1.0)
    here, there = augmentation(REFS[0], image), augmentation(ImageRef(path=path, name="x"), image)
    assert here.tobytes() == there.tobytes() != image.tobytes()
    assert _augmentation(probability=1.0, seed=4)(REFS[0], image).tobytes() != here.tobytes()


def test_all_names_and_severities_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def note(pixels: np.ndarray, name: str, severity: int, rng: object) -> np.ndarray:
        seen.add((name, severity))
        return pixels

    monkeypatch.setattr("symphony_vlm.data.augmentation.corrupt", note)
    augmentation = _augmentation(probability=1.0)
    for ref in REFS:
        augmentation(ref, Image.new("RGB", (2, 2)))
    assert seen == {(name, severity) for name in ("gaussian_noise", "contrast") for severity in (1, 2, 3)}


def _recipe(augmentation: Any, **stage: Any) -> Recipe:
    values = load_recipe("tiny").model_dump(mode="json")
    values["data"]["augmentation"] = augmentation
    values["stages"][-1] |= stage
    return Recipe.model_validate(values)


def test_settings_have_defaults_and_take_groups() -> None:
    found = _recipe({"corruptions": "common"}).data.augmentation
    assert found is not None
    assert (found.corruptions, found.severities, found.probability) == (["common"], [1, 2, 3], 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "corruptions"),
        ({"corruptions": []}, "corruptions"),
        ({"corruptions": ["fog"], "severities": [0]}, "greater than or equal to 1"),
        ({"corruptions": ["fog"], "severities": []}, "severities"),
        ({"corruptions": ["fog"], "probability": 0}, "greater than 0"),
        ({"corruptions": ["fog"], "probability": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"augmentation": settings})


def test_unknown_names_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(InputError, match="'fogg'; did you mean 'fog'"):
        load_recipe("tiny", ["data.augmentation.corruptions=[fogg]"])
    with pytest.raises(InputError, match="names no corruption"):
        load_recipe("tiny", ["data.augmentation.corruptions=none"])


def test_a_cache_of_features_is_refused() -> None:
    with pytest.raises(ValidationError, match="cache_features' of stage 'instruct' encodes it once"):
        _recipe({"corruptions": ["fog"]}, cache_features=True, train={"language_model": 1e-3})


def test_frost_without_textures_is_refused_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from symphony_vlm.training.parts import new_augmentation

    monkeypatch.setenv("SYMPHONY_VLM_FROST_DIR", str(tmp_path))
    with pytest.raises(InputError, match="frost1"):
        new_augmentation(_recipe({"corruptions": "common"}))
    monkeypatch.undo()
    monkeypatch.setattr("symphony_vlm.training.parts.find_frost_textures", lambda: ())
    found = new_augmentation(_recipe({"corruptions": "common", "severities": [2]}))
    assert found == Augmentation(corruptions=COMMON, severities=(2,), probability=0.5, seed=load_recipe("tiny").seed)
    assert new_augmentation(load_recipe("tiny")) is None
