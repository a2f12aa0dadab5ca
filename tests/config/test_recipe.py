"""The recipe's schema refuses what cannot work, before anything is opened."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import LanguageConfig, Recipe, StageConfig, VisionSource


@pytest.fixture
def values() -> dict[str, Any]:
    """A valid recipe as plain values."""
    return copy.deepcopy(load_recipe("tiny").model_dump(mode="json"))


def test_a_recipe_survives_writing_and_reading(values: dict[str, Any]) -> None:
    assert Recipe.model_validate(values) == load_recipe("tiny")


def test_two_stages_of_one_name_are_refused(values: dict[str, Any]) -> None:
    values["stages"][1]["name"] = values["stages"][0]["name"]
    with pytest.raises(ValidationError, match="stage names must differ"):
        Recipe.model_validate(values)


def test_two_stages_that_upcycle_are_refused(values: dict[str, Any]) -> None:
    values["stages"][2]["upcycle"] = True
    with pytest.raises(ValidationError, match=r"only one stage can upcycle, got \['pretrain', 'instruct'\]"):
        Recipe.model_validate(values)


def test_upcycling_without_moe_settings_is_refused(values: dict[str, Any]) -> None:
    values["model"]["moe"] = None
    with pytest.raises(ValidationError, match=r"'instruct' upcycles but model.moe is not set"):
        Recipe.model_validate(values)


def test_a_recipe_without_stages_is_refused(values: dict[str, Any]) -> None:
    values["stages"] = []
    with pytest.raises(ValidationError, match="at least 1 item"):
        Recipe.model_validate(values)


def test_a_multimodal_stage_must_say_what_trains() -> None:
    with pytest.raises(ValidationError, match="a learning rate for each module"):
        StageConfig(name="a", kind="multimodal")


@pytest.mark.parametrize("kind", ["contrastive", "text"])
@pytest.mark.parametrize("settings", [{"train": {"projector": 1e-3}}, {"upcycle": True}])
def test_settings_of_multimodal_stages_are_refused_elsewhere(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="belongs? to multimodal stages"):
        StageConfig.model_validate({"name": "a", "kind": kind, **settings})


@pytest.mark.parametrize(
    "prefix", ["vision_tower", "projector", "language_model", "language_model.model.layers.0", "image_newline"]
)
def test_a_learning_rate_is_accepted_for_each_module_and_for_parts_of_it(prefix: str) -> None:
    assert StageConfig(name="a", kind="multimodal", train={prefix: 1e-3}).train == {prefix: 1e-3}


def test_a_learning_rate_for_no_module_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match=r"'projectr' is in none of the modules .*; did you mean 'projector'"):
        StageConfig(name="a", kind="multimodal", train={"projectr": 1e-3})


@pytest.mark.parametrize("schema", [VisionSource, LanguageConfig])
@pytest.mark.parametrize("both", [True, False])
def test_a_part_is_either_pretrained_or_new(schema: Any, both: bool) -> None:
    given = {"name": "a", "architecture": {"b": 1}} if both else {}
    with pytest.raises(ValidationError, match="give either 'name'"):
        schema(**given)


@pytest.mark.parametrize("name", ["", "Instruct", "1st", "a/b", "a-b", "../a"])
def test_a_stage_name_is_a_safe_folder_name(name: str) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        StageConfig(name=name, kind="text")


@pytest.mark.parametrize(
    ("data", "roles"), [("train", ["train"]), ("captions", ["captions"]), (["captions", "train"],) * 2]
)
def test_roles_are_a_list_however_they_were_given(data: Any, roles: list[str]) -> None:
    assert StageConfig(name="a", kind="text", data=data).roles == roles


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", -1.0),
        ("warmup_ratio", 1.0),
        ("weight_decay", -0.1),
        ("adam_beta2", 1.0),
        ("max_grad_norm", 0.0),
        ("max_length", 0),
        ("log_steps", 0),
        ("save_fraction", 0.0),
        ("save_fraction", 1.5),
        ("schedule", "cosin"),
        ("data", "validation"),
        ("kind", "vision"),
    ],
)
def test_a_stage_setting_out_of_range_is_refused_by_name(values: dict[str, Any], key: str, value: Any) -> None:
    values["stages"][1][key] = value
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate(values)
    assert error.value.errors()[0]["loc"][:3] == ("stages", 1, key)


def test_a_recipe_cannot_be_changed_afterwards() -> None:
    recipe = load_recipe("tiny")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": [2]}, r"'scales' must ascend from 1, got \[2\]"),
        ({"scales": []}, "'scales' must ascend from 1"),
        ({"scales": [1, 3, 3]}, "'scales' must ascend from 1"),
        ({"scales": [1, 9]}, "'scales' goes up to 8"),
        ({"scales": [1, 1.5]}, "scales"),
        ({"scales": [1, 3], "resize_mode": "anyres"}, "'scales' needs resize_mode pad, crop or stretch, not anyres"),
        ({"scales": [1, 3], "resize_mode": "encoder"}, "'scales' needs resize_mode pad, crop or stretch"),
        ({"resize_mode": "anyres", "feature_select": "cls_patch"}, "needs feature_select patch"),
        ({"grid_pinpoints": [[672, 336]]}, "'grid_pinpoints' belongs to resize_mode anyres, not pad"),
        ({"resize_mode": "anyres", "grid_pinpoints": []}, "'grid_pinpoints' is empty"),
        ({"resize_mode": "anyres", "grid_pinpoints": [[336]]}, "grid_pinpoints"),
        ({"resize_mode": "square"}, "'pad', 'crop', 'stretch', 'encoder' or 'anyres'"),
    ],
)
def test_views_of_an_image_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VisionSource.model_validate({"name": "ViT-L-14-336", **settings})


def test_the_preprocessing_of_an_encoder_needs_a_pretrained_one() -> None:
    assert VisionSource(name="ViT-L-14-336", resize_mode="encoder").resize_mode == "encoder"
    with pytest.raises(ValidationError, match="it needs 'name'"):
        VisionSource(architecture={"embed_dim": 8}, resize_mode="encoder")


@pytest.mark.parametrize("value", [0, 178_956_971])
def test_the_limit_on_pixels_is_not_above_pillows(values: dict[str, Any], value: int) -> None:
    values["data"]["max_pixels"] = value
    with pytest.raises(ValidationError, match="max_pixels"):
        Recipe.model_validate(values)
