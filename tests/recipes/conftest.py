"""Tiny stand-ins for the parts that recipes name: random, of the same families, in folders as from the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil, SiglipImageProcessorPil

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.models import list_known_models, load_known_model
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.data.templates import TEMPLATES
from symphony_vlm.data.tokenizer import train_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 28
"""Of the tiny towers' images; with patches of 14 pixels an image is four tokens."""


@pytest.fixture(scope="session")
def quiet() -> Console:
    """A console that nobody sees."""
    return Console(quiet=True)


@pytest.fixture(scope="session")
def shrink() -> Callable[..., dict[str, Any]]:
    """Makes the same kind of model with next to no width."""
    return _shrink


def _shrink(architecture: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model with next to no width."""
    small = architecture | SIZES
    if "num_key_value_heads" in small:
        small["num_key_value_heads"] = 1 if small["num_key_value_heads"] < architecture["num_attention_heads"] else 2
    return small | ({"image_size": SIDE} if "image_size" in small else {})


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By hub id of every known part the folder of its stand-in; weights have the published type."""
    root = tmp_path_factory.mktemp("parts")
    markers = [marker for template in TEMPLATES.values() for marker in template.special_tokens]
    tokenizer = train_tokenizer(
        ["What color is it? red", "a small circle"] * 9, vocab_size=320, special_tokens=markers, end_token="</s>"
    )
    folders = {}
    for known in map(load_known_model, list_known_models()):
        folder = root / known.name
        architecture = _shrink(known.architecture)
        if known.kind == "vision":
            kind = CLIPImageProcessorPil if architecture["model_type"].startswith("clip") else SiglipImageProcessorPil
            size = {"shortest_edge": SIDE} if kind is CLIPImageProcessorPil else {"height": SIDE, "width": SIDE}
            processor = kind(size=size, image_mean=known.image_mean, image_std=known.image_std)
            processor.save_pretrained(folder)
            model = AutoModel.from_config(AutoConfig.for_model(**architecture))
        else:
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            tokenizer.save_pretrained(folder)
            config = AutoConfig.for_model(**architecture | ids | {"vocab_size": len(tokenizer)})
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, known.dtype))
        model.save_pretrained(folder)
        folders[known.hub_id] = str(folder)
    return folders


@pytest.fixture(scope="session")
def in_small(tiny_parts: dict[str, str]) -> Callable[..., Recipe]:
    """Makes a recipe small enough for a test: tiny parts, a few drawn scenes, two steps of two samples a stage."""

    def make(name: str, **stage: Any) -> Recipe:
        values = load_recipe(name).model_dump(mode="json")
        for part in (values["model"]["vision"], values["model"]["language"]):
            if part["name"] is not None:
                part["name"] = tiny_parts[part["name"]]
        values["data"] = {
            "scenes": {"train": 12, "test": 1, "image_size": 32, "questions_per_image": 2},
            "validation_fraction": 0.0,
        }
        small = {"batch_size": 2, "max_steps": 2, "bf16": False, "engine": "auto", "dataloader_workers": 0}
        for values_of_stage in values["stages"]:
            given = values_of_stage["global_batch_size"]
            values_of_stage |= small | {"log_steps": 1, "global_batch_size": given and 2} | stage
        return Recipe.model_validate(values)

    return make


def folder_of(run: Path, stage: str) -> Path:
    """A stage's saved model."""
    return run / stage / "model"
