"""Everything that watches a stage: speed, finiteness, routers, warnings, and the display that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.config.monitor import MonitorConfig
from symphony_vlm.config.recipe import StageConfig
from symphony_vlm.training.divergence import DivergenceWatch
from symphony_vlm.training.flops import peak_tflops, training_flops
from symphony_vlm.training.progress import ProgressDisplay
from symphony_vlm.training.router_watch import RouterWatch
from symphony_vlm.training.stage_warnings import StageWarnings
from symphony_vlm.training.throughput import Throughput

__all__ = ["StageMonitor"]


class StageMonitor:
    """The parts that watch a stage.

    Args:
        stage: its settings.
        config: the recipe's thresholds.
        model: what trains, with those parameters frozen that do not.
        folder: the stage's; ``warnings.jsonl`` is written there.
        console: where progress and warnings go.
        last_saved: the step of the stage's last finished checkpoint, 0 without one.
    """

    def __init__(
        self,
        stage: StageConfig,
        config: MonitorConfig,
        model: nn.Module,
        folder: Path,
        console: Console,
        *,
        last_saved: Callable[[], int],
    ) -> None:
        device = PartialState().device
        self.warnings = StageWarnings(
            folder / "warnings.jsonl",
            partial(console.print, markup=False, style="yellow"),
            repeat_steps=config.repeat_steps,
            silent=not PartialState().is_main_process,
        )
        flops = training_flops(model, cached_features=stage.cache_features)
        self.throughput = Throughput(flops, config.peak_tflops or _peak(device, stage.bf16), device)
        self.divergence = DivergenceWatch(
            self.warnings, stop_after=config.stop_after_nan, last_saved=last_saved, stage=stage.name
        )
        routing = getattr(model, "routing", None)
        self.routers = None if routing is None else RouterWatch(model, routing, config, self.warnings)
        self.display = ProgressDisplay(
            console, stage.name, routers=lambda: self.routers.latest if self.routers is not None else [],
            show_panel=config.router_panel,
        )  # fmt: skip

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """For the trainer, before those that log."""
        steps = _Steps(self.throughput, self.warnings)
        return [steps, self.divergence] if self.routers is None else [steps, self.divergence, self.routers]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Around training: whatever happens, the terminal is left as it was."""
        try:
            yield
        finally:
            self.display.close()

    def log_entries(self, step: int) -> dict[str, float]:
        """Fields of a line of the log. All processes must ask for them together."""
        entries = self.throughput.read()
        if entries.pop("supervised_tokens", None) == 0:
            self.warnings.give(
                "nothing_supervised",
                step,
                "no token since the last log line was supervised, so nothing was learnt.",
                "Look at the labels with `symphony-vlm data check --show 5`, and at max_length.",
            )
        return entries | ({} if self.routers is None else self.routers.log_entries)


class _Steps(TrainerCallback):
    """Tells the counters where steps begin and end."""

    def __init__(self, throughput: Throughput, warnings: StageWarnings) -> None:
        self._throughput = throughput
        self._warnings = warnings

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._warnings.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._throughput.step_done()


def _peak(device: torch.device, bf16: bool) -> float | None:
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_tflops(torch.cuda.get_device_name(device), bf16=bf16, tf32=tf32)
