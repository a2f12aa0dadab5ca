"""What happens beside the training loop: graph updates, logs, progress, state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.files import sync_file, write_json, write_text
from symphony_vlm.moe.expert_graph import update_expert_graphs
from symphony_vlm.moe.recording import RoutingRecorder
from symphony_vlm.moe.statistics import GraphDrift, graph_statistics
from symphony_vlm.training.checkpoints import checkpoint_folder

__all__ = [
    "ExpertGraphUpdate",
    "JsonLog",
    "RoutingLog",
    "cut_log",
]


class ExpertGraphUpdate(TrainerCallback):
    """Moves the expert graphs once per optimizer step, after the backward pass."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        update_expert_graphs(kwargs["model"])


class JsonLog(TrainerCallback):
    """One JSON line per log step and per evaluation in the run's ``log.jsonl``.

    When a stage continues from a checkpoint, the lines that the killed process wrote after it are cut, so that the
    file reads as if there had been no interruption.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._stage = stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            # Of a stage that begins anew nothing stays, not even the validation before its first step.
            last = state.global_step or -1
            cut_log(self._path, lambda entry: entry["stage"] != self._stage or entry["step"] <= last)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The Trainer's summary at the end covers the last start only, so a continued run would have another.
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
            entry = {"stage": self._stage, "step": state.global_step, **numbers}
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A restart from the checkpoint does not write these lines again.
        if self._path.is_file():
            sync_file(self._path)


def cut_log(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves out the lines of steps that will be repeated, and a last line that a kill has torn."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and keep(entry):
            kept.append(line)
    write_text(path, "".join(kept))


class RoutingLog(TrainerCallback):
    """Load and graph statistics, a number of times over the stage and at every checkpoint.

    They go to a file of JSON lines, to TensorBoard, and into the checkpoints (``routing.json``). As every checkpoint
    begins a new interval of the statistics, none spans an interruption.
    """

    def __init__(
        self, path: Path, recorder: RoutingRecorder, *, tensorboard: Path | None = None, points: int = 20
    ) -> None:
        self._path = path
        self._recorder = recorder
        self._tensorboard = tensorboard
        self.points = points
        self._drift: GraphDrift | None = None
        self._writer: Any = None
        self._entry: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorder.statistics.read()
        self._drift = GraphDrift(kwargs["model"])
        if state.is_world_process_zero:
            cut_log(self._path, lambda entry: entry["step"] <= state.global_step)
            if self._tensorboard is not None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._tensorboard))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._drift is not None
        self._drift.step()
        every = max(1, state.max_steps // self.points)
        # The Trainer's own callback, the first in line, has already decided whether to save.
        if state.global_step % every and state.global_step != state.max_steps and not control.should_save:
            return
        # On every rank: each has its share of the statistics, and under FSDP2 and ZeRO-3 of a learnable graph.
        layers = self._recorder.statistics.read()
        graphs = graph_statistics(kwargs["model"])
        if not state.is_world_process_zero:
            return
        for name, value in self._drift.read().items():
            graphs[name]["drift"] = value
        self._entry = {"step": state.global_step, "layers": layers, "graphs": graphs}
        with self._path.open("a") as file:
            file.write(json.dumps(self._entry) + "\n")
        if self._writer is not None:
            for tag, value in _scalars(self._entry):
                self._writer.add_scalar(tag, value, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._entry:
            sync_file(self._path)
            write_json(checkpoint_folder(args, state) / "routing.json", self._entry)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()


def _scalars(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """TensorBoard's tags and values of a line of the routing log; a chart per statistic, a line per layer."""
    for part in ("layers", "graphs"):
        for name, values in entry[part].items():
            short = str(name).removesuffix(".router.expert_graph")
            yield from ((f"{key}/{short}", value) for key, value in values.items() if isinstance(value, float))
