"""Settings of sparse layers: presets, refusals with the nearest valid word, lossless round trips."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import PARTS, PRESETS, MoEConfig


@pytest.mark.parametrize("router", PRESETS)
def test_a_preset_fills_exactly_the_parts_left_open(router: str) -> None:
    config = MoEConfig(router=router)
    for name, value in {**PARTS, **PRESETS[router]}.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("baseline", ["smoe", "xmoe", "glam"])
def test_symphony_is_its_baseline_plus_a_graph_and_nothing_else(baseline: str) -> None:
    plain, symphony = MoEConfig(router=baseline).to_dict(), MoEConfig(router=f"symphony_{baseline}").to_dict()
    assert {key for key in plain if plain[key] != symphony[key]} == {"router", "expert_graph"}


@pytest.mark.parametrize(("preset", "part"), [("xmoe", "gate"), ("glam", "layers"), ("similarity_smoe", "token_graph")])
def test_the_other_presets_are_smoe_but_for_one_part(preset: str, part: str) -> None:
    plain, other = MoEConfig(router="smoe").to_dict(), MoEConfig(router=preset).to_dict()
    assert {key for key in plain if plain[key] != other[key]} == {"router", part}


def test_a_part_set_explicitly_wins_over_the_preset() -> None:
    config = MoEConfig(router="symphony_glam", expert_graph="none", layers=(1,))
    assert (config.expert_graph, config.layers) == ("none", (1,))


@pytest.mark.parametrize(
    ("settings", "field", "suggestion"),
    [
        ({"router": "symphony_smo"}, "moe.router", "symphony_smoe"),
        ({"normalization": "sinkorn"}, "moe.normalization", "sinkhorn"),
        ({"smooth": "logit"}, "moe.smooth", "logits"),
        ({"score": "softmaxx"}, "moe.score", "softmax"),
        ({"expert_graph": "symfony"}, "moe.expert_graph", "symphony"),
        ({"layers": "alternating"}, "moe.layers", "alternate"),
        ({"gate": "cosin"}, "moe.gate", "cosine"),
        ({"expert_graph": "learnt"}, "moe.expert_graph", "learnable"),
        ({"token_graph": "similar"}, "moe.token_graph", "similarity"),
    ],
)
def test_an_unknown_word_names_the_field_and_the_nearest_choice(
    settings: dict[str, Any], field: str, suggestion: str
) -> None:
    with pytest.raises(InputError) as error:
        MoEConfig(**settings)
    assert error.value.where == field
    assert f"did you mean {suggestion!r}" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"strength": 1.5}, "strength"),
        ({"momentum": -0.1}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"jitter_noise": -1.0}, "jitter_noise"),
        ({"balance_loss_weight": -1.0}, "balance_loss_weight"),
        ({"layers": (0, 0)}, "layers"),
        ({"layers": (-1,)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"cosine_dim": 0}, "cosine_dim"),
        ({"cosine_dim": 2.5}, "cosine_dim"),
        ({"cosine_dim": True}, "cosine_dim"),
        ({"cosine_temperature": 0.0}, "cosine_temperature"),
        ({"cosine_learnable_temperature": "yes"}, "cosine_learnable_temperature"),
        ({"token_graph_dim": -3}, "token_graph_dim"),
        ({"token_graph_temperature": -1.0}, "token_graph_temperature"),
        ({"token_graph_temperature": float("nan")}, "token_graph_temperature"),
    ],
)
def test_a_value_out_of_range_names_its_field_and_the_value(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        MoEConfig(**settings)
    assert error.value.where == f"moe.{field}"
    assert repr(settings[field]) in str(error.value)


def test_hard_counts_with_one_expert_per_token_are_refused_because_they_are_diagonal() -> None:
    with pytest.raises(InputError, match="diagonal") as error:
        MoEConfig(router="symphony_smoe", num_experts_per_tok=1)
    assert error.value.remedy is not None and "soft" in error.value.remedy
    MoEConfig(router="symphony_smoe", num_experts_per_tok=1, counts="soft")
    MoEConfig(router="smoe", num_experts_per_tok=1)


@pytest.mark.parametrize(
    ("settings", "field", "way_out"),
    [
        ({"applies_to": "selection"}, "applies_to", {"applies_to": "weights"}),
        ({"active": "eval"}, "active", {"active": "train"}),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok", {"renormalize": False}),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok", {"num_experts": 1}),
    ],
)
def test_a_learnable_graph_without_a_gradient_is_refused(
    settings: dict[str, Any], field: str, way_out: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="no gradient reaches a learnable graph") as error:
        MoEConfig(expert_graph="learnable", **settings)
    assert error.value.where == f"moe.{field}" and error.value.remedy is not None
    MoEConfig(expert_graph="learnable", **(settings | way_out))
    MoEConfig(expert_graph="symphony", counts="soft", **settings)


@pytest.mark.parametrize("layers", [None, "alternate", (0, 3)])
@pytest.mark.parametrize("router", PRESETS)
def test_settings_survive_json_unchanged(router: str, layers: Any) -> None:
    config = MoEConfig(router=router, layers=layers, num_experts=6, strength=0.25, smooth="logits")
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(InputError, match="did you mean 'num_experts'"):
        MoEConfig.from_dict({"num_expert": 4})


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", (0, 1, 2, 3, 4)), ("alternate", (0, 2, 4)), ((3, 1), (1, 3)), ([2], (2,))]
)
def test_layers_become_sorted_indices(layers: Any, expected: tuple[int, ...]) -> None:
    assert MoEConfig(layers=layers).sparse_layers(5) == expected


def test_a_layer_that_the_decoder_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="below the 5 layers"):
        MoEConfig(layers=(5,)).sparse_layers(5)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig().num_experts = 8  # type: ignore[misc]
