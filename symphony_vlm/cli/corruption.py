"""The command that corrupts a picture, once or in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from symphony_vlm.cli.application import Json, app, console, finish
from symphony_vlm.errors import InputError

__all__: list[str] = []

GRID_SIZE = 224
"""Longer side of a picture on a sheet unless ``--size`` says otherwise: ImageNet-C's."""


@app.command()
def corrupt(
    image: Annotated[Path, typer.Argument(help="Picture to corrupt.")],
    output: Annotated[Path, typer.Option(help="Picture to write: .png, .jpg or .webp.")],
    corruption: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Name, e.g. fog; with --grid names separated by commas, common (15) or all (19, default)."),
    ] = None,
    severity: Annotated[Optional[int], typer.Option(help="1 to 5; with --grid always all five.")] = None,  # noqa: UP045
    grid: Annotated[bool, typer.Option("--grid", help="All corruptions at all severities on one sheet.")] = False,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Resize the picture to this longer side first; default: its own, with --grid 224.", min=1, max=4096
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal arguments give equal pixels.")] = 0,
    json_: Json = False,
) -> None:
    """Corrupt one picture, or draw all corruptions of it on one sheet.

    Example: symphony-vlm corrupt photo.jpg --corruption fog --severity 3 --output foggy.png

    Example: symphony-vlm corrupt photo.jpg --grid --output sheet.png
    """
    import numpy as np
    from PIL import Image

    from symphony_vlm.corruptions import at_long_side, corruption_rng, image_key
    from symphony_vlm.corruptions import corrupt as apply
    from symphony_vlm.data.images import image_bytes, load_image
    from symphony_vlm.data.sample import ImageRef

    _check(corruption, severity, grid, output)
    ref = ImageRef(path=image, name=str(image))
    pixels = np.asarray(load_image(ref))
    key = image_key(image_bytes(ref))
    if size is not None or grid:
        pixels = at_long_side(pixels, size or GRID_SIZE)
    if grid:
        result = _sheet(pixels, corruption or "all", key, seed, image.name)
    else:
        assert corruption is not None and severity is not None
        rng = corruption_rng(key, corruption, severity, seed)
        result = Image.fromarray(apply(pixels, corruption, severity, rng))
    output.parent.mkdir(parents=True, exist_ok=True)
    result.save(output, **_FORMATS[output.suffix.lower()])
    finish({"output": str(output)}, json_, str(output))


_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 90, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 90, "subsampling": 0},
    ".webp": {"format": "WEBP", "quality": 80, "method": 6},
}


def _check(corruption: str | None, severity: int | None, grid: bool, output: Path) -> None:
    if output.suffix.lower() not in _FORMATS:
        raise InputError(f"{output.name!r} ends with none of {', '.join(_FORMATS)}", where="--output")
    if not grid and (corruption is None or severity is None):
        missing = "--corruption" if corruption is None else "--severity"
        raise InputError(f"{missing} is not given", where="corrupt", remedy="Give both, or --grid for all of them.")
    if grid and severity is not None:
        raise InputError("a sheet has all five severities", where="--severity", remedy="Leave --severity out.")


def _sheet(pixels: Any, text: str, key: str, seed: int, name: str) -> Any:
    from symphony_vlm.corruptions import find_frost_textures, parse_corruptions
    from symphony_vlm.corruptions.sheet import draw_sheet

    chosen = parse_corruptions(text)
    if not chosen:
        raise InputError("a sheet needs a corruption", where="--corruption")
    if "frost" in chosen:
        try:
            find_frost_textures()
        except InputError as error:
            if text not in ("all", "common"):
                raise
            chosen[chosen.index("frost")] = "frost_procedural"
            console().print(f"frost_procedural in the place of frost: {error}", markup=False)
    height, width = pixels.shape[:2]
    title = f"{name}, {width} x {height} pixels\nseverities 1 to 5 from left to right\nseed {seed}"
    return draw_sheet(pixels, chosen, key=key, seed=seed, title=title)


@app.command("verify-corruptions")
def verify_corruptions(
    output: Annotated[Path | None, typer.Option(help="Write the hashes that this machine makes to this file.")] = None,
    json_: Json = False,
) -> None:
    """Corrupt generated pictures and compare every pixel's hash with the committed ones; exit code 1 if one differs.

    Example: symphony-vlm verify-corruptions
    """
    from symphony_vlm.corruptions import CORRUPTIONS, find_frost_textures
    from symphony_vlm.corruptions.pixel_manifest import committed_manifest, pixel_differences, pixel_manifest
    from symphony_vlm.files import write_json

    chosen = list(CORRUPTIONS)
    try:
        find_frost_textures()
    except InputError as error:
        chosen.remove("frost")
        console().print(f"frost is left out: {error}", markup=False)
    found, wanted = pixel_manifest(chosen), committed_manifest()
    if output is not None:
        write_json(output, found)
    differences = pixel_differences(found, wanted)
    for one in differences:
        console().print(f"{one.picture}: {one.corruption} severity {one.severity}: other pixels")
    versions = {
        name: [version, wanted["versions"][name]]
        for name, version in found["versions"].items()
        if version != wanted["versions"][name]
    }
    for name, (here, there) in versions.items():
        console().print(f"{name} {here} is here, {there} made the committed hashes")
    count = sum(len(row.split()) for rows in found["pictures"].values() for row in rows.values())
    summary = {
        "n_pictures": count,
        "n_differences": len(differences),
        "differences": [vars(one) for one in differences],
        "other_versions": versions,
        "same_draws": found["canary"] == wanted["canary"],
    }
    finish(summary, json_, f"{count - len(differences)} of {count} pictures have the committed pixels")
    if differences:
        raise typer.Exit(1)
