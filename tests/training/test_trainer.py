"""Which parameters train, with which rate and decay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.utils import ModelOutput

from symphony_vlm.data.grouping import EpochSampler, random_order
from symphony_vlm.errors import InputError
from symphony_vlm.training.trainer import EpochOrder, StageTrainer, freeze_except, parameter_groups


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


def test_the_newline_of_tiles_is_learnt_with_the_projector_unless_it_has_a_rate_of_its_own() -> None:
    model = nn.Module()
    model.projector = nn.Linear(2, 2)
    model.image_newline = nn.Parameter(torch.zeros(2))
    freeze_except(model, {"projector": 1.0})
    assert _trainable(model) == {"projector.weight", "projector.bias", "image_newline"}
    (rate,) = {group["lr"] for group in parameter_groups(model, {"projector": 1.0}, 0.0)}
    assert rate == 1.0
    rates = {g["lr"]: len(g["params"]) for g in parameter_groups(model, {"projector": 1.0, "image_newline": 0.5}, 0.0)}
    assert rates == {1.0: 2, 0.5: 1}
    freeze_except(model, {"image_newline": 1.0})
    assert _trainable(model) == {"image_newline"}


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


@dataclass
class Output(ModelOutput):
    loss: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None


class TwoParts(nn.Module):
    """A model whose loss has a second part where there is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, labels: Tensor, value: float, image: bool, **kwargs: Any) -> Any:
        parts = {"cross_entropy": torch.tensor(value)} | (
            {"balance/vision.0": torch.tensor(10 * value)} if image else {}
        )
        loss = self.weight * value
        return Output(loss=loss, loss_parts=parts)


def test_each_part_of_the_loss_is_averaged_over_the_micro_batches_that_have_it(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = StageTrainer(model=TwoParts().train(), args=arguments, rates={"": 0.1})
    logged: list[dict[str, float]] = []
    for micro_batches in ([(3, 2.0, True), (1, 6.0, False)], [(2, 1.0, False)]):
        for tokens, value, image in micro_batches:
            labels = torch.tensor([[-100, *[5] * tokens, *[-100] * (4 - tokens)]])
            inputs = {"labels": labels, "value": value, "image": image}
            trainer.compute_loss(trainer.model, inputs, num_items_in_batch=4)
        logs = {"loss": 0.0}
        trainer.log(logs)
        logged.append(logs)
    # (3 * 2 + 1 * 6) / 4; the part that one micro-batch has is its value; none is left for the next interval.
    assert logged[0]["cross_entropy"] == 3.0 and logged[0]["balance/vision.0"] == 20.0
    assert logged[1]["cross_entropy"] == 1.0 and "balance/vision.0" not in logged[1]


@pytest.mark.parametrize(("epoch", "order"), [(None, 0), (0.0, 0), (1.0, 1), (1.75, 1), (2.0, 2)])
def test_a_run_that_continues_inside_an_epoch_takes_that_epochs_order(epoch: float | None, order: int) -> None:
    """Whichever epoch the sampler was at before."""
    orders = []
    for number in range(3):
        fresh = EpochSampler(partial(random_order, 20), 20, seed=3)
        fresh.set_epoch(number)
        orders.append(list(fresh))
    assert orders[0] != orders[1] != orders[2]
    sampler = EpochSampler(partial(random_order, 20), 20, seed=3)
    sampler.set_epoch(7)
    EpochOrder(sampler).on_epoch_begin(None, TrainerState(epoch=epoch), None)
    assert list(sampler) == orders[order]
