"""Reading recipes: every packaged file, every form of override, and messages that name the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from symphony_vlm.config.loading import apply_overrides, config_folder, list_recipes, load_recipe
from symphony_vlm.config.recipe import SourceConfig
from symphony_vlm.errors import InputError

REPOSITORY = Path(__file__).parents[2]
YAML_FILES = sorted(
    path.relative_to(config_folder())
    for path in config_folder().rglob("*.y*ml")
    if path.parent.name not in ("data", "models")  # test_prepared.py, test_models.py
)


@pytest.mark.parametrize("file", YAML_FILES, ids=str)
def test_every_yaml_file_in_the_configuration_folder_is_a_valid_recipe(file: Path) -> None:
    assert file.parts[0] == "recipes", f"{file}: a new kind of file needs its own check here"
    recipe = load_recipe(str(config_folder() / file))
    assert recipe.name == file.stem
    assert recipe.description


def test_the_listed_recipes_are_the_files_and_contain_the_promised_ones() -> None:
    assert list_recipes() == sorted(path.stem for path in YAML_FILES if path.parts[0] == "recipes")
    assert {"quickstart", "tiny"} <= set(list_recipes())


def test_the_configuration_folder_is_the_repositorys_in_a_checkout() -> None:
    assert config_folder() == REPOSITORY / "configs"


def test_a_recipe_is_the_same_by_name_and_by_path() -> None:
    assert load_recipe("tiny") == load_recipe(str(config_folder() / "recipes" / "tiny.yaml"))


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("sed=1", "seed"),
        ("modle.template=plain", "model"),
        ("model.templat=plain", "template"),
        ("model.vision.feature_laier=1", "feature_layer"),
        ("model.language.vocabsize=500", "vocab_size"),
        ("model.moe.strenght=0.1", "strength"),
        ("data.vlidation_fraction=0.1", "validation_fraction"),
        ("data.scenes.trian=4", "train"),
        ("stages.instruct.epoch=2", "epochs"),
        ("stages.3.epoch=2", "epochs"),
        ("stages.instrct.epochs=2", "instruct"),
        ("stages.instruct.train.projectr=1e-3", "projector"),
        ("stages.instruct.template=plian", "plain"),
        ("model.template=tokeniser", "tokenizer"),
        ("model.template=vicuna", "vicuna_v1"),
        ("evaluation.limits=3", "limit"),
        ("evaluation.corruptions=[fgo]", "fog"),
    ],
)
def test_an_unknown_key_or_name_at_any_level_names_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe("tiny", [override])
    assert f"did you mean {nearest!r}?" in str(error.value)
    assert "?." not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest_and_lists_all() -> None:
    with pytest.raises(InputError, match="did you mean 'quickstart'") as error:
        load_recipe("quikstart")
    assert error.value.remedy is not None
    assert all(name in error.value.remedy for name in list_recipes())


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001", "+1e-3"])
def test_every_way_to_write_a_number_is_a_number(text: str) -> None:
    """YAML 1.1 takes ``1e-3`` for a text."""
    overrides = [
        f"stages.language.learning_rate={text}",
        f"stages.instruct.train={{projector: {text}}}",
        f"model.moe.z_loss_weight={text}",
        f"stages.pretrain.train.projector={text}",
    ]
    recipe = load_recipe("tiny", overrides)
    assert recipe.stages[1].learning_rate == 1e-3
    assert recipe.stages[2].train == recipe.stages[3].train == {"projector": 1e-3}
    assert recipe.model.moe is not None and recipe.model.moe["z_loss_weight"] == 1e-3


def test_numbers_in_a_file_follow_the_same_rule(tmp_path: Path) -> None:
    values = load_recipe("tiny").model_dump(mode="json")
    values["model"]["moe"] = {"num_experts": 4, "z_loss_weight": "@"}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values).replace("'@'", "1e-3"))
    moe = load_recipe(str(file)).model.moe
    assert moe == {"num_experts": 4, "z_loss_weight": 1e-3}


@pytest.mark.parametrize("text", ["2024-01.parquet", "1.5.json", "+name", "."])
def test_text_that_only_begins_like_a_number_stays_text(text: str) -> None:
    assert load_recipe("tiny", [f"data.train={text}"]).data.train == [SourceConfig(path=text)]


def test_overrides_reach_mappings_lists_stages_by_name_and_absent_sections() -> None:
    overrides = [
        "seed=5",
        "stages.0.max_steps=3",
        "stages.instruct.batch_size=2",
        "evaluation.limit=7",
        "data.captions=[a.json, b.json]",
        "model.moe={num_experts: 8}",
        "description=",
    ]
    recipe = load_recipe("tiny", overrides)
    assert recipe.seed == 5
    assert (recipe.stages[0].max_steps, recipe.stages[3].batch_size) == (3, 2)
    assert recipe.evaluation.limit == 7
    assert recipe.data.captions == [SourceConfig(path="a.json"), SourceConfig(path="b.json")]
    assert recipe.model.moe == {"num_experts": 8}
    assert recipe.description == ""


def test_a_later_override_wins_and_the_value_may_contain_an_equals_sign() -> None:
    recipe = load_recipe("tiny", ["seed=1", "seed=2", "description=a=b"])
    assert (recipe.seed, recipe.description) == (2, "a=b")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed", "an override has the form a.b=c"),
        ("=3", "an override has the form a.b=c"),
        ("seed=[1", "is not valid YAML"),
        ("name.first=x", "is inside a value that is no mapping"),
        ("stages.9.epochs=1", "is neither an index below 4 nor one of encoder, language, pretrain, instruct"),
        ("seed=many", "seed: Input should be a valid integer.*got 'many'"),
        ("data.on_bad_sample=skp", "data.on_bad_sample: Input should be 'error' or 'skip', got 'skp'"),
        ("model.moe.num_experts=four", "moe.num_experts: 'four' must be a whole number"),
        ("model.moe.num_experts=2.5", "moe.num_experts: 2.5 must be a whole number"),
        ("model.moe.strength=much", "moe.strength: 'much' must be a number"),
        ("model.moe.renormalize=1", "moe.renormalize: 1 must be true or false"),
        ("evaluation.severities=[7]", "evaluation.severities.0: .*less than or equal to 5, got 7"),
        ("model=", "model: "),
    ],
)
def test_a_bad_override_names_the_key_and_the_value_in_one_line(override: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as error:
        load_recipe("tiny", [override])
    assert "\n" not in str(error.value)


def test_overrides_are_applied_in_place_and_never_to_the_packaged_file() -> None:
    values: dict[str, Any] = {"a": {"b": 1}}
    apply_overrides(values, ["a.b=2", "a.c.d=[1, 2]"])
    assert values == {"a": {"b": 2, "c": {"d": [1, 2]}}}
    load_recipe("tiny", ["seed=77"])
    assert load_recipe("tiny").seed == 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("name: a", "model: Field required"),
        ("{name: a, model: {vision: {name: v}, language: {name: l}}, stages: []}", "stages: .*at least 1"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint) as error:
        load_recipe(str(file))
    assert error.value.where == str(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as error:
        load_recipe(str(tmp_path / "mine.yaml"))
    assert error.value.where == str(tmp_path / "mine.yaml")


def test_a_new_model_has_no_tokenizer_whose_chat_template_could_be_used() -> None:
    with pytest.raises(InputError, match="model.template: 'tokenizer' is the chat template of a pretrained model's"):
        load_recipe("tiny", ["model.template=tokenizer"])
    assert load_recipe("tiny", ["model.template=tokenizer", "model.start=runs/x"]).model.template == "tokenizer"
    assert load_recipe("tiny", ["model.template=auto"]).model.template == "auto"


@pytest.mark.parametrize("name", ["auto", "tokenizer"])
def test_a_stage_may_have_another_built_in_template_only(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' is not one of plain"):
        load_recipe("tiny", [f"stages.instruct.template={name}"])
