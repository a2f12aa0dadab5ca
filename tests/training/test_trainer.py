"""Which parameters train, with which rate and decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from symphony_vlm.errors import InputError
from symphony_vlm.training.trainer import freeze_except, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.tower_extra = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_exactly_the_named_modules_train() -> None:
    model = Model()
    freeze_except(model, {"tower": 1.0})
    assert _trainable(model) == {"tower.0.weight", "tower.0.bias", "tower.1.weight", "tower.1.bias"}


def test_a_prefix_ends_at_a_dot_so_that_a_longer_name_does_not_match() -> None:
    model = Model()
    freeze_except(model, {"tower_extra": 1.0})
    assert _trainable(model) == {"tower_extra.weight", "tower_extra.bias"}


def test_the_empty_prefix_means_everything_and_a_whole_name_one_parameter() -> None:
    model = Model()
    freeze_except(model, {"": 1.0})
    assert _trainable(model) == {name for name, _ in model.named_parameters()}
    freeze_except(model, {"head.bias": 1.0})
    assert _trainable(model) == {"head.bias"}


def test_freezing_is_undone_by_the_next_stage() -> None:
    model = Model()
    freeze_except(model, {"head": 1.0})
    freeze_except(model, {"tower": 1.0, "head": 1.0})
    assert "tower.0.weight" in _trainable(model)


def test_an_unknown_prefix_names_the_nearest_module() -> None:
    with pytest.raises(InputError, match="'towr' is no module of the model; did you mean 'tower'"):
        freeze_except(Model(), {"towr": 1.0})


def test_the_longest_prefix_decides_the_rate_and_vectors_are_not_decayed() -> None:
    model = Model()
    rates = {"tower": 1e-3, "tower.1": 1e-4, "head": 1e-2}
    freeze_except(model, rates)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, rates, weight_decay=0.1)
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found == {
        "tower.0.weight": (1e-3, 0.1),
        "tower.0.bias": (1e-3, 0.0),
        "tower.1.weight": (1e-4, 0.0),
        "tower.1.bias": (1e-4, 0.0),
        "head.weight": (1e-2, 0.1),
        "head.bias": (1e-2, 0.0),
    }
    assert sum(len(group["params"]) for group in groups) == len(found), "no parameter stands twice"
    torch.optim.AdamW(groups)
