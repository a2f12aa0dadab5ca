"""Clean generated data for the tests of the check, and the development data where it is."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from symphony_vlm.data.scenes import generate_scenes


@pytest.fixture(scope="session")
def injector() -> ModuleType:
    """``tests/data/faults.py``."""
    spec = importlib.util.spec_from_file_location("fault_injector", Path(__file__).parents[1] / "faults.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_injector"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of generated scenes; its image paths are relative to its folder."""
    folder = tmp_path_factory.mktemp("scenes")
    made = generate_scenes(folder, train=100, test=1, seed=0, image_size=48, questions_per_image=2)
    records: list[Any] = json.loads(made.train_json.read_text())
    assert all(isinstance(record["image"], str) for record in records)
    return made.train_json


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data; tests that need it skip where it is not."""
    default = Path(__file__).resolve().parents[4] / "shared" / "data"
    folder = Path(os.environ.get("SYMPHONY_VLM_SHARED_DATA", default))
    if not (folder / "instruct" / "stage2.json").is_file():
        pytest.skip(f"no development data in {folder} (set SYMPHONY_VLM_SHARED_DATA)")
    return folder
