"""``train --profile N``: a trace, and a table that counts every operation to the part that it is of, gradients too."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import profile, record_function
from torch.utils.checkpoint import checkpoint
from transformers import TrainerControl, TrainerState, TrainingArguments
from typer.testing import CliRunner

from symphony_vlm.cli import app
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.training import run
from symphony_vlm.training.profile_table import DATA, HEAD, OPTIMIZER, PREFIX, REST, EventOwners, time_by_part
from symphony_vlm.training.profiling import WARM_UP, StageProfile
from symphony_vlm.training.run import train


class Products(torch.autograd.Function):
    """So many matrix products forwards, and twice as many backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        return x + _multiply(times)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] + _multiply(2 * ctx.times), None


def _multiply(times: int) -> Tensor:
    matrix = torch.ones(8, 8)
    for _ in range(times):
        matrix = matrix @ matrix / 8
    return 0 * matrix[0, 0]


class Part(nn.Module):
    def __init__(self, times: int, *, recomputed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self._times, self._recomputed = times, recomputed

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            # The last factor's gradient needs the products' result, so that they are computed again.
            return Products.apply(x * self.weight, self._times) * self.weight  # type: ignore[no-any-return]

        return checkpoint(run, x, use_reentrant=False) if self._recomputed else run(x)  # type: ignore[no-any-return]


def test_operations_are_those_of_the_parts_with_their_gradients_and_second_passes() -> None:
    model = nn.ModuleDict({"short": Part(1), "long": Part(3), "twice": Part(5, recomputed=True)})
    x = torch.ones(8, requires_grad=True)
    with profile() as profiler:
        y = x
        for name, module in model.items():
            with record_function(PREFIX + name):
                y = module(y)
        y.sum().backward()
    events = list(profiler.events())
    owners = EventOwners(events)
    found = Counter(owners.owner(event) for event in events if event.name == "aten::mm")
    assert found == {
        ("short", False): 1,
        ("short", True): 2,
        ("long", False): 3,
        ("long", True): 6,
        ("twice", False): 5,
        ("twice", True): 5 + 10,
    }
    times = time_by_part(events, on_device=False)
    assert set(times) == {*model, REST}
    total = sum(event.self_cpu_time_total for event in events)
    assert sum(forward + backward for forward, backward, _ in times.values()) == pytest.approx(total)
    assert all(host == pytest.approx(forward + backward) for forward, backward, host in times.values())


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Recipe]:
    """A language stage of next to no size."""
    file = tmp_path / "train.txt"
    file.write_text("".join(f"the {a} {b} is left of it .\n" for a in "abcdefgh" for b in "ijklmnop"))
    sizes = {"hidden_size": 16, "n_inner": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = [f"model.language.architecture.{key}={value}" for key, value in sizes.items()]
    stage = ["max_length=16", "batch_size=4", "log_steps=1", "save_fraction=1.0"]

    def make(*settings: str) -> Recipe:
        data = [
            f"data.text.train={file}",
            "data.text.validation=null",
            "monitor.report_to=[]",
            "model.moe.num_experts=4",
        ]
        own = [f"stages.language.{item}" for item in (*stage, *settings)]
        return load_recipe("wikitext2_tiny", [*model, *data, *own])

    return make


def _losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_a_stage_is_profiled_and_trains_as_without(small: Callable[..., Recipe], tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    recipe = small("max_steps=6")
    train(recipe, tmp_path / "plain", console=Console(quiet=True))
    train(recipe, tmp_path / "profiled", console=console, profile_steps=2)
    assert _losses(tmp_path / "profiled") == _losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "language" / "profile").exists()
    folder = tmp_path / "profiled" / "language" / "profile"
    names = {
        event.get("name")
        for event in json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    }
    assert {PREFIX + "experts", PREFIX + "routers", PREFIX + DATA, "Optimizer.step#AdamW.step"} <= names
    table = (folder / "table.txt").read_text()
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()[1:20] if line[:24].strip()}
    for part in ("language attention", "experts", "routers", HEAD, OPTIMIZER, DATA):
        assert float(rows[part][0]) > 0, part
    for part in ("language attention", "experts", HEAD):
        assert float(rows[part][1]) > 0, f"{part} has gradients"
    assert "aten::" in table
    printed = console.export_text()
    assert "2 steps profiled" in printed and str(folder / "trace.json.gz") in printed


@pytest.mark.parametrize(("left", "begin", "end"), [(20, 10, 13), (10, 7, 10), (4, 1, 4), (2, 1, 2), (1, 1, 1)])
def test_a_short_stage_is_profiled_as_far_as_it_goes(left: int, begin: int, end: int, tmp_path: Path) -> None:
    said: list[str] = []
    profiled = StageProfile(nn.Linear(1, 1), 3, tmp_path, said.append)
    ran: list[int] = []
    profiled._start = lambda: setattr(profiled, "_profiler", object())  # type: ignore[method-assign]

    def stop(steps: int) -> None:
        ran.append(steps)
        profiled._profiler = None

    profiled._stop = stop  # type: ignore[method-assign]
    arguments: Any = (TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),)
    state, control = TrainerState(max_steps=7 + left, global_step=7), TrainerControl()
    profiled.on_train_begin(*arguments, state, control)
    for _ in range(left):
        state.global_step += 1
        profiled.on_step_end(*arguments, state, control)
    profiled.on_train_end(*arguments, state, control)
    assert (profiled._begin - 7, profiled._end - 7) == (begin, end) and begin <= WARM_UP
    assert ran == ([end - begin] if end > begin else [])
    assert len(said) == (end == begin)


def test_the_command_passes_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []

    def train(*args: Any, profile_steps: int, **kwargs: Any) -> run.TrainResult:
        calls.append(profile_steps)
        return run.TrainResult(run=tmp_path, stage="a", step=1, loss=1.0)

    monkeypatch.setattr(run, "train", train)
    command: Sequence[str] = ["train", "--config", "tiny", "--output", str(tmp_path)]
    for extra in ([], ["--profile", "3"]):
        result = CliRunner().invoke(app, [*command, *extra])
        assert result.exit_code == 0, result.output
    assert calls == [0, 3]
