"""Weights & Biases through the Trainer's callback, with a module in its place that writes down what is called."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from symphony_vlm.config.monitor import MonitorConfig
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.reporting import check_reporters
from symphony_vlm.training.run import train


class Config(dict[str, Any]):
    def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


class FakeWandb(types.ModuleType):
    """As much of wandb's face as transformers' callback uses."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.run: Any = None
        self.config = Config()
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[str, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> None:
        assert self.run is None, "the run before was not finished"
        self.inits.append(settings)
        self.run = types.SimpleNamespace(id=settings["id"], summary={}, _label=lambda **_: None)

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append((self.run.id, values))

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def finish(self) -> None:
        self.run, self.finished = None, self.finished + 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    errors = types.ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = type("ConfigError", (Exception,), {})  # type: ignore[attr-defined]
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    return fake


def _with(recipe: Recipe, **monitor: Any) -> Recipe:
    return recipe.model_copy(update={"monitor": MonitorConfig(**monitor)})


def test_each_stage_is_a_run_of_one_group_with_every_figure(
    wandb: FakeWandb, only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    run = tmp_path / "mine"
    recipe = _with(only_stage("pretrain"), report_to=["tensorboard", "wandb"])
    train(recipe, run, console=quiet)
    (settings,) = wandb.inits
    assert (settings["project"], settings["group"], settings["name"]) == ("symphony-vlm", "mine", "mine/pretrain")
    assert settings["resume"] == "allow" and settings["dir"] == str(run)
    assert settings["id"] == json.loads((run / "state.json").read_text())["stages"]["pretrain"]["wandb_id"]
    assert wandb.finished == 1
    steps = [values["train/global_step"] for _, values in wandb.logged if "train/loss" in values]
    assert steps == [1, 2, 4, 6]
    for name in ("train/loss", "train/grad_norm", "train/cross_entropy", "train/runtime/tokens_per_second"):
        assert all(name in values for _, values in wandb.logged if "train/loss" in values), name
    assert any("eval/loss" in values for _, values in wandb.logged)
    assert list((run / "tensorboard" / "pretrain").glob("events.*"))


def test_a_restart_continues_the_same_run_and_tensorboard_can_be_left_out(
    wandb: FakeWandb,
    only_stage: Callable[..., Recipe],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from symphony_vlm.training.checkpoints import Checkpoints

    recipe = _with(only_stage("pretrain"), report_to="wandb")
    original = Checkpoints.save

    def killed(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        train(recipe, tmp_path / "run", console=quiet)
    wandb.run = None  # the process is gone, and with it its run
    train(recipe, tmp_path / "run", console=quiet)
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_wandb_the_error_names_the_extra_before_anything_is_built(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else original(name, *a))
    with pytest.raises(InputError, match=r"pip install 'symphony-vlm\[wandb\]'"):
        train(_with(only_stage("pretrain"), report_to="wandb"), tmp_path, console=quiet)
    assert not (tmp_path / "pretrain").exists()
    check_reporters(MonitorConfig())
