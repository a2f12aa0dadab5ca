"""Commands about data: generated scenes, held-out records, and the check before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer
from rich.console import Console

from symphony_vlm.cli.application import Json, Overrides, console, data_app, finish
from symphony_vlm.errors import InputError

if TYPE_CHECKING:
    from symphony_vlm.config.recipe import Recipe

__all__: list[str] = []


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
    finish(summary, json_, f"{made.train_images} training and {made.test_images} test pictures in {output}")


@data_app.command("split")
def data_split(
    data: Annotated[Path, typer.Option(help="LLaVA JSON or JSONL.")],
    output: Annotated[Path, typer.Option(help="New folder for the files train and test.")],
    image_folder: Annotated[Optional[Path], typer.Option(help="Base of the records' image paths.")] = None,  # noqa: UP045
    fraction: Annotated[float, typer.Option(help="Share of the records to hold out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed holds out other images.")] = 0,
    json_: Json = False,
) -> None:
    """Divide a data file into one to train on and one to test on, so that no image is in both.

    Example: symphony-vlm data split --data all.json --image-folder images --output parts --fraction 0.1
    """
    from symphony_vlm.data.datasets import open_samples
    from symphony_vlm.data.held_out import write_held_out

    made = write_held_out(open_samples(data, image_folder=image_folder), output, fraction=fraction, seed=seed)
    numbers = {"train": made.train_records, "test": made.test_records}
    summary = {"train": str(made.train), "test": str(made.test), "records": numbers}
    lines = [
        f"{sum(made.train_records.values())} records in {made.train}, {sum(made.test_records.values())} in {made.test}",
        *(
            f"  {name or 'without source'}: {made.train_records.get(name, 0)} and {made.test_records.get(name, 0)}"
            for name in sorted(made.train_records.keys() | made.test_records.keys())
        ),
    ]
    finish(summary, json_, "\n".join(lines))


@data_app.command("check")
def data_check(
    data: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="LLaVA JSON or JSONL, parquet, or a folder; may be given several times."),
    ] = None,
    image_folder: Annotated[Optional[Path], typer.Option(help="Base of the records' image paths.")] = None,  # noqa: UP045
    config: Annotated[Optional[str], typer.Option(help="Check a recipe's data instead.")] = None,  # noqa: UP045
    show: Annotated[int, typer.Option(help="Samples to show with every token and image coloured.", min=0)] = 0,
    ids: Annotated[bool, typer.Option("--ids", help="Show each token's number in the samples.")] = False,
    model: Annotated[Optional[str], typer.Option(help="Check tokens with this model's processor.")] = None,  # noqa: UP045
    tokenizer: Annotated[Optional[str], typer.Option(help="Check tokens with this tokenizer.")] = None,  # noqa: UP045
    template: Annotated[Optional[str], typer.Option(help="Layout of conversations; default: the model's.")] = None,  # noqa: UP045
    max_length: Annotated[Optional[int], typer.Option(help="Longest record in tokens.", min=1)] = None,  # noqa: UP045
    image_tokens: Annotated[Optional[int], typer.Option(help="Tokens an image; default 576.", min=1)] = None,  # noqa: UP045
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for check.html, check.json and faults.jsonl."),
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of an image.", min=1)] = 89_478_485,
    max_file_bytes: Annotated[int, typer.Option(help="Largest image file.", min=1)] = 100_000_000,
    max_aspect_ratio: Annotated[float, typer.Option(help="Longest side over shortest.", min=1.0)] = 100.0,
    min_side: Annotated[int, typer.Option(help="Shortest side of an image in pixels.", min=1)] = 1,
    duplicate_ids: Annotated[
        Literal["fault", "note"], typer.Option(help="What different records with one id are.")
    ] = "fault",
    json_: Json = False,
    overrides: Overrides = None,
) -> None:
    """Check data before training: every record, every picture, and with a tokenizer every token. Faults exit with 1.

    Example: symphony-vlm data check --data train.json --image-folder images --output check
    """
    from symphony_vlm.cli.check_tokens import TokenChoice, open_tokenization

    recipe = _recipe(config, data, overrides)
    choice = TokenChoice(
        model=model, tokenizer=tokenizer, template=template, image_tokens=image_tokens, max_length=max_length
    )
    tokenization = open_tokenization(choice, recipe)
    from symphony_vlm.data.check.images import ImageLimits
    from symphony_vlm.data.check.progress import show_progress
    from symphony_vlm.data.check.run import CheckOptions, check_data, choose_views
    from symphony_vlm.data.check.summary import json_line, write_files
    from symphony_vlm.data.check.terminal import render_report, render_samples
    from symphony_vlm.data.check.tokens import TokenCheck
    from symphony_vlm.data.datasets import open_samples

    files = _recipe_sources(recipe, image_folder) if recipe else [(path, image_folder, {}) for path in data or []]
    sources = [open_samples(path, image_folder=folder, **part) for path, folder, part in files]
    limits = ImageLimits(
        max_pixels=max_pixels, max_bytes=max_file_bytes, max_aspect_ratio=max_aspect_ratio, min_side=min_side
    )
    options = CheckOptions(limits=limits, duplicate_ids=duplicate_ids)
    with show_progress(console()) as progress:
        tokens = TokenCheck(tokenization) if tokenization else None
        report = check_data(sources, options=options, tokens=tokens, progress=progress)
    views = choose_views(sources, show or (PAGE_SAMPLES if output else 0), tokenization)
    paths = write_files(report, views, output) if output else {}
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=120)
    if show:
        screen.print(render_samples(views, ids=ids))
    if json_:
        for piece in json_line(report):
            typer.echo(piece, nl=False)
        typer.echo()
    else:
        screen.print(render_report(report))
        for path in paths.values():
            typer.echo(path)
    if report.faults:
        raise typer.Exit(1)


PAGE_SAMPLES = 8
"""Samples in the page unless ``--show`` asks for another number."""


def _recipe(config: str | None, data: list[Path] | None, overrides: list[str] | None) -> Recipe | None:
    if (config is None) == (not data):
        problem = "give either a recipe or data files" + ("" if config is None else ", not both")
        raise InputError(problem, where="data check", remedy="Add --config NAME, or --data FILE.")
    if config is None:
        if overrides:
            raise InputError(f"{overrides[0]!r} is a setting of a recipe", where="data check", remedy="Add --config.")
        return None
    from symphony_vlm.config.loading import load_recipe

    return load_recipe(config, overrides or [])


def _recipe_sources(
    recipe: Recipe, image_folder: Path | None
) -> list[tuple[Path, Path | str | None, dict[str, str | None]]]:
    """(path, image folder, split and subset) of all that the recipe trains on, each once, in its order."""
    data = recipe.data
    sources = dict.fromkeys([*(data.train or []), *(data.captions or []), *(data.prefinetune or [])])
    if not sources:
        drawn = "; its scenes are drawn when it runs" if data.scenes is not None else ""
        raise InputError(
            f"the recipe names no data file{drawn}", where="data.train", remedy="Add data.train=FILE to the command."
        )
    found = []
    for source in sources:
        folder = image_folder or source.image_folder or data.image_folder
        part = {"split": source.split, "subset": source.subset}
        found.append((Path(source.path).expanduser(), Path(folder).expanduser() if folder else None, part))
    return list({repr(each): each for each in found}.values())
