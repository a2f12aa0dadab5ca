"""``train --profile N``: where the time of some steps of a stage goes, as a trace to look at and as a table by part.

Parts are marked by hooks on modules, only while the profiler runs. What autograd does backwards has no module around
it; each of its operations is counted to the part whose forward operation it is the gradient of, which the profiler
knows by a number. That holds for the second forward pass of activation checkpointing too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.training.profile_table import DATA, HEAD, PREFIX, VALIDATION, profile_table

__all__ = ["StageProfile", "parts_of"]

WARM_UP = 10
"""Steps before the first that is profiled, where a stage has as many: they find kernels, and memory, which on a CPU
comes page by page and looked like 40 % of a small model's step after two."""


class StageProfile(TrainerCallback):
    """Profiles some steps of a stage, then lets it go on.

    Args:
        model: what trains.
        steps: how many optimizer steps.
        folder: where ``trace.json.gz`` and ``table.txt`` are written.
        report: gets the table and where the files are.
    """

    def __init__(self, model: nn.Module, steps: int, folder: Path, report: Callable[[str], None]) -> None:
        self._model = model
        self._steps = steps
        self._folder = folder
        self._report = report
        self._begin = self._end = 0
        self._profiler: profile | None = None
        self._hooks: list[Any] = []
        self._open: list[Any] = []

    def loading(self) -> Any:
        """A context around asking for the data of a step, with which the step begins."""
        return nullcontext() if self._profiler is None else record_function(PREFIX + DATA)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        left = state.max_steps - state.global_step
        self._begin = state.global_step + min(WARM_UP, max(1, left - self._steps))
        self._end = min(self._begin + self._steps, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self._begin < self._end:
            self._start()
        elif self._profiler is not None and state.global_step >= self._end:
            self._stop(state.global_step - self._begin)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._profiler is not None:
            self._stop(state.global_step - self._begin)
        elif self._begin >= self._end:
            self._report("nothing profiled: the stage had no step left after its first")

    def _start(self) -> None:
        for module, name in parts_of(self._model).items():
            self._hooks += [
                module.register_forward_pre_hook(partial(self._enter, name)),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _stop(self, steps: int) -> None:
        assert self._profiler is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profiler.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json.gz"
        self._profiler.export_chrome_trace(str(trace))
        on_device = torch.cuda.is_available()
        table = profile_table(self._profiler.events(), steps=steps, on_device=on_device)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        operations = self._profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
        (self._folder / "table.txt").write_text(f"{table}\n\n{operations}\n")
        self._profiler = None
        self._report(f"{steps} steps profiled:\n{table}\n{self._folder / 'table.txt'} has the operations too;")
        self._report(f"{trace}: open it in https://ui.perfetto.dev or chrome://tracing")

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        mark = record_function(PREFIX + (name if self._model.training else VALIDATION))
        mark.__enter__()
        self._open.append(mark)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def parts_of(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that are told apart, with the names of their parts; of one within another the inner one counts.

    Compiled layers are left whole, as a hook in them would be compiled too; they count to what they are in.
    """
    language_model: Any = getattr(model, "language_model", model)
    names = {"vision_tower": "vision tower", "language_model": "language model, rest"}
    parts: dict[nn.Module, str] = {model: "model, rest"}
    parts |= {module: names.get(name, name) for name, module in model.named_children()}
    compiled: set[nn.Module] = set()
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            compiled.update(module.modules())
        if module in compiled:
            continue
        of_language = language_model is model or name.startswith("language_model.")
        last = name.rpartition(".")[2]
        if isinstance(module, SparseMoE):
            parts |= {module.router: "routers", module.experts: "experts"}
        elif of_language and last in ("self_attn", "attn"):
            parts[module] = "language attention"
        elif of_language and last == "mlp":
            parts[module] = "language feed-forward"
    if hasattr(language_model, "get_output_embeddings"):
        parts[language_model.get_output_embeddings()] = HEAD
    return parts
