"""Commands that make models: the quickstart, training, upcycling, merging adapters, export."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Optional

import typer

from symphony_vlm.cli.application import Json, Overrides, app, console, finish, names
from symphony_vlm.cli.memory import keep_freed_memory

__all__: list[str] = []

LocalRank = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--local_rank", "--local-rank", hidden=True, help="Set by the deepspeed launcher."),
]


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(help="Seed of the data, the weights and the order.")] = 0,
    router: Annotated[str, typer.Option(help="Routers to compare, the baseline first.")] = "smoe,symphony_smoe",
    json_: Json = False,
    overrides: Overrides = None,
) -> None:
    """Train and evaluate two routers on generated scenes, from nothing to a report, on a CPU.

    Example: symphony-vlm quickstart --output runs/quickstart
    """
    from symphony_vlm.config.loading import load_recipe
    from symphony_vlm.moe.configuration import MoEConfig

    routers = names(router)
    for name in routers:
        MoEConfig(router=name)
    recipe = load_recipe("quickstart", [f"seed={seed}", *(overrides or [])])
    from symphony_vlm.quickstart import quickstart as run

    keep_freed_memory()
    summary = run(recipe, output, routers, console=console())
    lines = [
        f"{name}: accuracy {values['scenes/none/0']:.3f} on clean pictures, "
        f"{_mean(v for k, v in values.items() if k != 'scenes/none/0'):.3f} on corrupted ones"
        for name, values in summary["headline"].items()
    ]
    lines.append(f"without the picture: {summary['text_only']:.3f}")
    lines += [f"report: {summary['report']}", f"results: {summary['results']}"]
    finish(summary, json_, "\n".join(lines))


@app.command()
def train(
    config: Annotated[str, typer.Option(help="A recipe's name (see `config list`) or a YAML file.")],
    output: Annotated[Optional[Path], typer.Option(help="The run's folder; default runs/NAME.")] = None,  # noqa: UP045
    profile: Annotated[
        int, typer.Option(min=0, metavar="N", help="Profile N steps of each stage: a trace and a table in its folder.")
    ] = 0,
    json_: Json = False,
    local_rank: LocalRank = None,
    overrides: Overrides = None,
) -> None:
    """Run a recipe's stages; run the same command again to continue.

    Example: symphony-vlm train --config cifar10_vqa data.train=train.parquet
    """
    from symphony_vlm.config.loading import load_recipe

    recipe = load_recipe(config, overrides or [])
    from symphony_vlm.training.run import train as run

    keep_freed_memory()
    folder = output or Path("runs") / recipe.name
    result = run(recipe, folder, console=console(), local_rank=local_rank, profile_steps=profile)
    if os.environ.get("RANK", "0") == "0":
        finish(result.to_dict(), json_, f"model: {result.run / 'model'} (step {result.step}, loss {result.loss:.4f})")


@app.command()
def upcycle(
    model: Annotated[str, typer.Option(help="Folder of a dense causal LM or vision-language model, or a hub name.")],
    config: Annotated[str, typer.Option(help="A recipe with model.moe, or a YAML file with those settings.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    seed: Annotated[int, typer.Option(help="Of the new gates and of noise.")] = 0,
    json_: Json = False,
    overrides: Overrides = None,
) -> None:
    """Turn a dense model into a mixture of experts, shard by shard, and prove that its logits are the same.

    Example: symphony-vlm upcycle --model Qwen3-0.6B --config quickstart --output moe model.moe.num_experts=8
    """
    from symphony_vlm.config.loading import load_moe_settings

    settings = load_moe_settings(config, overrides or [])
    from symphony_vlm.model.loading import local_folder
    from symphony_vlm.moe.convert import upcycle_checkpoint

    difference = upcycle_checkpoint(local_folder(model), output, settings, seed=seed, report=console().print)
    summary = {"max_logit_difference": difference, "output": str(output)}
    finish(summary, json_, f"largest difference of the logits: {difference:.2e}\nmodel: {output}")


@app.command()
def merge(
    model: Annotated[str, typer.Option(help="Folder of a model with adapters or of a finished run, or a hub name.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    json_: Json = False,
) -> None:
    """Write the plain model of a LoRA stage, adapters and base in one, and prove that its logits are the same.

    Example: symphony-vlm merge --model runs/lora --output merged
    """
    from symphony_vlm.model.merged_checkpoint import merge_checkpoint

    difference = merge_checkpoint(model, output)
    summary = {"max_logit_difference": difference, "output": str(output)}
    finish(summary, json_, f"largest difference of the logits (fp32): {difference:.2e}\nmodel: {output}")


@app.command()
def export(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    format: Annotated[str, typer.Option(help="transformers: a checkpoint of its own classes.")] = "transformers",
    json_: Json = False,
) -> None:
    """Fold the expert graph into the gates and write a checkpoint that runs without this package, proven equal.

    Example: symphony-vlm export --model runs/moe --format transformers --output stock
    """
    from symphony_vlm.model.export import export_checkpoint

    difference = export_checkpoint(model, output, format)
    summary = {"max_logit_difference": difference, "output": str(output)}
    finish(summary, json_, f"largest difference of the logits (fp32): {difference:.2e}\nmodel: {output}")


def _mean(values: Iterable[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else float("nan")
