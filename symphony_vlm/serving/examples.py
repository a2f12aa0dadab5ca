"""Example pictures with questions for the chat page, drawn on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Example", "draw_examples"]

_EXAMPLE_SIDE = 256
_EXAMPLE_KINDS = ("color", "count", "position", "yes_no")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture and a question about it."""

    picture: Path
    question: str


def draw_examples(folder: Path) -> list[Example]:
    """Example pictures with questions from the built-in scenes: nothing to download."""
    import numpy as np

    from symphony_vlm.data.scenes import draw_scene, questions, sample_scene

    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for seed, kind in enumerate(_EXAMPLE_KINDS):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, "test")
        asked = questions(scene, rng)
        question = next((q for q in asked if q.type == kind), asked[0]).question
        picture = folder / f"scene_{seed + 1}.png"
        draw_scene(scene, _EXAMPLE_SIDE).save(picture)
        examples.append(Example(picture=picture, question=question))
    return examples
