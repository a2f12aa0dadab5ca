"""Recipes of one stage on generated data, for `benchmarks.train_stage`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe

__all__ = ["only_stage", "write_words"]

WORDS_OF_LINE = 64


def only_stage(
    name: str, stage: str, settings: Sequence[str], folder: Path, *, steps: int, image_size: int = 336
) -> Recipe:
    """The recipe with that stage alone, on generated data.

    Args:
        name: the recipe's name or file.
        stage: a multimodal or a language stage.
        settings: ``key=value`` of the stage, ``model.KEY=VALUE`` of the model.
        folder: where a text for a language stage is written.
        steps: optimizer steps.
        image_size: pixels of the generated pictures.
    """
    of_model = [item for item in settings if item.startswith("model.")]
    fixed = {"max_steps": steps, "engine": "auto", "log_steps": 1}
    of_stage = [f"{key}={value}" for key, value in fixed.items()] + [s for s in settings if s not in of_model]
    recipe = load_recipe(name, [*(f"stages.{stage}.{item}" for item in of_stage), *of_model])
    chosen = next((found for found in recipe.stages if found.name == stage), None)
    if chosen is None or chosen.kind not in ("multimodal", "language"):
        known = [found.name for found in recipe.stages if found.kind in ("multimodal", "language")]
        raise SystemExit(f"{name} has no multimodal or language stage {stage!r}; it has {', '.join(known) or 'none'}")
    samples = steps * (chosen.global_batch_size or chosen.batch_size * chosen.gradient_accumulation_steps)
    values = recipe.model_dump(mode="json")
    values["stages"] = [{**chosen.model_dump(mode="json"), "data": "train", "template": None}]
    if chosen.kind == "language":
        text = folder / "words.txt"
        if not text.is_file():
            size = recipe.model.language.vocab_size
            # A longer text would take its time to read; the stage goes through this one again.
            write_words(text, vocab_size=size, num_tokens=min(samples * chosen.max_length, 2 * size))
        values["data"] = {"text": {"train": str(text)}}
        # Every word is to have its row of the embedding, as in the text that the recipe is for.
        values["model"]["language"]["min_frequency"] = 1
        return Recipe.model_validate(values)
    scenes: dict[str, Any] = {"train": samples + 64, "test": 1, "image_size": image_size, "questions_per_image": 8}
    values["data"] = {"scenes": scenes, "check_images": False, "validation_fraction": 0.0}
    values["model"]["random_weights"] = True
    if chosen.upcycle is False:
        values["model"]["moe"] = None
    return Recipe.model_validate(values)


def write_words(path: Path, *, vocab_size: int, num_tokens: int) -> None:
    """A text whose word-level tokenizer has exactly `vocab_size` entries, ``<unk>`` and ``<eos>`` among them.

    Every word once, and then words as often as in a language (Zipf: the n-th most frequent word in proportion to
    1 / n), at least `num_tokens` in all with line ends. The rows of the embedding are thus hit as in a real text.
    """
    words = np.array([f"w{number}" for number in range(vocab_size - 2)])
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(len(words), size=max(0, num_tokens - len(words)), p=weights / weights.sum())
    text = words[np.concatenate([rng.permutation(len(words)), drawn])]
    lines = (" ".join(text[start : start + WORDS_OF_LINE]) for start in range(0, len(text), WORDS_OF_LINE))
    path.write_text("".join(f"{line}\n" for line in lines))
