"""A recipe with a base is the base with differences, and a twin differs in its router alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from symphony_vlm.config.loading import config_folder, list_recipes, load_moe_settings, load_recipe
from symphony_vlm.config.recipe import SourceConfig
from symphony_vlm.errors import InputError

TWINS = {
    "symphony_4b_smoe": "symphony_4b",
    "symphony_7b_smoe": "symphony_7b",
    **{f"{name}_symphony": name for name in list_recipes() if f"{name}_symphony" in list_recipes()},
}


def write(folder: Path, name: str, **values: Any) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name} | values))
    return str(file)


def differences(first: Any, second: Any, path: str = "") -> set[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = {*first, *second}
        return {d for key in keys for d in differences(first.get(key), second.get(key), f"{path}.{key}".strip("."))}
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return {d for i, pair in enumerate(zip(first, second, strict=True)) for d in differences(*pair, f"{path}.{i}")}
    return set() if first == second else {path}


@pytest.mark.parametrize(("twin", "name"), TWINS.items())
def test_twins_differ_in_name_description_and_router_and_nothing_else(twin: str, name: str) -> None:
    first, second = (load_recipe(each).model_dump() for each in (name, twin))
    assert differences(first, second) == {"name", "description", "model.moe.router"}
    assert {first["model"]["moe"]["router"], second["model"]["moe"]["router"]} == {"smoe", "symphony_smoe"}


def test_every_sparse_recipe_of_pretrained_parts_has_a_twin() -> None:
    sparse = {name for name in list_recipes() if (m := load_recipe(name).model).moe and m.language.name}
    assert sparse == {*TWINS, *TWINS.values()}


def test_mappings_are_merged_stages_by_name_and_everything_else_is_replaced(tmp_path: Path) -> None:
    stages = [{"name": "pretrain", "train": {"language_model": 1e-4}}, {"name": "encoder", "max_steps": 2}]
    file = write(
        tmp_path,
        "mine",
        base="tiny",
        model={"vision": {"scales": [1, 2]}, "moe": {"num_experts": 8}},
        data={"captions": "a.json", "validation_fraction": 0.2},
        stages=stages,
    )
    base, mine = load_recipe("tiny"), load_recipe(file)
    assert mine.model.moe == {**(base.model.moe or {}), "num_experts": 8}
    assert mine.model.vision == base.model.vision.model_copy(update={"scales": [1, 2]})
    assert mine.data.captions == [SourceConfig(path="a.json")]
    assert (mine.data.scenes, mine.data.validation_fraction) == (base.data.scenes, 0.2)
    assert [stage.name for stage in mine.stages] == [stage.name for stage in base.stages]
    assert mine.stages[0] == base.stages[0].model_copy(update={"max_steps": 2})
    assert mine.stages[2].train == {"projector": 1e-3, "language_model": 1e-4}
    assert (mine.stages[1], mine.stages[3]) == (base.stages[1], base.stages[3])
    assert mine.description == base.description


def test_overrides_come_after_the_bases_and_experts_settings_are_found_through_them(tmp_path: Path) -> None:
    file = write(tmp_path, "mine", base="tiny", seed=3)
    assert load_recipe(file, ["stages.instruct.epochs=2", "seed=4"]).seed == 4
    assert load_moe_settings(file, ["model.moe.num_experts=8"]).num_experts == 8


def test_a_base_may_be_a_file_beside_it_and_have_a_base_itself(tmp_path: Path) -> None:
    write(tmp_path, "first", base="tiny", seed=7)
    assert load_recipe(write(tmp_path, "second", base="first.yaml", description="b")).seed == 7


def test_prepared_data_by_name_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    data = load_recipe(write(tmp_path, "mine", base="instruct_small", data="llava_558k")).data
    assert data.captions is not None and data.captions[0].path.endswith("blip_laion_cc_sbu_558k.json")
    assert data.validation_fraction == 0.05, "what does not say where data is stays"
    assert load_recipe(write(tmp_path, "mine", base="tiny", data=["llava_558k", "llava_mix665k"])).data.scenes is None


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"base": "tinny"}, "no recipe of that name; did you mean 'tiny'"),
        ({"base": "nothing.yaml"}, "nothing.yaml: no such file"),
        ({"base": ["tiny"]}, r"base: \['tiny'\] is no recipe's name"),
        (
            {"base": "tiny", "stages": [{"name": "instrct"}]},
            "stage 'instrct' is none of the base's: .*did you mean 'instruct'",
        ),
        ({"base": "tiny", "stages": [{"epochs": 1}]}, "stage 'None' is none of the base's"),
        ({"base": "tiny", "modle": {}}, "unknown key 'modle'; did you mean 'model'"),
        ({"base": "tiny", "stages": "all"}, "stages: Input should be a valid list"),
    ],
)
def test_a_bad_base_or_stage_is_explained(tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load_recipe(write(tmp_path, "mine", **values))


def test_a_circle_is_refused_with_its_steps(tmp_path: Path) -> None:
    first = write(tmp_path, "first", base="second.yaml")
    write(tmp_path, "second", base="third.yaml")
    write(tmp_path, "third", base="second.yaml")
    with pytest.raises(InputError, match="second -> third -> second goes round in a circle"):
        load_recipe(first)
    with pytest.raises(InputError, match="own -> own goes round"):
        load_recipe(write(tmp_path, "own", base="own.yaml"))


def test_a_recipe_with_a_base_needs_its_own_name(tmp_path: Path) -> None:
    """Two recipes of one name would share a run's folder."""
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny\n")
    with pytest.raises(InputError, match="needs a name of its own"):
        load_recipe(str(file))


def test_base_is_not_left_in_what_a_run_records() -> None:
    assert "base" not in load_recipe("symphony_4b").model_dump()
    assert (config_folder() / "recipes" / "symphony_4b.yaml").read_text().count("base:") == 1
