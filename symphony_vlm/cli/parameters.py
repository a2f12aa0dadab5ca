"""The command that counts parameters, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from symphony_vlm.cli.application import Json, Overrides, config_app, finish

if TYPE_CHECKING:
    from symphony_vlm.training.parameter_counts import Count, RecipeCounts, StageCount

__all__: list[str] = []

NOTES = """Active: what one token passes, of E experts K. Memory: weights, gradients, optimizer of one process, without
activations. Among N processes zero1 divides the optimizer by N, zero2 the gradients too, zero3 and fsdp2 all three; an
..._offload engine keeps the optimizer (zero3: the weights too) in the host's memory."""


@config_app.command("params")
def config_params(
    name: Annotated[str, typer.Argument(help="A recipe, its YAML file, a saved model's folder, or a known hub id.")],
    json_: Json = False,
    overrides: Overrides = None,
) -> None:
    """Count a model's parameters without building it: in all, active, by module; what each stage trains.

    Example: symphony-vlm config params symphony_4b model.moe.num_experts=8
    """
    from symphony_vlm.config.loading import load_recipe
    from symphony_vlm.errors import InputError

    if (found := _alone(name)) is None:
        recipe = load_recipe(name, overrides or [])
        from symphony_vlm.training.parameter_counts import count_recipe

        counts = count_recipe(recipe)
    elif overrides:
        raise InputError(f"{overrides[0]!r} is a setting of a recipe, and {name} is a model", where="config params")
    else:
        counts = found
    summary = counts.to_dict()
    if json_:
        finish(summary, True, "")
        return
    # Piped output must not depend on the width of a terminal that nobody sees.
    screen = Console(highlight=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=120)
    screen.print(_modules(counts.modules, counts.whole))
    if counts.stages:
        screen.print(_stages(counts.stages))
        screen.print(NOTES, style="dim")


def _alone(name: str) -> RecipeCounts | None:
    """Counts of a model that is no recipe: a folder's, or a part's known by its hub id."""
    from symphony_vlm.config.loading import list_recipes
    from symphony_vlm.config.models import list_known_models, load_known_model
    from symphony_vlm.errors import InputError
    from symphony_vlm.text import nearest

    path = Path(name)
    if name in list_recipes() or path.suffix in (".yaml", ".yml") or not (path.is_dir() or "/" in name):
        return None
    known = {model.hub_id: model for model in map(load_known_model, list_known_models())}
    if not path.is_dir() and name not in known:
        raise InputError(
            f"neither a local folder nor a model known offline{nearest(name, known)}",
            where=name,
            remedy=f"Known: {', '.join(known)}; recipes: see symphony-vlm config list.",
        )
    from symphony_vlm.training.parameter_counts import RecipeCounts, count_folder, count_known

    return RecipeCounts(modules=count_folder(name) if path.is_dir() else count_known(known[name]), stages=[])


def _modules(modules: dict[str, Count], whole: Count) -> Table:
    table = _table("module", "total", "active")
    for name, count in modules.items():
        table.add_row(name, f"{count.total:,}", f"{count.active:,}")
    table.add_section()
    table.add_row("in all", f"{whole.total:,} ({_short(whole.total)})", f"{whole.active:,} ({_short(whole.active)})")
    return table


def _stages(stages: list[StageCount]) -> Table:
    table = _table("stage", "trains", "parameters", "weights", "gradients", "optimizer", "memory")
    for stage in stages:
        sizes = [stage.weights, stage.gradients, stage.optimizer, stage.memory]
        trained = sum(stage.trainable.values())
        table.add_row(stage.name, ", ".join(stage.trainable), f"{trained:,}", *map(_bytes, sizes))
    return table


def _table(*columns: str) -> Table:
    table: Any = Table(box=None, pad_edge=False, padding=(0, 2))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column != "trains" else "left")
    return table


def _short(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.3f}B"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
