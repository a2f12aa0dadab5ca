"""TensorBoard and Weights & Biases, through the Trainer's own callbacks."""

from __future__ import annotations

import importlib.util
import os
import secrets
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from symphony_vlm.config.monitor import MonitorConfig
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.run_state import RunState

__all__ = ["StageWandb", "check_reporters", "reporters"]


def check_reporters(config: MonitorConfig) -> None:
    """Makes sure that what a recipe reports to is installed.

    Raises:
        InputError: it is not.
    """
    if "wandb" in config.report_to and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "Weights & Biases is not installed",
            where="monitor.report_to",
            remedy="pip install 'symphony-vlm[wandb]', or leave wandb out.",
        )


def reporters(stage: str, recipe: Recipe, folder: Path, state: RunState) -> list[TrainerCallback]:
    """The callbacks of a stage that report to others.

    Args:
        stage: its name.
        recipe: the run's.
        folder: the run's.
        state: keeps the id of the stage's W&B run, so that a restart goes on with it.
    """
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in recipe.monitor.report_to:
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard" / stage))))
    if "wandb" in recipe.monitor.report_to:
        run_id = state.get(stage).get("wandb_id") or secrets.token_hex(8)
        if PartialState().is_main_process:
            state.set(stage, wandb_id=run_id)
        settings: dict[str, Any] = {"id": run_id, "group": folder.resolve().name, "name": f"{folder.name}/{stage}"}
        callbacks.append(StageWandb(settings | {"dir": str(folder), "config": {"recipe": recipe.model_dump()}}))
    return callbacks


class StageWandb(WandbCallback):
    """The Trainer's callback, with a W&B run for each stage; those of a training run form a group.

    A restart continues the stage's run. ``WANDB_MODE=offline`` and W&B's other variables work as ever; the project is
    ``WANDB_PROJECT``, else ``symphony-vlm``.

    Args:
        settings: of ``wandb.init``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._settings = settings

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Opens the run, which the Trainer's callback then finds."""
        if state.is_world_process_zero:
            project = os.environ.get("WANDB_PROJECT", "symphony-vlm")
            self._wandb.init(project=project, resume="allow", **self._settings)
        super().setup(args, state, model, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the run, so that the next stage has its own."""
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self._wandb.finish()
