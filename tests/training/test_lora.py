"""Stages with adapters: what trains, what is saved, how it is opened, merged and continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import symphony_vlm
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.training.run import train

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
RATES = {"projector": 1e-3, "language_model": 1e-2}


@pytest.fixture(scope="module")
def adapted_run(only_stage: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Path:
    """A stage that upcycles, so that it must keep the model under its adapters, with adapted experts."""
    run = tmp_path_factory.mktemp("lora") / "run"
    train(only_stage("instruct", train=RATES, lora={**LORA, "experts": True}, max_steps=6), run, console=quiet)
    return run


def test_smoke(adapted_run: Path) -> None:
    print(sorted(load_file(adapted_run / "instruct/model/model.safetensors")))
    print((adapted_run / "instruct/model/config.json").read_text()[:3000])
    a = symphony_vlm.load(adapted_run, device="cpu")
