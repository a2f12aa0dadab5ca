"""Commands that show recipes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from symphony_vlm.cli.application import Json, Overrides, config_app, finish

__all__: list[str] = []


@config_app.command("list")
def config_list(json_: Json = False) -> None:
    """List the packaged recipes.

    Example: symphony-vlm config list
    """
    from symphony_vlm.config.loading import list_recipes, load_recipe

    recipes = {name: load_recipe(name).description for name in list_recipes()}
    finish({"recipes": list(recipes)}, json_, "\n".join(f"{name:16} {text}" for name, text in recipes.items()))


@config_app.command("show")
def config_show(name: Annotated[str, typer.Argument(help="Name or YAML file.")], overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in.

    Example: symphony-vlm config show quickstart seed=1
    """
    import yaml

    from symphony_vlm.config.loading import load_recipe

    typer.echo(yaml.safe_dump(json.loads(load_recipe(name, overrides or []).model_dump_json()), sort_keys=False))
