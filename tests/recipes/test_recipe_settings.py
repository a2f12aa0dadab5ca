"""What the published recipes need of a stage: random weights, fp32 where it trains, its own crop, its own data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer

import symphony_vlm
from symphony_vlm.config import models
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.models import list_known_models, load_known_model
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.training.parameter_counts import count_recipe
from symphony_vlm.training.parts import keep_precision_
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import freeze_except


def stages_of(recipe: Recipe, *names: str) -> Recipe:
    """The recipe with some of its stages."""
    return recipe.model_copy(update={"stages": [stage for stage in recipe.stages if stage.name in names]})


# Random weights.


@pytest.fixture
def tiny_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shrink: Callable[..., dict[str, Any]]) -> None:
    """The known parts with next to no width, so that their architectures can be built for real."""
    folder = tmp_path / "configs" / "models"
    folder.mkdir(parents=True)
    for known in map(load_known_model, list_known_models()):
        values = known.model_dump(mode="json", exclude_none=True)
        values["architecture"] = shrink(known.architecture)
        if known.kind == "language":
            values["architecture"]["vocab_size"] = 450
        (folder / f"{known.name}.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(models, "config_folder", lambda: tmp_path / "configs")


def test_random_weights_need_no_download_and_keep_the_models_vocabulary(
    tiny_catalogue: None, in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """Names stay those of the hub, which tests cannot reach."""
    values = in_small("symphony_7b").model_dump(mode="json")
    values["model"] = load_recipe("symphony_7b", ["model.random_weights=true"]).model_dump(mode="json")["model"]
    recipe = Recipe.model_validate(values)
    train(recipe, tmp_path / "run", console=quiet)
    model = symphony_vlm.load(tmp_path / "run", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert model.get_input_embeddings().weight.shape[0] == 450 >= len(tokenizer)
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id, "the template's own end of an answer"
    built = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    assert {name: count.total for name, count in count_recipe(recipe).modules.items()} == built
    tower = model.vision_tower.config
    assert tower.image_mean == load_known_model("clip_l14_336").image_mean


def test_random_weights_of_an_unknown_part_are_refused_by_name(
    in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    values = in_small("llava_1_5_7b").model_dump(mode="json")
    values["model"] |= {"random_weights": True}
    values["model"]["language"]["name"] = "some/model"
    with pytest.raises(InputError, match="model.language.name: the architecture of 'some/model' is not known offline"):
        train(Recipe.model_validate(values), tmp_path / "run", console=quiet)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["model.start=runs/x"], "'random_weights' makes new parts and 'start' is a saved model"),
        (["model.vision.resize_mode=encoder"], "'resize_mode: encoder' is in them"),
        (["model.template=tokenizer"], "this model is new"),
    ],
)
def test_what_random_weights_exclude(overrides: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load_recipe("llava_1_5_7b", ["model.random_weights=true", "stages.pretrain.resize_mode=null", *overrides])


# Precision.


def test_what_trains_is_fp32_and_what_is_frozen_stays_where_autocast_joins_it() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}).to(torch.bfloat16)
    freeze_except(model, {"b": 1.0})
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    keep_precision_(model, bf16=True)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {
        "a.weight": torch.bfloat16,
        "a.bias": torch.bfloat16,
        "b.weight": torch.float32,
        "b.bias": torch.float32,
    }
    keep_precision_(model, bf16=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_small_steps_on_16_bit_weights_are_not_lost(
    in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """At 1e-6 most weights would stay where they are in bfloat16: one part in 256 of them is the least step."""
    recipe = stages_of(in_small("llava_1_5_7b", bf16=True, warmup_ratio=0.0), "instruct")
    rates = {"train": {"language_model": 1e-6}}
    recipe = recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update=rates)]})
    train(recipe, tmp_path / "run", console=quiet)
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(recipe.model.language.name, dtype=torch.float32)
    after = symphony_vlm.load(tmp_path / "run", device="cpu").language_model
    moved = [
        (old[: len(new)] != new[: len(old)]).float().mean().item()
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if name.endswith("proj.weight")
    ]
    assert len(moved) == 2 * 7 and min(moved) > 0.9


# A stage's own way of making squares.


def test_a_stage_crops_and_the_model_pads(
    in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    original = SymphonyImageProcessor.prepare

    def prepare(self: SymphonyImageProcessor, image: Image.Image) -> np.ndarray:
        state = json.loads((tmp_path / "run" / "state.json").read_text())["stages"]
        seen.setdefault(list(state)[-1] if state else "before", set()).add(self.resize_mode)
        return original(self, image)

    monkeypatch.setattr(SymphonyImageProcessor, "prepare", prepare)
    train(in_small("llava_1_5_7b", max_steps=1), tmp_path / "run", console=quiet)
    assert seen == {"pretrain": {"crop"}, "instruct": {"pad"}}
    for stage in ("pretrain", "instruct"):
        processor = symphony_vlm.load(tmp_path / "run" / stage / "model", device="cpu").processor
        assert processor is not None and processor.image_processor.resize_mode == "pad"


@pytest.mark.parametrize("mode", ["anyres", "encoder"])
def test_a_stage_cannot_leave_tiles_or_the_encoders_own_way(mode: str) -> None:
    with pytest.raises(InputError, match=f"with model.vision.resize_mode {mode} a stage cannot have"):
        load_recipe("llava_1_5_7b", [f"model.vision.resize_mode={mode}"])


# Modules by pattern.


def test_a_star_stands_for_one_part_of_a_name_and_the_longest_match_wins() -> None:
    layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(1, 1), "attn": nn.Linear(1, 1)}) for _ in range(2))
    model = nn.ModuleDict({"layers": layers, "head": nn.Linear(1, 1)})
    freeze_except(model, {"layers.*.mlp": 1.0})
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"layers.{i}.mlp.{part}" for i in (0, 1) for part in ("weight", "bias")
    }
    from symphony_vlm.training.trainer import parameter_groups

    rates = {"layers": 1.0, "layers.*.mlp": 2.0, "layers.1.mlp": 3.0, "head": 4.0}
    freeze_except(model, rates)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g["lr"] for g in parameter_groups(model, rates, 0.0) for p in g["params"]}
    assert found["layers.0.attn.weight"] == 1.0
    assert (found["layers.0.mlp.weight"], found["layers.1.mlp.weight"], found["head.bias"]) == (2.0, 3.0, 4.0)
    with pytest.raises(InputError, match=r"'layers\.\*\.mpl' is no module"):
        freeze_except(model, {"layers.*.mpl": 1.0})


# Data of a middle stage.


def test_a_middle_stage_has_data_of_its_own(in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    from symphony_vlm.data.scenes import generate_scenes

    drawn = generate_scenes(tmp_path / "scenes", train=6, test=1, seed=0, image_size=32, questions_per_image=1)
    records = json.loads(drawn.train_json.read_text())
    for number, name in enumerate(("captions", "prefinetune", "train")):
        (tmp_path / "scenes" / f"{name}.json").write_text(json.dumps(records[2 * number : 2 * number + 2]))
    values = in_small("symphony_4b", max_steps=1).model_dump(mode="json")
    values["data"] = {name: str(tmp_path / "scenes" / f"{name}.json") for name in ("captions", "prefinetune", "train")}
    values["data"]["validation_fraction"] = 0.0
    train(Recipe.model_validate(values), tmp_path / "run", console=quiet)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    read = {e["stage"]: {k for k in e if k.startswith("records_seen/")} for e in entries if "loss" in e}
    assert read == {
        "pretrain": {"records_seen/captions.json"},
        "prefinetune": {"records_seen/prefinetune.json"},
        "instruct": {"records_seen/train.json"},
    }
