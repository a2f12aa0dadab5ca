"""Training steps on padded, length-grouped and packed batches of the same conversations.

Each contender trains on the same conversations in the same number of optimizer steps, forward, backward and AdamW, at
a learning rate of 0, and so with the same supervised tokens in a pass. The padded baseline takes them at random, as a
stage without `group_by` does. The model is the one of the recipe ``instruct_small`` with random weights; numbers do not
move the time. Pictures are prepared and batches collated beforehand.

Once the vision tower trains, as in that recipe, and once it is frozen and its features come from the cache, as in
LLaVA-1.5's last stage: what the tower costs is the same for all contenders.

Without ``--data`` the conversations are generated scenes, which are short and alike.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Case, Plan
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.data.collator import ConversationCollator, ConversationDataset
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.packing import PackedCollator, PackedDataset
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.model.attention import attention_by_document
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import update_expert_graphs
from symphony_vlm.training.parts import assemble, open_tokenizer
from symphony_vlm.training.trainer import freeze_except, parameter_groups

__all__ = [
    "PLAN", "Batch", "Setup", "cases", "collate", "frozen_tower", "num_supervised", "set_up", "trains", "with_features",
]  # fmt: skip

PLAN = Plan(rounds=1, alternations=3, seconds=0.0)

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, and what it trains on."""

    model: Any
    rates: dict[str, float]
    samples: ConversationDataset
    rows: ConversationCollator
    max_length: int


def cases(
    *, tiny: bool, device: torch.device, data: Path | None = None, image_folder: Path | None = None
) -> Iterator[Case]:
    """16 conversations in an optimizer step, as in the recipe, 64 and 128, each in one batch; by what the tower does.

    Args:
        tiny: sizes for a test of the benchmark.
        device: where the model is.
        data: a file of conversations; None: generated scenes.
        image_folder: base of its image paths.
    """
    recipe = load_recipe("tiny" if tiny else "instruct_small")
    with tempfile.TemporaryDirectory() as folder:
        setup = set_up(recipe, 8 if tiny else 256, Path(folder), data, image_folder)
        setup.model.to(device)
        for trained in (True, False):
            for per_step in (4,) if tiny else (16, 64, 128):
                yield _case(setup if trained else frozen_tower(setup), per_step, device)


def set_up(recipe: Recipe, num_samples: int, folder: Path, data: Path | None, image_folder: Path | None) -> Setup:
    """The recipe's model with random weights, as its last stage trains it, and conversations."""
    if data is None:
        data = generate_scenes(folder / "scenes", train=num_samples, test=1).train_json
    source = open_samples(data, image_folder=image_folder)
    tokenizer = open_tokenizer(recipe.model, folder / "tokenizer", [source])
    torch.manual_seed(0)
    model = assemble(recipe.model, tokenizer, encoder=None, language=None)
    assert recipe.model.moe is not None
    model.upcycle_(MoEConfig.from_dict(recipe.model.moe))
    stage = recipe.stages[-1]
    freeze_except(model, stage.train)
    processor: Any = model.processor
    chosen = np.random.default_rng(0).permutation(len(source))[:num_samples].tolist()
    samples = ConversationDataset(
        [source[index] for index in chosen],
        encode=lambda sample: processor.encode(sample.messages, max_length=stage.max_length, origin=sample.origin),
        to_square=lambda image: np.asarray(processor.image_processor.to_square(image)),
    )
    rows = ConversationCollator(
        tokenizer.pad_token_id, lambda squares: processor.image_processor(squares)["pixel_values"]
    )
    return Setup(model=model.train(), rates=stage.train, samples=samples, rows=rows, max_length=stage.max_length)


def frozen_tower(setup: Setup) -> Setup:
    """The same, but that the vision tower does not train."""
    rates = {name: rate for name, rate in setup.rates.items() if name != "vision_tower"}
    model = copy.deepcopy(setup.model)
    freeze_except(model, rates)
    return replace(setup, model=model, rates=rates)


@torch.no_grad()
def with_features(setup: Setup, batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """Batches with the frozen tower's output in the place of pictures."""
    tower = setup.model.vision_tower.eval()
    return [
        {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
        | {"vision_features": tower(batch["pixel_values"].to(device)).cpu()}
        for batch in batches
    ]


def _case(setup: Setup, per_step: int, device: torch.device) -> Case:
    lengths = [setup.samples.num_tokens(index) for index in range(len(setup.samples))]
    # `group_by: length` sorts within pieces of 50 batches; all of these conversations are less than one.
    grouped = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    steps = -(-len(lengths) // per_step)
    # As the recipe says, but for steps of so few tokens that they would not fill a row.
    row = max(max(lengths), min(setup.max_length, sum(lengths) // steps))
    packed = PackedDataset(setup.samples, max_length=row, seed=0)
    parts = np.array_split(np.arange(len(packed)), steps)
    passes = {
        "padded": collate(setup, list(range(len(lengths))), per_step),
        "grouped by length": collate(setup, grouped, per_step),
        "packed": [PackedCollator(setup.rows)([packed[int(index)] for index in part]) for part in parts],
    }
    assert {len(batches) for batches in passes.values()} == {steps}
    places = {name: sum(batch["input_ids"].numel() for batch in batches) for name, batches in passes.items()}
    supervised = sum(num_supervised(batch) for batch in passes["padded"])
    trained = "vision_tower" in setup.rates
    if not trained:
        passes = {name: with_features(setup, batches, device) for name, batches in passes.items()}
    contenders = {
        name: trains(copy.deepcopy(setup.model), setup.rates, batches, device) for name, batches in passes.items()
    }
    settings: dict[str, int | str] = {"vision tower": "trained" if trained else "frozen, cached"}
    settings |= {"conversations a step": per_step, "tokens": sum(lengths)}
    settings |= {f"places {name}": number for name, number in places.items()}
    return Case(settings=settings, contenders=contenders, items=("supervised tokens", supervised))


def collate(setup: Setup, order: Sequence[int], per_step: int) -> list[Batch]:
    """Padded batches of samples in that order."""
    steps = [order[start : start + per_step] for start in range(0, len(order), per_step)]
    return [setup.rows([setup.samples[index] for index in step]) for step in steps]


def num_supervised(batch: Batch) -> int:
    """Positions with a target."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def trains(
    model: Any,
    rates: dict[str, float],
    batches: Sequence[Batch],
    device: torch.device,
    loss_of: Callable[[Any, Batch], Tensor] = lambda model, batch: model(**batch).loss,
) -> Callable[[], Sequence[Tensor]]:
    """A pass over the batches, one optimizer step each; returns the number of supervised tokens."""
    on_device = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    groups = [group | {"lr": 0.0} for group in parameter_groups(model, rates, weight_decay=0.05)]
    optimizer = torch.optim.AdamW(groups)

    def run() -> Sequence[Tensor]:
        supervised = torch.zeros((), dtype=torch.long)
        for batch in on_device:
            with attention_by_document(model.language_model) if "document_ids" in batch else nullcontext():
                loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            update_expert_graphs(model)
            supervised += num_supervised(batch)
        return (supervised,)

    return run
