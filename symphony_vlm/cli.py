"""The command line. Heavy libraries are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from symphony_vlm.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="symphony-vlm",
    help="Train, evaluate and talk to vision-language models with mixture-of-experts and Symphony routers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Make and inspect data.", no_args_is_help=True)
config_app = typer.Typer(help="Show recipes.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable summary as the last line.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings, e.g. stages.instruct.epochs=2", metavar="A.B=C")]


def _console() -> Console:
    # Log lines stay whole where there is no terminal to wrap them for.
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _finish(summary: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(summary) if as_json else text)


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

    routers = _names(router)
    for name in routers:
        MoEConfig(router=name)
    recipe = load_recipe("quickstart", [f"seed={seed}", *(overrides or [])])
    from symphony_vlm.quickstart import quickstart as run

    summary = run(recipe, output, routers, console=_console())
    lines = [
        f"{name}: accuracy {values['scenes/none/0']:.3f} on clean pictures, "
        f"{_mean(v for k, v in values.items() if k != 'scenes/none/0'):.3f} on corrupted ones"
        for name, values in summary["headline"].items()
    ]
    lines.append(f"without the picture: {summary['text_only']:.3f}")
    lines += [f"report: {summary['report']}", f"results: {summary['results']}"]
    _finish(summary, json_, "\n".join(lines))


@data_app.command("scenes")
def data_scenes(
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    train: Annotated[int, typer.Option(help="Training pictures.")] = 4000,
    test: Annotated[int, typer.Option(help="Test pictures.")] = 400,
    seed: Annotated[int, typer.Option(help="Equal arguments give equal bytes.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side in pixels.")] = 64,
    json_: Json = False,
) -> None:
    """Draw the built-in scenes as LLaVA JSON and PNG.

    Example: symphony-vlm data scenes --output scenes --train 1000 --test 100
    """
    from symphony_vlm.data.scenes import generate_scenes

    made = generate_scenes(output, train=train, test=test, seed=seed, image_size=image_size)
    summary = {"output": str(output), "train": made.train_images, "test": made.test_images, "sha256": made.sha256}
    _finish(summary, json_, f"{made.train_images} training and {made.test_images} test pictures in {output}")


@app.command()
def train(
    config: Annotated[str, typer.Option(help="A recipe's name (see `config list`) or a YAML file.")],
    output: Annotated[Optional[Path], typer.Option(help="The run's folder; default runs/NAME.")] = None,  # noqa: UP045
    json_: Json = False,
    overrides: Overrides = None,
) -> None:
    """Run a recipe's stages; run the same command again to continue.

    Example: symphony-vlm train --config cifar10_vqa data.train=train.parquet
    """
    from symphony_vlm.config.loading import load_recipe

    recipe = load_recipe(config, overrides or [])
    from symphony_vlm.training.run import train as run

    result = run(recipe, output or Path("runs") / recipe.name, console=_console())
    if os.environ.get("RANK", "0") == "0":
        _finish(result.to_dict(), json_, f"model: {result.run / 'model'} (step {result.step}, loss {result.loss:.4f})")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    output: Annotated[Path, typer.Option(help="Folder for results and predictions.")],
    task: Annotated[
        str | None, typer.Option(help="scenes, short_answer; default short_answer if --data is given.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="LLaVA JSON or JSONL, or parquet with image, question, answer.")
    ] = None,
    image_folder: Annotated[Optional[Path], typer.Option(help="Base of the records' image paths.")] = None,  # noqa: UP045
    corruption: Annotated[str, typer.Option(help="Names separated by commas, common (15), all (19) or none.")] = "none",
    severity: Annotated[str, typer.Option(help="1 to 5, separated by commas.")] = "1,2,3,4,5",
    limit: Annotated[
        int | None, typer.Option(help="About so many questions per cell, of whole pictures.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the subset and the corruptions.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 64,
    max_new_tokens: Annotated[Optional[int], typer.Option(help="Longest answer; default: the task's.", min=1)] = None,  # noqa: UP045
    json_: Json = False,
) -> None:
    """Evaluate a model, clean and on corrupted pictures; run the same command again to continue.

    Example: symphony-vlm eval --model runs/quickstart/smoe/model --task scenes --corruption fog --output out
    """
    from symphony_vlm.evaluation.corruptions import parse_corruptions

    tasks = _names(task) if task else (["short_answer"] if data else [])
    if not tasks:
        raise InputError("neither a task nor data was given", where="eval", remedy="Add --task scenes or --data FILE.")
    corruptions = parse_corruptions(corruption)
    severities = _severities(severity)
    from symphony_vlm.evaluation.report import write_report
    from symphony_vlm.evaluation.runner import EvaluationPlan
    from symphony_vlm.evaluation.runner import evaluate as run

    plan = EvaluationPlan(
        model=model,
        tasks=tuple(tasks),
        data=data,
        image_folder=image_folder,
        corruptions=tuple(corruptions),
        severities=severities,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    summary = run(plan, output, console=_console())
    report = write_report([output], output)
    lines = [f"{cell}: {'no score' if v is None else f'{v:.4f}'}" for cell, v in summary.headline.items()]
    _finish(summary.to_dict(), json_, "\n".join([*lines, f"results: {summary.results}", f"report: {report}"]))
    if summary.num_errors:
        _console().print(f"{summary.num_errors} items failed; their records name the reason")
        raise typer.Exit(3)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders written by eval; the first is the baseline.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html and the tables.")],
    json_: Json = False,
) -> None:
    """Put evaluations of several models into one page and tables.

    Example: symphony-vlm report out/smoe out/symphony_smoe --output out/report
    """
    from symphony_vlm.evaluation.report import write_report

    page = write_report(results, output)
    _finish({"report": str(page), "results": str(output / "results.json")}, json_, str(page))


@app.command("inspect")
def inspect_routers(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    output: Annotated[Optional[Path], typer.Option(help="Folder for inspect.json and figures (PNG).")] = None,  # noqa: UP045
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Conversations to measure load and entropy on; default: the training log's."),
    ] = None,
    image_folder: Annotated[Optional[Path], typer.Option(help="Base of the records' image paths.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="Records to run; default 256.", min=1)] = None,  # noqa: UP045
    json_: Json = False,
) -> None:
    """Show what the routers of a model do: load, entropy and the expert graph of every sparse layer.

    Example: symphony-vlm inspect --model runs/quickstart/symphony_smoe/model --output out
    """
    from symphony_vlm.evaluation.inspection import inspect_model, summary, table, write_inspection

    found = inspect_model(model, data=data, image_folder=image_folder, limit=limit, console=_console())
    paths = write_inspection(found, output) if output else []
    if not json_:
        wide = Console(highlight=False)
        wide.print(table(found), width=None if wide.is_terminal else 120)
    _finish(summary(found, paths), json_, "\n".join(map(str, paths)) or "add --output DIR for figures and inspect.json")


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

    difference = upcycle_checkpoint(local_folder(model), output, settings, seed=seed, report=_console().print)
    summary = {"max_logit_difference": difference, "output": str(output)}
    _finish(summary, json_, f"largest difference of the logits: {difference:.2e}\nmodel: {output}")


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
    _finish(summary, json_, f"largest difference of the logits (fp32): {difference:.2e}\nmodel: {output}")


@app.command()
def corrupt(
    image: Annotated[Path, typer.Argument(help="Picture to corrupt.")],
    corruption: Annotated[str, typer.Option(help="Name, e.g. fog.")],
    severity: Annotated[int, typer.Option(help="1 to 5.")],
    output: Annotated[Path, typer.Option(help="PNG to write.")],
    seed: Annotated[int, typer.Option(help="Equal arguments give equal pixels.")] = 0,
    json_: Json = False,
) -> None:
    """Corrupt one picture.

    Example: symphony-vlm corrupt photo.jpg --corruption fog --severity 3 --output foggy.png
    """
    import numpy as np
    from PIL import Image

    from symphony_vlm.data.images import image_bytes, load_image
    from symphony_vlm.data.sample import ImageRef
    from symphony_vlm.evaluation.corruptions import corrupt as apply
    from symphony_vlm.evaluation.corruptions import corruption_rng, image_key

    ref = ImageRef(path=image, name=str(image))
    pixels = np.asarray(load_image(ref))
    rng = corruption_rng(image_key(image_bytes(ref)), corruption, severity, seed)
    Image.fromarray(apply(pixels, corruption, severity, rng)).save(output, format="PNG")
    _finish({"output": str(output)}, json_, str(output))


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    image: Annotated[Optional[list[Path]], typer.Option(help="Picture; may be given several times.")] = None,  # noqa: UP045
    prompt: Annotated[Optional[str], typer.Option(help="One question; without it, an interactive chat.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
) -> None:
    """Ask a model about a picture, in the terminal.

    Example: symphony-vlm chat --model runs/quickstart/symphony_smoe/model --image a.png --prompt "What shape is it?"
    """
    from symphony_vlm.serving.terminal import run_terminal_chat

    run_terminal_chat(model, [*(image or [])], prompt, max_new_tokens=max_new_tokens)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Folder of a model or of a finished run, or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 7860,
) -> None:
    """Open a chat page in the browser.

    Example: symphony-vlm demo --model runs/quickstart/symphony_smoe/model
    """
    from symphony_vlm.serving.gradio_app import launch

    launch(model, host=host, port=port)


@config_app.command("list")
def config_list(json_: Json = False) -> None:
    """List the packaged recipes.

    Example: symphony-vlm config list
    """
    from symphony_vlm.config.loading import list_recipes, load_recipe

    recipes = {name: load_recipe(name).description for name in list_recipes()}
    _finish({"recipes": list(recipes)}, json_, "\n".join(f"{name:16} {text}" for name, text in recipes.items()))


@config_app.command("show")
def config_show(name: Annotated[str, typer.Argument(help="Name or YAML file.")], overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in.

    Example: symphony-vlm config show quickstart seed=1
    """
    import yaml

    from symphony_vlm.config.loading import load_recipe

    typer.echo(yaml.safe_dump(json.loads(load_recipe(name, overrides or []).model_dump_json()), sort_keys=False))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _severities(text: str) -> tuple[int, ...]:
    values = _names(text)
    if not values or any(value not in ("1", "2", "3", "4", "5") for value in values):
        raise InputError(f"{text!r} must be numbers from 1 to 5 separated by commas", where="--severity")
    return tuple(sorted({int(value) for value in values}))


def _mean(values: Any) -> float:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else float("nan")


STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns bad input into one line and exit code 2.

    ``--debug`` anywhere on the line keeps the traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    try:
        code = app(arguments, standalone_mode=False, prog_name="symphony-vlm")
        if code == STOPPED:  # newer typer returns the code, older ones raise
            raise KeyboardInterrupt
    except InputError as error:
        if debug:
            raise
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.secho("stopped; run the same command again to continue", err=True, fg="yellow")
        sys.exit(STOPPED)
    except Exception as error:  # our fault, or the machine's: one line unless somebody wants to debug it
        if debug or not _is_usage(error):
            if debug:
                raise
            typer.secho(f"failed: {type(error).__name__}: {error}", err=True, fg="red")
            typer.secho("add --debug for the traceback", err=True)
            sys.exit(1)
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _is_usage(error: Exception) -> bool:
    """Whether typer's parser refused the command line."""
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _quiet_libraries() -> None:
    """Libraries' own bars and notices would bury ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


if __name__ == "__main__":
    main()
