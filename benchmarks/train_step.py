"""Steps of the small recipe as it trains here, against the same steps the usual way, in samples a second.

The usual way: conversations padded, pictures through the frozen vision tower each time, experts as transformers'
``eager`` computes them, logits at all positions. Ours: conversations packed into rows, features of the frozen tower
from a cache, ``segments``, logits where there is something to predict. Both train on the same conversations in the
same number of optimizer steps, at a learning rate of 0: forward, backward, AdamW, and the graphs' step.

The model is that of ``instruct_small`` with random weights, sparse, as its last stage trains it but with a frozen
vision tower: one that is trained has no features to keep. Batches, and features, are made beforehand.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.measure import Case, Plan
from benchmarks.packing import Batch, Setup, collate, frozen_tower, num_supervised, set_up, trains, with_features
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.packing import PackedCollator, PackedDataset
from symphony_vlm.model.loss import targets_of, training_loss
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.recording import sparse_layers

__all__ = ["PLAN", "cases"]

PLAN = Plan(rounds=7, alternations=1, seconds=0.005)
PER_STEP = 16


def cases(
    *, tiny: bool, device: torch.device, data: Path | None = None, image_folder: Path | None = None
) -> Iterator[Case]:
    """16 conversations in an optimizer step, as in the recipe.

    Args:
        tiny: sizes for a test of the benchmark.
        device: where the model is.
        data: a file of conversations; None: generated scenes.
        image_folder: base of its image paths.
    """
    recipe = load_recipe("tiny" if tiny else "instruct_small")
    per_step = 4 if tiny else PER_STEP
    with tempfile.TemporaryDirectory() as folder:
        setup = set_up(recipe, 2 * per_step, Path(folder), data, image_folder)
        setup.model.to(device)
        setup = frozen_tower(setup)
        padded = collate(setup, list(range(len(setup.samples))), per_step)
        usual, ours = _usual(copy.deepcopy(setup.model)), setup.model
        settings: dict[str, int | str] = {"conversations a step": per_step, "experts": _num_experts(ours)}
        yield Case(
            settings=settings | {"supervised tokens": sum(map(num_supervised, padded))},
            contenders={
                "padded, uncached, eager, all logits": trains(usual, setup.rates, padded, device, _loss_of_all_logits),
                "ours": trains(ours, setup.rates, _packed(setup, len(padded), device), device),
            },
            items=("samples", len(setup.samples)),
        )


def _num_experts(model: Any) -> int:
    return next(layer.experts.num_experts for _, layer in sparse_layers(model))


def _packed(setup: Setup, steps: int, device: torch.device) -> list[Batch]:
    """The same conversations in rows, with the tower's output in the place of pictures."""
    lengths = [setup.samples.num_tokens(index) for index in range(len(setup.samples))]
    row = max(max(lengths), min(setup.max_length, sum(lengths) // steps))
    packed = PackedDataset(setup.samples, max_length=row, seed=0)
    parts = np.array_split(np.arange(len(packed)), steps)
    batches = [PackedCollator(setup.rows)([packed[int(index)] for index in part]) for part in parts]
    return with_features(setup, batches, device)


def _usual(model: Any) -> Any:
    """The model with transformers' eager experts."""
    for _, layer in sparse_layers(model):
        layer.experts.__class__ = _EagerExperts
        layer.experts.config._experts_implementation = "eager"
    return model


class _EagerExperts(Experts):
    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        output_TD: Tensor = MixtralExperts.forward(self, x_TD, indices_TK, weights_TK)
        return output_TD


def _loss_of_all_logits(model: Any, batch: Batch) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits_BSV = model(**inputs).logits
    targets_BS = targets_of(batch["labels"], IGNORE_INDEX)
    loss, _ = training_loss(logits_BSV.flatten(0, 1), targets_BS.flatten(), model.routing, ignore_index=IGNORE_INDEX)
    return loss
