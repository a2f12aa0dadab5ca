"""Answering a benchmark's questions: a loop over single questions, and the evaluation runner.

The loop is what evaluation scripts of published models do: for each question it opens the picture, encodes it and
generates with a KV cache, one question at a time. The runner answers the same questions through `run_cell`, files and
scores included; it encodes each picture once for all of its questions and answers in batches of like length. With
shared prefixes, as it does by itself, the language model too reads a picture once for its questions of a batch. All
answers must be equal, token for token.

Models have random weights and seldom end an answer: each takes all of its new tokens, as many in the loop as in a
batch. The first is that of the recipe ``instruct_small``, the other one whose pictures are as long as those of larger
models. Questions are those of generated scenes, eight a picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import Case, Plan
from benchmarks.second_turn import picture_model
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.evaluation.cell import run_cell
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.training.parts import assemble, open_tokenizer

__all__ = ["PLAN", "answers_as_numbers", "cases", "random_model"]

PLAN = Plan(rounds=1, alternations=5, seconds=0.0)


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """Answers of 1 token (a letter, yes or no) and of 16; one model with short and one with long pictures.

    Args:
        tiny: sizes for a test of the benchmark.
        device: where the model is.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes = generate_scenes(folder / "scenes", train=8, test=2 if tiny else 8)
        model = random_model("tiny" if tiny else "instruct_small", scenes.train_json, folder).to(device).eval()
        items = list(get_task("scenes").load(folder / "scenes", None, folder, 0))
        for longest in (2,) if tiny else (1, 16):
            yield _case(model, items, longest, folder)
        if not tiny:
            yield _case(picture_model(256, 6, image_size=336).to(device), items[:16], 1, folder)


def random_model(recipe_name: str, conversations: Path, folder: Path) -> Any:
    """A recipe's model with random weights and a tokenizer of these conversations."""
    recipe = load_recipe(recipe_name)
    tokenizer = open_tokenizer(recipe.model, folder / "tokenizer", [open_samples(conversations)])
    torch.manual_seed(0)
    model = assemble(recipe.model, tokenizer, encoder=None, language=None)
    assert recipe.model.moe is not None
    model.upcycle_(MoEConfig.from_dict(recipe.model.moe))
    return model


def _case(model: Any, items: Sequence[EvaluationItem], longest: int, folder: Path) -> Case:
    contenders = {"one by one": _one_by_one(model, items, longest)}
    for batch_size in (8, 64):
        for share, label in ((False, "whole prompts"), (True, "shared prefixes")):
            run = _runner(model, items, longest, folder, batch_size, share)
            contenders[f"batches of {batch_size}, {label}"] = run
    pictures = len({item.image_key for item in items})
    settings: dict[str, int | str] = {
        "questions": len(items),
        "pictures": pictures,
        "tokens of a picture": model.config.num_image_tokens,
        "new tokens": longest,
    }
    return Case(settings=settings, contenders=contenders, items=("questions", len(items)))


def _one_by_one(model: Any, items: Sequence[EvaluationItem], longest: int) -> Callable[[], Sequence[Tensor]]:
    def run() -> Sequence[Tensor]:
        answers = []
        for item in items:
            assert item.images[0].path is not None
            with Image.open(item.images[0].path) as image:
                answers.append(model.chat(item.question, images=image.convert("RGB"), max_new_tokens=longest))
        return answers_as_numbers(answers)

    return run


def _runner(
    model: Any, items: Sequence[EvaluationItem], longest: int, folder: Path, batch_size: int, share: bool
) -> Callable[[], Sequence[Tensor]]:
    cell = Cell(task=get_task("scenes"), corruption="none", severity=0, seed=0)
    predictor = Predictor(model, batch_size=batch_size, max_new_tokens=longest, share_prefixes=share)
    path = folder / "predictions" / cell.file_name

    def run() -> Sequence[Tensor]:
        path.unlink(missing_ok=True)
        records = run_cell(cell, items, predictor, path, lambda done: None, batch_size=batch_size)
        return answers_as_numbers([record["prediction"] for record in records])

    return run


def answers_as_numbers(answers: Sequence[str]) -> tuple[Tensor]:
    """The answers' bytes, which must be equal."""
    return (torch.tensor(list("\n".join(answers).encode()), dtype=torch.float64),)
