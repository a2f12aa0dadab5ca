"""Corrupting one picture of 224 x 224 at severity 3: all 19, one row each.

The picture is generated (`corruptions.pixel_manifest`): time hardly depends on what a picture shows. The generator's
making is part of the work, as it is part of every evaluation. Without its textures frost's row is frost_procedural.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Case, Result
from symphony_vlm.corruptions import ALL, CORRUPTIONS, corrupt, corruption_rng, find_frost_textures, image_key
from symphony_vlm.corruptions.pixel_manifest import generated_pictures
from symphony_vlm.errors import InputError

__all__ = ["cases", "summary"]

SEVERITY = 3


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """A case for each corruption.

    Args:
        tiny: a picture of 32 x 32.
        device: not used; corruptions run on the CPU.
    """
    cv2.setNumThreads(torch.get_num_threads())
    side = 32 if tiny else 224
    image = np.ascontiguousarray(generated_pictures()["pattern 224x336"][:side, :side])
    names = list(ALL)
    try:
        find_frost_textures()
    except InputError:
        names[names.index("frost")] = "frost_procedural"
    for name in names:
        settings: dict[str, int | str] = {"corruption": name, "family": CORRUPTIONS[name].family, "pixels": side}
        yield Case(settings=settings, contenders={f"severity {SEVERITY}": _work(image, name)})


def _work(image: np.ndarray, name: str) -> Callable[[], Sequence[Tensor]]:
    key = image_key(image)

    def run() -> Sequence[Tensor]:
        pixels = corrupt(image, name, SEVERITY, corruption_rng(key, name, SEVERITY, 0))
        return (torch.from_numpy(pixels),)

    return run


def summary(results: Sequence[tuple[Case, Result]]) -> str:
    """The mean over the corruptions, and the slowest of them."""
    milliseconds = {str(case.settings["corruption"]): 1e3 * result.whole for case, result in results}
    slowest = max(milliseconds, key=lambda name: milliseconds[name])
    mean = sum(milliseconds.values()) / len(milliseconds)
    return f"mean of {len(milliseconds)}: {mean:.1f} ms; the slowest: {slowest}, {milliseconds[slowest]:.1f} ms"
