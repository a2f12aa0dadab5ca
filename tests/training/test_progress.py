"""Progress on a terminal and without one; the picture of the routers."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.training.progress import ProgressDisplay
from symphony_vlm.training.router_panel import load_bars, router_line
from symphony_vlm.training.router_watch import LayerRouting


def _state(step: int, *, max_steps: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=max_steps, is_world_process_zero=True)


def _arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])


def _layers(number: int, num_experts: int = 4) -> list[LayerRouting]:
    """Of K = 2; later layers are more uneven, and the last has collapsed."""
    layers = []
    for index in range(number):
        first = 2 / num_experts + (1 - 2 / num_experts) * index / max(1, number - 1)
        shares = (first, *[(2 - first) / (num_experts - 1)] * (num_experts - 1))
        layers.append(
            LayerRouting(
                name=f"decoder layer {index}",
                shares=shares,
                entropy=1 - index / 100,
                is_collapsed=first > 0.9,
                drift=1e-3,
                edge=(1, 2, 0.25),
            )
        )
    return layers


FIGURES = {
    "loss": 1.5,
    "runtime/tokens_per_second": 41234.0,
    "runtime/mfu": 0.385,
    "runtime/memory_gib": 61.25,
}


def test_without_a_terminal_progress_is_plain_lines_with_rate_and_time_left(tmp_path: Path) -> None:
    said = io.StringIO()
    display = ProgressDisplay(Console(file=said, width=200), "instruct", seconds_between_lines=0.0)
    arguments, control = _arguments(tmp_path), TrainerControl()
    display.on_train_begin(arguments, _state(4), control)
    display.on_log(arguments, _state(5), control, logs={"loss": 2.0})
    display.on_step_end(arguments, _state(5), control)
    lines = said.getvalue().splitlines()
    assert lines[0] == "instruct: continuing after step 4"
    assert lines[1].startswith("instruct: step 5/10  loss 2.000  ")
    assert "steps/s" in lines[1]
    assert lines[1].endswith("s left")


def test_lines_are_sparse_but_the_last_step_is_always_shown(tmp_path: Path) -> None:
    said = io.StringIO()
    display = ProgressDisplay(Console(file=said, width=200), "instruct", seconds_between_lines=1000.0)
    arguments, control = _arguments(tmp_path), TrainerControl()
    display.on_train_begin(arguments, _state(0), control)
    for step in range(1, 11):
        display.on_step_end(arguments, _state(step), control)
    assert [line.split("  ")[0] for line in said.getvalue().splitlines()] == ["instruct: step 10/10"]


def test_on_a_terminal_progress_is_a_bar_and_the_bar_ends(tmp_path: Path) -> None:
    said = io.StringIO()
    display = ProgressDisplay(Console(file=said, width=120, force_terminal=True), "instruct")
    arguments, control = _arguments(tmp_path), TrainerControl()
    display.on_train_begin(arguments, _state(0), control)
    display.on_step_end(arguments, _state(10), control)
    display.on_train_end(arguments, _state(10), control)
    assert "10/10" in said.getvalue()
    assert said.getvalue().endswith("\x1b[?25h\n") or "\x1b[?25h" in said.getvalue(), "the cursor is back"


def _drawn(width: int, layers: list[LayerRouting], tmp_path: Path) -> list[str]:
    console = Console(record=True, width=width, force_terminal=True, file=io.StringIO())
    display = ProgressDisplay(console, "instruct", routers=lambda: layers)
    display.on_log(_arguments(tmp_path), _state(40), TrainerControl(), logs=FIGURES)
    display._start, display._step, display._total = time.monotonic() - 100, 400, 1000
    console.print(display)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("num_layers", [0, 4, 32])
@pytest.mark.parametrize("num_experts", [4, 128])
def test_the_display_fits_the_terminal_and_a_dozen_rows(
    width: int, num_layers: int, num_experts: int, tmp_path: Path
) -> None:
    lines = _drawn(width, _layers(num_layers, num_experts), tmp_path)
    assert max(map(len, lines)) <= width
    assert len(lines) <= 13
    text = "\n".join(lines)
    for part in (
        "instruct",
        "400/1000",
        "2:30 left",
        "loss 1.500",
        "4.0 steps/s",
        "41.2k tok/s",
        "MFU 38 %",
        "61.2 GiB",
    ):
        assert part in text, part
    assert "…" not in text, "nothing is cut off"
    assert ("routers" in text) == (num_layers > 0)


def test_of_many_layers_those_with_the_most_loaded_experts_are_shown_and_the_others_summed_up(tmp_path: Path) -> None:
    text = "\n".join(_drawn(120, _layers(32), tmp_path))
    assert [int(n) for n in re.findall(r"^│ (\d+) +[▁-█]", text, re.MULTILINE)] == list(range(25, 32))
    assert "25 more" in text and "50%-89%" in text and "0.76-1.00" in text
    assert "2→1 0.25" in text and "1.0e-03" in text


def test_a_bar_is_half_high_at_an_even_load_and_an_idle_expert_a_dot() -> None:
    assert load_bars([0.5] * 4, 10).plain == "▄▄▄▄"
    assert load_bars([1.0, 0.5, 0.5, 0.0], 10).plain == "█▄▄·"
    # Neighbours share a bar: that of the more loaded one.
    assert load_bars([1.0, 0.5, 0.5, 0.0], 2).plain == "█▄"


def test_the_routers_in_one_line_name_the_worst() -> None:
    line = router_line(_layers(3))
    assert line == "routers: largest share 100% (decoder layer 2)  entropy 0.98-1.00  drift 1.0e-03"


def test_plain_lines_have_the_figures_and_every_fourth_is_followed_by_the_routers(tmp_path: Path) -> None:
    said = io.StringIO()
    display = ProgressDisplay(
        Console(file=said, width=200), "instruct", seconds_between_lines=0.0, routers=lambda: _layers(2)
    )
    display.on_train_begin(_arguments(tmp_path), _state(0), TrainerControl())
    display.on_log(_arguments(tmp_path), _state(1), TrainerControl(), logs=FIGURES)
    for step in range(1, 6):
        display.on_step_end(_arguments(tmp_path), _state(step), TrainerControl())
    lines = said.getvalue().splitlines()
    assert ["routers" in line for line in lines] == [False, True, False, False, False, False, True]
    assert "loss 1.500" in lines[0] and "41.2k tok/s  MFU 38 %  61.2 GiB" in lines[0]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_live_terminal_is_never_written_past_its_edge_and_gets_its_cursor_back(width: int, tmp_path: Path) -> None:
    """With the console of the command line, which does not wrap."""
    said = io.StringIO()
    console = Console(file=said, width=width, height=40, force_terminal=True, highlight=False, soft_wrap=True)
    display = ProgressDisplay(console, "instruct", routers=lambda: _layers(12, 16))
    arguments, control = _arguments(tmp_path), TrainerControl()
    display.on_train_begin(arguments, _state(0), control)
    display.on_log(arguments, _state(5), control, logs=FIGURES)
    display.on_step_end(arguments, _state(5), control)
    display.on_train_end(arguments, _state(10), control)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.getvalue()).replace("\r", "\n")
    assert max(map(len, plain.splitlines())) <= width
    assert said.getvalue().count("\x1b[?25l") == said.getvalue().count("\x1b[?25h") == 1


def test_the_display_ends_when_training_fails(tmp_path: Path) -> None:
    said = io.StringIO()
    display = ProgressDisplay(Console(file=said, width=80, force_terminal=True), "instruct")
    display.on_train_begin(_arguments(tmp_path), _state(0), TrainerControl())
    display.close()
    display.close()
    assert said.getvalue().endswith("\x1b[?25h")
