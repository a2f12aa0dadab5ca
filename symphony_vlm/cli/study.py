"""The command that runs studies."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Optional

import typer

from symphony_vlm.cli.application import Json, Overrides, app, console, finish

__all__: list[str] = []


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A YAML file, or the name of one in studies/.")],
    output: Annotated[Optional[Path], typer.Option(help="The study's folder; default runs/studies/NAME.")] = None,  # noqa: UP045
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Jobs at a time; default: one per GPU, or else one per core.", min=1),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each.", min=1)] = 1,
    json_: Json = False,
    overrides: Overrides = None,
) -> None:
    """Train and measure every arm with every seed, then tables with intervals; the same command again continues.

    Example: symphony-vlm study wikitext2_tiny texts.wikitext2.path=wiki.valid.tokens
    """
    from symphony_vlm.study.configuration import load_study
    from symphony_vlm.study.run import run_study
    from symphony_vlm.study.runner import visible_gpus

    found = load_study(name, overrides or [])
    folder = output or Path("runs") / "studies" / found.name
    result = run_study(
        found,
        folder,
        at_once=jobs or len(visible_gpus()) or os.cpu_count() or 1,
        threads=threads,
        command=shlex.join(["symphony-vlm", "study", name, *(overrides or [])]),
        console=console(),
    )
    finish(result.to_dict(), json_, f"results: {result.results}\ntables: {result.page}")
    if result.failures:
        for cell, said in result.failures.items():
            console().print(f"{cell} failed:\n{said}", markup=False)
        raise typer.Exit(1)
