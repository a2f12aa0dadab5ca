"""The whole path in one command: scenes, training of every router from the same start, evaluation, report."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console

from symphony_vlm.cards.writing import write_model_card
from symphony_vlm.config.recipe import Recipe, SourceConfig
from symphony_vlm.errors import InputError
from symphony_vlm.files import write_json

if TYPE_CHECKING:
    from symphony_vlm.evaluation.plan import EvaluationPlan

__all__ = ["quickstart"]


def quickstart(recipe: Recipe, output: Path, routers: Sequence[str], *, console: Console) -> dict[str, Any]:
    """Runs the recipe once per router. Stages before the upcycling are trained once and shared.

    Args:
        recipe: ``quickstart``, with the seed set.
        output: gets ``<router>/model``, ``results.json`` and ``report.html``.
        routers: presets to compare; the first is the baseline.
        console: where progress goes.

    Returns:
        The summary of ``--json``: paths, headline accuracies, seconds by part.
    """
    from symphony_vlm.evaluation.report import write_report
    from symphony_vlm.training.run import train

    seconds: dict[str, float] = {}
    shared, final = _split_at_upcycling(recipe)
    clock = time.monotonic()
    train(shared, output / "shared", console=console)
    seconds["shared stages"] = time.monotonic() - clock
    start = output / "shared" / shared.stages[-1].name / "model"
    test = output / "shared" / "scenes" / "test.json"

    clock = time.monotonic()
    recipes = [_for_router(final, router, start, test.parent) for router in routers]
    headline = _train_and_evaluate_all(recipes, routers, output, test, console)
    seconds["routers"] = time.monotonic() - clock
    clock = time.monotonic()
    folders = [output / "evaluation" / router for router in routers]
    baselines = _text_only(shared, output / "shared", test, recipe.seed)
    for folder in folders:
        _add_baselines(folder / "results.json", baselines)
    report = write_report(folders, output)
    for router in routers:
        write_model_card(output / router / "model", results=output / "results.json")
    seconds["baselines and report"] = time.monotonic() - clock
    return {
        "results": str(output / "results.json"),
        "report": str(report),
        "headline": headline,
        "text_only": max(baseline["value"] for baseline in baselines),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _train_and_evaluate_all(
    recipes: Sequence[Recipe], routers: Sequence[str], output: Path, test: Path, console: Console
) -> dict[str, Any]:
    """Headline accuracies by router. Models this small use one core well and two badly: a process for each router.

    With a core for each, a router is evaluated by its own process as soon as it is trained. Otherwise all are evaluated
    together at the end, where they share the pictures and what the encoder, which stayed frozen, makes of them. Either
    way gives the same files.
    """
    # Two processes with both models each would save what sharing saves, 9 to 14 % of the time, and lose more: of the
    # 30 pictures of a corrupted cell one gets 19 while the other waits, and neither begins before all are trained.
    from symphony_vlm.evaluation.sweep import evaluate_models

    cores = os.cpu_count() or 1
    workers = min(len(routers), cores)
    apart = workers == len(routers)
    console.print(f"{', '.join(routers)}: training{' and evaluation' if apart else ''}, {workers} at a time")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(_train, recipe, router, output, test if apart else None, cores // workers, quiet=console.quiet)
            for recipe, router in zip(recipes, routers, strict=True)
        ]
        headline = {router: job.result() for router, job in zip(routers, jobs, strict=True)}
    if apart:
        return headline
    models = [str(output / router / "model") for router in routers]
    plan = _plan(recipes[0], models[0], test)
    return evaluate_models(plan, models, output / "evaluation", console=console).headline


def _train(
    recipe: Recipe, router: str, output: Path, test: Path | None, threads: int, *, quiet: bool
) -> dict[str, float | None]:
    """One router's last stages and, if there is something to test on, its evaluation, in a process of its own."""
    import torch

    from symphony_vlm.evaluation.runner import evaluate
    from symphony_vlm.training.run import train

    torch.set_num_threads(threads)
    # Lines rather than bars, which several processes would draw over each other.
    console = Console(
        file=cast("IO[str]", _Prefixed(sys.stderr, f"{router}: ")), quiet=quiet, highlight=False, soft_wrap=True
    )
    train(recipe, output / router, console=console)
    if test is None:
        return {}
    plan = _plan(recipe, str(output / router / "model"), test)
    return evaluate(plan, output / "evaluation" / router, console=console).headline


def _plan(recipe: Recipe, model: str, test: Path) -> EvaluationPlan:
    from symphony_vlm.evaluation.plan import EvaluationPlan

    evaluation = recipe.evaluation
    return EvaluationPlan(
        model=model,
        tasks=("scenes",),
        data=test,
        corruptions=tuple(evaluation.corruptions),
        severities=tuple(evaluation.severities),
        limit=evaluation.limit,
        corrupted_limit=evaluation.corrupted_limit,
        seed=recipe.seed,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        routing=evaluation.routing,
    )


class _Prefixed(io.TextIOBase):
    """A text stream that begins every line with a prefix."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream = stream
        self._prefix = prefix

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        self._stream.write("".join(self._prefix + line if line.strip() else line for line in lines))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _split_at_upcycling(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """(the stages before the upcycling, the stages from it on)."""
    index = next((i for i, stage in enumerate(recipe.stages) if stage.upcycle), None)
    if index is None or index == 0:
        raise InputError(
            "the comparison of routers needs stages before the one that upcycles", where=f"recipe {recipe.name}"
        )
    return (
        recipe.model_copy(update={"stages": recipe.stages[:index]}),
        recipe.model_copy(update={"stages": recipe.stages[index:]}),
    )


def _for_router(recipe: Recipe, router: str, start: Path, scenes: Path) -> Recipe:
    moe = {**(recipe.model.moe or {}), "router": router}
    model = recipe.model.model_copy(update={"moe": moe, "start": str(start)})
    data = recipe.data.model_copy(
        update={
            "scenes": None,
            # The encoder stays as it was in the shared stages, and so do its features.
            "feature_cache": recipe.data.feature_cache or str(scenes.parent / "features"),
            "train": [SourceConfig(path=str(scenes / "train.json"))],
            "captions": [SourceConfig(path=str(scenes / "captions_train.json"))],
        }
    )
    return recipe.model_copy(update={"name": f"{recipe.name}_{router}", "model": model, "data": data})


def _text_only(recipe: Recipe, run: Path, test: Path, seed: int) -> list[dict[str, Any]]:
    """What the words of the questions alone can score, see `evaluation.baselines`.

    The language stage's model read the training conversations but saw no picture; it is trained only briefly, so the
    training answers are counted as well.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from symphony_vlm.data.datasets import open_samples
    from symphony_vlm.evaluation.baselines import same_question_baseline, text_only_baseline
    from symphony_vlm.evaluation.task import get_task

    task = get_task("scenes")
    items = task.load(test, None, run, seed)
    found = [same_question_baseline(task, items, open_samples(test.parent / "train.json"), seed=seed)]
    stage = next((stage.name for stage in recipe.stages if stage.kind == "text"), None)
    if stage is not None:
        folder = run / stage / "model"
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found.append(text_only_baseline(model, tokenizer, recipe.model.template, task, items, seed=seed))
    return found


def _add_baselines(path: Path, baselines: Sequence[dict[str, Any]]) -> None:
    values = json.loads(path.read_text())
    names = {baseline["name"] for baseline in baselines}
    others = [b for b in values["baselines"] if b["name"] not in names]
    write_json(path, values | {"baselines": [*others, *baselines]})
