"""Real steps of one stage of a recipe: samples and tokens per second, model FLOPs utilisation, peak memory.

Example: python -m benchmarks.train_stage symphony_4b instruct --steps 20 --json symphony_4b.json batch_size=8

The stage runs as ``symphony-vlm train`` runs it, by the same trainer, with the recipe's model in full size, but with
random weights (which do not move the time), on generated pictures with eight questions each, and nothing is saved.
Settings of the stage can be changed by ``key=value``. One process; engines that need several are set to ``auto``.
"""

from __future__ import annotations

import argparse
import json
import math
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

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.files import write_json
from symphony_vlm.training.engine import with_accumulation
from symphony_vlm.training.provenance import provenance
from symphony_vlm.training.run import open_run
from symphony_vlm.training.run_state import RunState
from symphony_vlm.training.stages import prepare_multimodal

__all__ = ["main", "measure_stage"]

SPEEDS = ("samples_per_second", "tokens_per_second", "images_per_second", "model_tflops", "mfu", "memory_gib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_stage", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe's name or YAML file")
    parser.add_argument("stage", help="the name of one of its multimodal stages")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--image-size", type=int, default=336, help="pixels of the generated pictures (default 336)")
    parser.add_argument("--draw-on", default=None, help="device on which random weights are drawn (default: the GPU)")
    parser.add_argument("--profile", type=Path, help="file for a table of where the time of the steps went")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("settings", nargs="*", help="key=value for the stage; model.KEY=VALUE for the model")
    options = parser.parse_intermixed_args(arguments)
    recipe = _only_stage(options.recipe, options.stage, options.settings, options.steps, options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        result = measure_stage(recipe, Path(folder), draw_on=options.draw_on, profile_to=options.profile)
    if options.json is not None:
        facts = provenance(recipe=recipe.name, stage=options.stage, device=result["device"])
        write_json(options.json, {"provenance": facts, "settings": options.settings, **result})
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1))


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    PartialState(cpu=device == "cpu")
    context = open_run(recipe, folder, RunState(folder, recipe), Console(stderr=True))
    stage = with_accumulation(recipe.stages[0], 1)
    start = time.monotonic()
    with torch.device(draw_on or device):  # drawing billions of random weights takes minutes on a CPU
        trainer, model = prepare_multimodal(stage, context)
    trainer.args.save_strategy = trainer.args.eval_strategy = "no"
    trainer.args.eval_on_start = False
    watched: Any = profile() if profile_to is not None else nullcontext()
    with watched as profiler:
        trainer.train()
    if profile_to is not None:
        order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        profile_to.write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80))
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
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "steps": trainer.state.global_step,
        "batch_size": stage.batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "seconds": round(time.monotonic() - start, 1),
        **speeds,
        "peak_memory_gib": max(entry.get("runtime/memory_gib", 0.0) for entry in log),
        "losses": losses,
    }


def _only_stage(name: str, stage: str, settings: Sequence[str], steps: int, image_size: int) -> Recipe:
    """The recipe with that stage alone, on generated data."""
    of_model = [item for item in settings if item.startswith("model.")]
    of_stage = [f"stages.{stage}.{item}" for item in settings if item not in of_model]
    fixed = [
        *of_stage,
        *of_model,
        f"stages.{stage}.max_steps={steps}",
        f"stages.{stage}.log_steps=1",
        f"stages.{stage}.engine=auto",
        "model.random_weights=true",
    ]
    recipe = load_recipe(name, fixed)
    chosen = next(found for found in recipe.stages if found.name == stage)
    samples = steps * (chosen.global_batch_size or chosen.batch_size * chosen.gradient_accumulation_steps)
    scenes = {"train": samples + 64, "test": 1, "image_size": image_size, "questions_per_image": 8}
    values = recipe.model_dump(mode="json")
    values["data"] = {"scenes": scenes, "check_images": False, "validation_fraction": 0.0}
    values["stages"] = [{**chosen.model_dump(mode="json"), "data": "train", "template": None}]
    if chosen.upcycle is False:
        values["model"]["moe"] = None
    return Recipe.model_validate(values)


if __name__ == "__main__":
    main()
