"""Commands that show recipes and prepared data."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from symphony_vlm.cli.application import Json, Overrides, config_app, finish

__all__: list[str] = []


@config_app.command("list")
def config_list(json_: Json = False) -> None:
    """List the packaged recipes, and the public data sets that a recipe can use by name (data=NAME).

    Example: symphony-vlm config list
    """
    from symphony_vlm.config.loading import list_recipes, load_recipe
    from symphony_vlm.config.prepared import list_prepared, load_prepared

    recipes = {name: load_recipe(name).description for name in list_recipes()}
    data = {name: load_prepared(name) for name in list_prepared()}
    groups = [("recipes", recipes)]
    for purpose in ("training", "evaluation"):
        groups.append(
            (f"{purpose} data", {n: found.description for n, found in data.items() if found.purpose == purpose})
        )
    width = max(len(name) for _, rows in groups for name in rows)
    tables = (
        f"{title}\n" + "\n".join(f"  {name:{width}} {text}" for name, text in rows.items()) for title, rows in groups
    )
    finish({"recipes": list(recipes), "data": list(data)}, json_, "\n\n".join(tables))


@config_app.command("show")
def config_show(
    name: Annotated[str, typer.Argument(help="A recipe or its YAML file, or prepared data.")],
    overrides: Overrides = None,
) -> None:
    """Print a recipe with every default filled in, or what is known of prepared data.

    Example: symphony-vlm config show quickstart seed=1
    """
    import yaml

    from symphony_vlm.config.loading import list_recipes, load_recipe
    from symphony_vlm.config.prepared import list_prepared, load_prepared

    is_data = name in list_prepared() and name not in list_recipes() and not overrides
    found = load_prepared(name) if is_data else load_recipe(name, overrides or [])
    typer.echo(yaml.safe_dump(json.loads(found.model_dump_json(exclude_none=is_data)), sort_keys=False).rstrip())
