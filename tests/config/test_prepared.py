"""Prepared data: every file is valid, a recipe takes it by name, and documents say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.prepared import list_prepared, load_prepared
from symphony_vlm.config.reading import config_folder
from symphony_vlm.errors import InputError

TRAINING = ["allava", "llava_558k", "llava_mix665k"]
DOCUMENT = Path(__file__).parents[2] / "docs" / "training-data.md"


@pytest.mark.parametrize("name", list_prepared())
def test_every_prepared_file_is_valid_and_named_like_its_file(name: str) -> None:
    prepared = load_prepared(name)
    assert prepared.name == name
    assert (prepared.purpose == "training") == (name in TRAINING)
    if prepared.data is not None:
        sources = [*(prepared.data.train or []), *(prepared.data.captions or [])]
        assert {Path(source.path).name for source in sources} == set(prepared.records)
    else:
        assert prepared.evaluation is not None
        assert prepared.evaluation.path in prepared.homepage
        assert list(prepared.records) == [prepared.evaluation.split]


def test_the_promised_sets_are_there() -> None:
    assert {*TRAINING, "pope", "gqa", "scienceqa", "textvqa"} <= set(list_prepared())


def test_the_document_lists_every_set_with_its_size_and_licence() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", DOCUMENT.read_text(), flags=re.MULTILINE)
    listed = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows if name in list_prepared()}
    assert set(listed) == set(list_prepared())
    for name, cells in listed.items():
        prepared = load_prepared(name)
        assert cells[-2:] == [prepared.size, prepared.licence]


def test_a_recipe_takes_prepared_data_by_name_and_keeps_its_other_settings() -> None:
    recipe = load_recipe("instruct_small", ["data=llava_558k", "data.train=x.json", "data.image_folder=pictures"])
    assert recipe.data.captions is not None
    assert recipe.data.captions[0].path == "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    assert recipe.data.image_folder == "pictures"
    assert recipe.data.validation_fraction == 0.05
    assert load_recipe("tiny", ["data=allava"]).data.scenes is None


def test_two_sets_together_keep_an_image_folder_each(tmp_path: Path) -> None:
    values = yaml.safe_load((config_folder() / "recipes" / "instruct_small.yaml").read_text())
    values["data"] = ["llava_558k", "llava_mix665k"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    data = load_recipe(str(path), ["data.captions.0.weight=0.5"]).data
    assert data.captions is not None
    assert data.train is not None
    assert (data.captions[0].image_folder, data.captions[0].weight) == ("data/LLaVA-Pretrain/images", 0.5)
    assert (data.train[0].image_folder, data.image_folder) == ("data", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=llava_mix66k", "did you mean 'llava_mix665k'"),
        ("data=pope", "pope is an evaluation set"),
        ("data=[allava, llava_558k]", "gives data.captions"),
    ],
)
def test_a_wrong_choice_is_explained(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("instruct_small", [override])


def test_an_unknown_key_of_a_source_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'weight'"):
        load_recipe("tiny", ["data.train=[{path: a.json, wieght: 2}]"])


def test_the_same_file_twice_is_told_to_take_a_weight() -> None:
    with pytest.raises(InputError, match="give it weight: 2"):
        load_recipe("tiny", ["data.train=[a.json, {path: a.json, weight: 3}]"])
