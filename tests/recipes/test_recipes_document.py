"""``docs/recipes.md``: its tables are what the files and the counts say, and its examples are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from symphony_vlm.config.loading import list_recipes, load_recipe
from symphony_vlm.config.models import list_known_models, load_known_model
from symphony_vlm.config.recipe import StageConfig
from symphony_vlm.training.parameter_counts import count_recipe

DOCUMENT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
CLIP_NORM, SIGLIP_NORM = 2 * 1024, 2 * 1152


def rows(heading: str) -> list[list[str]]:
    """The cells of the table that begins with these headings, without its two heading lines."""
    lines = DOCUMENT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def recipe_of(cell: str) -> str:
    return cell.strip("`*")


def test_every_recipe_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", DOCUMENT))
    twins = {name for name in list_recipes() if name.endswith("_symphony")}
    assert set(list_recipes()) - twins <= named


def test_the_table_of_values_is_what_the_recipes_hold() -> None:
    name, seen = "", []
    for recipe_cell, stage_cell, _, rate, batch, length, images, template, engine in rows("recipe | stage"):
        name = recipe_of(recipe_cell) or name
        recipe = load_recipe(name)
        stage: StageConfig = next(s for s in recipe.stages if s.name == recipe_of(stage_cell))
        assert set(stage.train.values()) == {float(number) for number in rate.split(", ")}
        assert (stage.global_batch_size, stage.max_length, stage.engine) == (int(batch), int(length), engine)
        assert (stage.resize_mode or recipe.model.vision.resize_mode) == images
        assert (stage.template or recipe.model.template) == template
        seen.append((name, stage.name))
    assert seen == [(n, s.name) for n in dict(seen) for s in load_recipe(n).stages]


def test_what_holds_for_all_published_recipes() -> None:
    for name, *_ in rows("recipe | model"):
        recipe = load_recipe(recipe_of(name))
        assert (recipe.model.vision.feature_layer, recipe.model.projector) == (-2, "mlp2x_gelu")
        for stage in recipe.stages:
            assert (stage.epochs, stage.schedule, stage.warmup_ratio, stage.weight_decay) == (1, "cosine", 0.03, 0)
            assert (stage.max_grad_norm, stage.adam_beta2, stage.max_steps) == (1.0, 0.999, -1)
            assert stage.bf16 and stage.gradient_checkpointing and not stage.packing


def test_the_table_of_parameters_is_what_the_command_counts() -> None:
    checked = 0
    for _, built, active, *_, command in rows("model"):
        found = re.match(r"`config params ([^`]+)`(, .*row.*)?", command)
        assert found, command
        name, *overrides = shlex.split(found.group(1))
        counts = count_recipe(load_recipe(name, overrides))
        count = counts.modules["language_model"] if found.group(2) else counts.whole
        assert (f"{count.total:,}", f"{count.active:,}") == (built, active)
        checked += 1
    assert checked == 9


@pytest.mark.parametrize(
    ("name", "norm", "figures"),
    [
        ("libmoe_clip_phi35", CLIP_NORM, ["4.140B", "4.188B", "4.792B"]),
        ("libmoe_siglip_phi35", SIGLIP_NORM, ["4.250B", "4.300B", "5.103B"]),
    ],
)
def test_the_table_of_compositions(name: str, norm: int, figures: list[str]) -> None:
    whole = "model.vision.feature_layer=-1"
    both = count_recipe(load_recipe(name, [whole]))
    projector = count_recipe(load_recipe(name, [whole, "model.moe.modules=[projector]"]))
    totals = [both.stages[0].total, projector.whole.total, both.whole.total]
    assert [f"{(total + norm) / 1e9:.3f}B" for total in totals] == figures
    listed = [row[1].strip("*") for row in rows("composition")]
    assert listed[:3] == figures or listed[3:] == figures


def test_the_table_of_known_parts() -> None:
    known = [load_known_model(name) for name in list_known_models()]
    expected = {m.hub_id: [f"{m.parameters:,}", m.licence, m.size] for m in known}
    assert {recipe_of(row[0]): row[1:] for row in rows("known offline")} == expected


def test_the_commands_are_valid() -> None:
    text = DOCUMENT.replace("\\\n", " ")
    programs = r"symphony-vlm (?:train|data check|config params)|torchrun .*?-m train\.\w+"
    commands = re.findall(rf"^    (?:{programs}) (.*)$", text, re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command)
        name = words[words.index("--config") + 1] if "--config" in words else words[0]
        load_recipe(name, [word for word in words if "=" in word and not word.startswith("--")])


def test_the_example_of_a_base_is_a_recipe(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.S)
    assert yaml.safe_load(example)["base"] == "symphony_4b"
    (tmp_path / "my_siglip.yaml").write_text(example)
    recipe = load_recipe(str(tmp_path / "my_siglip.yaml"))
    assert recipe.model.vision.name == "google/siglip-so400m-patch14-384"
    assert recipe.stages[-1].train["projector"] == 2e-5
    assert f"{count_recipe(recipe).whole.total / 1e9:.3f}B" in DOCUMENT
