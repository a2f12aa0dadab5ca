"""Every packaged recipe runs: all its stages, two steps each, with tiny parts of the families that it names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import symphony_vlm
from symphony_vlm.config.loading import list_recipes, load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.training.run import train


@pytest.mark.parametrize("name", [name for name in list_recipes() if not load_recipe(name).is_language])
def test_every_recipe_runs_two_steps_of_every_stage(
    name: str, in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = in_small(name)
    result = train(recipe, tmp_path / "run", console=quiet)
    assert result.step == 2
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for stage in recipe.stages:
        losses = [entry["loss"] for entry in entries if entry["stage"] == stage.name and "loss" in entry]
        assert len(losses) == 2 and all(map(math.isfinite, losses)), stage.name
    model = symphony_vlm.load(tmp_path / "run", device="cpu")
    assert sum(1 for _ in sparse_layers(model)) > 0 or recipe.model.moe is None
    assert model.processor is not None
    assert model.processor.image_processor.resize_mode == recipe.model.vision.resize_mode
