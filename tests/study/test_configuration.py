"""The files of studies: what they must have, and that those in the repository do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_cells import picture_study

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import PRESETS, MoEConfig
from symphony_vlm.study.configuration import Study, load_study
from symphony_vlm.study.picture_recipes import arm_recipe, start_recipe

STUDIES = Path(__file__).parents[2] / "studies"
TEXTS = ["texts.wikitext2.path=a.txt", "texts.movie_reviews.path=b.txt"]
GIVEN = {
    "wikitext2_tiny": TEXTS,
    "wikitext2_arms": TEXTS[:1],
    "wikitext2_factors": TEXTS[:1],
    "scenes_arms": [],
    "scenes_small": [],
    "cifar10_arms": ["pictures.train=a.parquet", "pictures.test=b.parquet"],
    "mixed_arms": ["pictures.train=a.json", "pictures.test=b.json", "pictures.image_folder=images"],
}
CONTROLS = {"uniform", "random", "shuffled"}


def study_of(name: str) -> Study:
    return load_study(str(STUDIES / f"{name}.yaml"), GIVEN[name])


def recipe_of(study: Study, arm: str) -> Recipe:
    if study.is_language:
        return load_recipe(study.recipe, [*study.settings, *study.arms[arm].settings])
    return arm_recipe(study, arm, 0, None)


def moe_of(recipe: Recipe) -> MoEConfig | None:
    sparse = recipe.is_language or any(stage.upcycle for stage in recipe.stages)
    return MoEConfig.from_dict(recipe.model.moe) if recipe.model.moe is not None and sparse else None


def test_every_file_is_known_here() -> None:
    assert {path.stem for path in STUDIES.glob("*.yaml")} == set(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_every_arm_of_every_file_has_a_valid_recipe(name: str) -> None:
    study = study_of(name)
    for arm in study.arms:
        moe = moe_of(recipe_of(study, arm))
        graph = "none" if moe is None else moe.expert_graph
        assert study.arms[arm].control == (graph in CONTROLS), arm
    if name != "scenes_small":
        assert len(study.seeds) == 5


def test_the_study_of_presets_has_each_with_its_plain_router() -> None:
    study = study_of("wikitext2_tiny")
    routers = {arm: moe.router for arm in study.arms if (moe := moe_of(recipe_of(study, arm))) is not None}
    assert routers == {name: name for name in PRESETS}
    assert all(arm.baseline in (None, "smoe", "xmoe", "glam") for arm in study.arms.values())


@pytest.mark.parametrize("name", ["wikitext2_arms", "scenes_arms", "cifar10_arms"])
def test_tables_of_arms_have_every_router_dense_models_and_every_control(name: str) -> None:
    study = study_of(name)
    moe = {arm: moe_of(recipe_of(study, arm)) for arm in study.arms}
    assert {m.router for m in moe.values() if m is not None} == set(PRESETS)
    assert {m.expert_graph for m in moe.values() if m is not None} == {"none", "symphony", "learnable", *CONTROLS}
    assert any(m is None for m in moe.values())
    # A graph's arm and its baseline differ in the graph alone: the same gate, experts and losses.
    for arm, own in moe.items():
        baseline = study.arms[arm].baseline
        if own is not None and own.expert_graph != "none" and baseline is not None:
            plain = moe[baseline]
            assert plain is not None and plain.expert_graph == "none"
            same = ("num_experts", "num_experts_per_tok", "gate", "layers", "balance_loss_weight")
            assert [getattr(own, key) for key in same] == [getattr(plain, key) for key in same], arm


def test_dense_arms_have_as_many_active_feed_forward_values_as_two_experts() -> None:
    language = study_of("wikitext2_arms")
    sparse, dense = (recipe_of(language, arm).model.language.architecture for arm in ("smoe", "dense"))
    assert sparse is not None and dense is not None and dense["n_inner"] == 2 * sparse["n_inner"]
    for name in ("scenes_arms", "cifar10_arms"):
        moe = moe_of(recipe_of(study_of(name), "dense"))
        assert moe is not None and moe.num_experts == moe.num_experts_per_tok == 2
        assert moe_of(recipe_of(study_of(name), "dense_half")) is None


def test_the_table_of_all_arms_can_take_over_the_cells_of_the_presets() -> None:
    """The same commands, so that the second study with the same --output runs only what is new."""
    presets, arms = study_of("wikitext2_tiny"), study_of("wikitext2_arms")
    assert (presets.settings, presets.recipe, presets.perplexity) == (arms.settings, arms.recipe, arms.perplexity)
    for name, arm in presets.arms.items():
        assert arms.arms[name].settings == arm.settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seedz=[1]", "did you mean 'seeds'"),
        ("seeds=[1,1]", "seeds must differ"),
        ("arms.symphony_smoe.baseline=smo", "did you mean 'smoe'"),
        ("arms.symphony_smoe.controls=[smoe]", "controls: 'smoe' is no other arm with 'control: true'"),
        ("perplexity.rates=[2]", "less than or equal to 1"),
        ("texts.wikitext2.path=null", "texts.wikitext2.path: the text has no path"),
        ("perplexity=null", "a study has 'texts' and 'perplexity', or 'pictures' and 'evaluation'"),
        ("pictures={task: scenes, scenes: {train: 9, test: 9}}", "'texts' and 'perplexity', or 'pictures'"),
        ("select={choices: {best: {among: [smoe]}}}", "has one text"),
    ],
)
def test_a_wrong_study_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_study(str(STUDIES / "wikitext2_tiny.yaml"), [*TEXTS, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.choices.best_smoe.among=[smo]", "did you mean 'smoe'"),
        ("select.choices.best_symphony.baseline=best_smo", "did you mean 'best_smoe'"),
        ("select.choices.logits={among: [smoe]}", "'logits' is an arm"),
    ],
)
def test_a_wrong_choice_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_study(str(STUDIES / "wikitext2_factors.yaml"), [*TEXTS[:1], override])


def test_pictures_need_their_files_and_no_others() -> None:
    path = str(STUDIES / "cifar10_arms.yaml")
    with pytest.raises(InputError, match=r"pictures\.test: the pictures have no path"):
        load_study(path, ["pictures.train=a.parquet"])
    with pytest.raises(InputError, match=r"pictures\.development"):
        load_study(path, [*GIVEN["cifar10_arms"], "select={choices: {best: {among: [smoe]}}}"])
    with pytest.raises(InputError, match="'scenes' are drawn"):
        load_study(str(STUDIES / "scenes_arms.yaml"), ["pictures.test=a.json"])


# Recipes with a shared start.


def test_shared_stages_and_an_arms_own_are_the_recipes_together() -> None:
    study = picture_study()
    start = start_recipe(study, 3)
    own = arm_recipe(study, "symphony", 3, "start/model")
    assert start is not None
    assert [stage.name for stage in start.stages] == ["encoder", "language", "pretrain"]
    assert [stage.name for stage in own.stages] == ["instruct"]
    assert own.model.start == "start/model" and own.seed == start.seed == 3
    assert own.model.moe is not None and own.model.moe["router"] == "symphony_smoe"


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("stages.language.max_steps=7", "the stages before"),
        ("data.validation_fraction=0.3", "data"),
        ("model.language.vocab_size=500", "model"),
    ],
)
def test_an_arm_that_would_need_another_start_is_refused(setting: str, what: str) -> None:
    study = picture_study(arms={"smoe": [], "other": [setting]})
    with pytest.raises(InputError, match=f"change {what}"):
        arm_recipe(study, "other", 0, "start")


def test_a_recipe_must_end_in_a_stage_that_upcycles_after_a_multimodal_one() -> None:
    with pytest.raises(InputError, match="no stage upcycles"):
        start_recipe(picture_study(settings=["stages.instruct.upcycle=false"]), 0)
    with pytest.raises(InputError, match="stage 'language'"):
        start_recipe(picture_study(recipe="cifar10_vqa"), 0)
