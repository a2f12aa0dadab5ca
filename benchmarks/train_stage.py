"""Real steps of one stage of a recipe: samples and tokens per second, model FLOPs utilisation, peak memory.

Examples: python -m benchmarks.train_stage symphony_4b instruct --steps 20 --json symphony_4b.json batch_size=8
          python -m benchmarks.train_stage wikitext103_smoe_medium language --steps 100 --block 5 \\
              --against wikitext103_symphony_smoe_medium bf16=true

The stage runs as ``symphony-vlm train`` runs it, by the same trainer, with the recipe's model in full size, but with
random weights (which do not move the time), on generated data, and nothing is saved: pictures with eight questions
each, or for a language stage a text that has as many words as the recipe's vocabulary. Settings of the stage can be
changed by ``key=value``. One process; engines that need several are set to ``auto``.

``--against`` trains the same stage of a second recipe in the same process, in turn with the first, block by block, and
gives the ratio of their times.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch.profiler import profile
from transformers import set_seed

from benchmarks.paired_stages import compare, train_in_turn
from benchmarks.stage_recipe import only_stage
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.files import write_json
from symphony_vlm.training.callbacks import RoutingLog
from symphony_vlm.training.engine import with_accumulation
from symphony_vlm.training.language import prepare_language
from symphony_vlm.training.provenance import provenance
from symphony_vlm.training.run import open_run
from symphony_vlm.training.run_state import RunState
from symphony_vlm.training.stages import prepare_multimodal
from symphony_vlm.training.trainer import StageTrainer

__all__ = ["main", "measure_pair", "measure_stage"]

SPEEDS = ("samples_per_second", "tokens_per_second", "images_per_second", "model_tflops", "mfu", "memory_gib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = _parse(arguments)
    names = [options.recipe, *([] if options.against is None else [options.against])]
    # Reading the routers' statistics at every step would be a part of what is compared.
    pair = [] if options.against is None else [f"log_steps={max(1, options.steps // 4)}"]
    settings = [*pair, *options.settings]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes = [
            only_stage(recipe, options.stage, settings, folder, steps=options.steps, image_size=options.image_size)
            for recipe in names
        ]
        if options.against is None:
            result = measure_stage(recipes[0], folder, draw_on=options.draw_on, profile_to=options.profile)
        else:
            result = measure_pair(recipes, folder, block=options.block, draw_on=options.draw_on)
    if options.json is not None:
        facts = provenance(recipe=" ".join(names), stage=options.stage, device=result["device"])
        write_json(options.json, {"provenance": facts, "settings": options.settings, **result})
    print(json.dumps(_without_lists(result), indent=1))


def measure_stage(
    recipe: Recipe, folder: Path, *, draw_on: str | None = None, profile_to: Path | None = None
) -> dict[str, Any]:
    """Runs the recipe's one stage in `folder` and reads its log.

    Args:
        recipe: with one stage.
        folder: of the run.
        draw_on: device on which random weights are drawn.
        profile_to: file for a table of operations by time; profiling slows the steps.

    Returns:
        medians of the logged speeds without the first two entries, in which memory and kernels are found; the largest
        memory; the losses.
    """
    start = time.monotonic()
    trainer = _prepare(recipe, folder, draw_on)
    watched: Any = profile() if profile_to is not None else nullcontext()
    with watched as profiler:
        trainer.train()
    if profile_to is not None:
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        profile_to.write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80))
    return _facts(trainer, folder) | {"seconds": round(time.monotonic() - start, 1)}


def measure_pair(recipes: Sequence[Recipe], folder: Path, *, block: int, draw_on: str | None = None) -> dict[str, Any]:
    """Runs the one stage of two recipes in turn.

    Args:
        recipes: the baseline and the other, with one stage each and as many steps.
        folder: of both runs.
        block: steps before the other one's turn.
        draw_on: as in `measure_stage`.

    Returns:
        what `measure_stage` gives, of each; and ``ratio``, the other's time over the baseline's, with its ``error``.
        The first block of each, in which memory and kernels are found, does not count.
    """
    start = time.monotonic()
    folders = [folder / f"run{number}" for number in range(2)]
    trainers = []
    for recipe, own in zip(recipes, folders, strict=True):
        if (folders[0] / "tokenizer").is_dir():  # the same text: no need to count its words again
            shutil.copytree(folders[0] / "tokenizer", own / "tokenizer", dirs_exist_ok=True)
        trainers.append(_prepare(recipe, own, draw_on))
    steps = recipes[0].stages[0].max_steps
    if steps % block or steps < 3 * block:
        raise SystemExit(f"--steps {steps} are no multiple of --block {block}, or less than three blocks")
    first, second = train_in_turn(trainers, steps=block, blocks=steps // block)
    facts = [_facts(trainer, own) for trainer, own in zip(trainers, folders, strict=True)]
    return {
        "device": facts[0]["device"],
        "block": block,
        "pairs": steps // block - 1,
        **compare(first[1:], second[1:]),
        "seconds": round(time.monotonic() - start, 1),
        "recipes": {recipe.name: fact for recipe, fact in zip(recipes, facts, strict=True)},
        "block_seconds": [first, second],
    }


def _prepare(recipe: Recipe, folder: Path, draw_on: str | None) -> StageTrainer:
    """The trainer of the recipe's one stage, which saves and validates nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    PartialState(cpu=device == "cpu")
    context = open_run(recipe, folder, RunState(folder, recipe), Console(stderr=True))
    stage = with_accumulation(recipe.stages[0], 1)
    set_seed(recipe.seed)
    trainer: StageTrainer
    if stage.kind == "language":
        trainer, _ = prepare_language(stage, context)
    else:
        with torch.device(draw_on or device):  # drawing billions of random weights takes minutes on a CPU
            trainer, _ = prepare_multimodal(stage, context)
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"
    trainer.args.eval_on_start = False
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RoutingLog):
            callback.points = 1  # twenty over a stage are one in a thousand steps of a real one, and every other here
    return trainer


def _facts(trainer: StageTrainer, folder: Path) -> dict[str, Any]:
    """What the run's log says, and what was run."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [entry for entry in log if "loss" in entry]
    settled = log[2:] or log
    speeds = {
        name: statistics.median(found)
        for name in SPEEDS
        if (found := [entry[f"runtime/{name}"] for entry in settled if f"runtime/{name}" in entry])
    }
    losses = [entry["loss"] for entry in log]
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"a loss is not finite: {losses}")
    parameters = list(trainer.model.parameters())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "steps": trainer.state.global_step,
        "batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        **speeds,
        "peak_memory_gib": max(entry.get("runtime/memory_gib", 0.0) for entry in log),
        "losses": losses,
    }


def _without_lists(result: dict[str, Any]) -> dict[str, Any]:
    """The result as it is printed."""
    nested = {key: _without_lists(value) for key, value in result.items() if isinstance(value, dict)}
    return {key: nested.get(key, value) for key, value in result.items() if not isinstance(value, list)}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_stage", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe's name or YAML file")
    parser.add_argument("stage", help="the name of one of its multimodal or language stages")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--against", help="a second recipe, to be trained in turn with the first")
    parser.add_argument(
        "--block", type=int, default=5, help="with --against: steps before the other's turn (default 5)"
    )
    parser.add_argument("--image-size", type=int, default=336, help="pixels of the generated pictures (default 336)")
    parser.add_argument("--draw-on", default=None, help="device on which random weights are drawn (default: the GPU)")
    parser.add_argument("--profile", type=Path, help="file for a table of where the time of the steps went")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("settings", nargs="*", help="key=value for the stage; model.KEY=VALUE for the model")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
