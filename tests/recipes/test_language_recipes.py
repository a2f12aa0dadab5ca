"""WikiText recipes: published totals from the meta device, twins that differ in the router alone, published values."""

from __future__ import annotations

import json

import pytest

from symphony_vlm import cli
from symphony_vlm.config.loading import list_recipes, load_recipe
from symphony_vlm.training.parameter_counts import count_recipe

V, D, E, F = 267_735, 352, 16, 352
"""Words, width, experts and their hidden size of the medium models."""
ATTENTION = 4 * (D * D + D)
EXPERTS = E * (2 * D * F + D + F)
NORMS = 2 * 2 * D
EMBEDDINGS = 2 * V * D
POSITIONS = 1024 * D
SMOE = EMBEDDINGS + POSITIONS + 2 * D + 6 * (ATTENTION + EXPERTS + E * D + NORMS)
DENSE_LAYER = ATTENTION + (2 * D * F + D + F) + NORMS
SUMS = {
    "wikitext103_smoe_medium": SMOE,
    "wikitext103_glam_medium": SMOE + 6 * DENSE_LAYER,
    # A projection to 8 dimensions and an embedding per expert instead of a row per expert.
    "wikitext103_xmoe_medium": SMOE + 6 * (8 * D + E * 8 - E * D),
}
PUBLISHED_SMOE = EMBEDDINGS + V + 44 * 1024 + 6 * (4 * D * D + EXPERTS + E * D + E + 2 * NORMS)
"""MomentumSMoE b43846f: bias of the output, relative positions of 44 x 1024 values, no biases in the attention, one in
the gate, four norms a layer and none at the end."""
PUBLISHED = {
    "wikitext103_smoe_medium": 215.68e6,
    "wikitext103_glam_medium": 220.20e6,
    "wikitext103_xmoe_medium": 215.68e6,  # 215.66, and 215.70 with an unused gate
}
SIZES, ROUTERS = ("small", "medium", "large"), ("smoe", "xmoe", "glam")


@pytest.mark.parametrize("name", SUMS)
def test_totals_are_the_published_ones(name: str) -> None:
    """They differ by less than 0.05 %, the sum of the parts listed at `PUBLISHED_SMOE`."""
    assert PUBLISHED_SMOE == 215_679_863
    biases_and_norms = 6 * (4 * D - E - NORMS) + 2 * D
    assert SMOE - PUBLISHED_SMOE == (POSITIONS - 44 * 1024) - V + biases_and_norms == 48_265
    for recipe in (name, name.replace("wikitext103_", "wikitext103_symphony_")):
        total = count_recipe(load_recipe(recipe)).whole.total
        assert total == SUMS[name]
        assert total == pytest.approx(PUBLISHED[name], rel=5e-4)


def test_the_command_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["config", "params", "wikitext103_smoe_medium", "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["total"] == SMOE and found["modules"]["language_model"]["total"] == SMOE
    assert found["active"] == SMOE - 6 * EXPERTS * 14 // 16


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_twin_differs_in_the_router_alone(router: str, size: str) -> None:
    plain = load_recipe(f"wikitext103_{router}_{size}").model_dump()
    twin = load_recipe(f"wikitext103_symphony_{router}_{size}").model_dump()
    routers = [values["model"]["moe"].pop("router") for values in (plain, twin)]
    assert routers == [router, f"symphony_{router}"]
    for values in (plain, twin):
        del values["name"], values["description"]
    assert plain == twin


def test_every_wikitext_recipe_is_one_of_these() -> None:
    names = {f"wikitext103_{kind}{r}_{s}" for kind in ("", "symphony_") for r in ROUTERS for s in SIZES}
    assert {name for name in list_recipes() if name.startswith("wikitext")} == names | {"wikitext2_tiny"}


@pytest.mark.parametrize(
    ("name", "layers", "width", "steps", "rate", "warmup_steps", "tokens"),
    [
        ("wikitext103_smoe_small", 3, 128, 60_000, 7e-4, 3000, 96 * 256),
        ("wikitext103_smoe_medium", 6, 352, 80_000, 7e-4, 4000, 48 * 512),
        ("wikitext103_smoe_large", 12, 512, 80_000, 7e-4, 5000, 24 * 1024),
        ("wikitext103_xmoe_medium", 6, 352, 80_000, 7e-4, 4000, 48 * 512),
        ("wikitext103_glam_medium", 12, 352, 120_000, 7e-5, 4000, 48 * 512),
    ],
)
def test_published_values(
    name: str, layers: int, width: int, steps: int, rate: float, warmup_steps: int, tokens: int
) -> None:
    recipe = load_recipe(name)
    [stage] = recipe.stages
    architecture = recipe.model.language.architecture
    assert architecture is not None and recipe.model.moe is not None
    assert (architecture["num_hidden_layers"], architecture["hidden_size"], architecture["n_inner"]) == (
        layers,
        width,
        width,
    )
    assert stage.max_steps == steps and stage.learning_rate == rate and stage.schedule == "constant_with_warmup"
    assert round(stage.warmup_ratio * steps) == pytest.approx(warmup_steps, abs=5)
    assert stage.global_batch_size is not None and stage.global_batch_size * stage.max_length == tokens
    assert stage.max_length == architecture["max_position_embeddings"]
    assert recipe.model.moe["balance_loss_weight"] == 0.01 and recipe.model.moe["num_experts"] == 16
