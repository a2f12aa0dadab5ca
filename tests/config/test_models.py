"""What is known offline of pretrained parts: every file is valid, and every recipe's parts are among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from symphony_vlm.config import models
from symphony_vlm.config.loading import list_recipes, load_recipe
from symphony_vlm.config.models import known_model, list_known_models, load_known_model
from symphony_vlm.config.prepared import load_prepared
from symphony_vlm.config.recipe import SourceConfig
from symphony_vlm.errors import InputError

HUB_RECIPES = [name for name in list_recipes() if load_recipe(name).model.language.name is not None]


@pytest.mark.parametrize("name", list_known_models())
def test_every_entry_is_valid_and_named_like_its_file(name: str) -> None:
    known = load_known_model(name)
    assert known.name == name
    assert "model_type" in known.architecture
    assert "vocab_size" in known.architecture or known.kind == "vision"
    assert known_model(known.hub_id, known.kind, "x") == known


def test_no_hub_id_has_two_entries() -> None:
    ids = [load_known_model(name).hub_id for name in list_known_models()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", HUB_RECIPES)
def test_the_parts_of_every_recipe_are_known(name: str) -> None:
    model = load_recipe(name).model
    assert model.vision.name is not None and model.language.name is not None
    assert model.vision.backend == "transformers"
    known_model(model.vision.name, "vision", "x")
    known_model(model.language.name, "language", "x")


def test_an_unknown_part_names_the_nearest_and_the_remedy() -> None:
    with pytest.raises(
        InputError, match=r"model.language.name: the architecture of 'microsoft/phi-3' .* did you mean"
    ) as error:
        known_model("microsoft/phi-3", "language", "model.language.name")
    assert error.value.remedy is not None and "lmsys/vicuna-7b-v1.5" in error.value.remedy
    assert "siglip" not in error.value.remedy


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"licence": None}, "licence: Input should be a valid string"),
        ({"tokenizer_size": None}, "have 'tokenizer_size' and 'has_pad_token'"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "vision towers 'image_mean'"),
        ({"kind": "vision"}, "vision towers 'image_mean'"),
        ({"architektur": {}}, "unknown key 'architektur'; did you mean 'architecture'"),
    ],
)
def test_a_bad_entry_is_refused_by_name(
    change: dict[str, object], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((models.config_folder() / "models" / "phi_2.yaml").read_text()) | change
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "phi_2.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(models, "config_folder", lambda: tmp_path)
    with pytest.raises(InputError, match=complaint) as error:
        load_known_model("phi_2")
    assert str(error.value.where).endswith("phi_2.yaml")


@pytest.mark.parametrize("name", [name for name in HUB_RECIPES if not name.startswith("moe_llava")])
def test_the_data_of_published_recipes_is_that_of_the_prepared_sets(name: str) -> None:
    """MoE-LLaVA's files are its own; the others name the files of ``configs/data`` where those say they are."""
    data = load_recipe(name).data
    prepared = {set_: load_prepared(set_).data for set_ in ("llava_558k", "llava_mix665k", "allava")}
    places = {
        source.path: found.image_folder
        for found in prepared.values()
        if found is not None
        for source in [*(found.train or []), *(found.captions or [])]
    }
    sources: list[SourceConfig] = [*(data.train or []), *(data.captions or []), *(data.prefinetune or [])]
    assert len(sources) >= 2
    for source in sources:
        assert source.image_folder == places[source.path]
