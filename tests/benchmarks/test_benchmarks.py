"""The benchmarks' runner: what it compares, what it counts, and that every benchmark runs."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from symphony_vlm.moe import fused

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROGRAMS = {"measure", "paired_stages", "run", "stage_recipe", "terminal_display", "train_stage"}
"""Files that are no benchmarks of `benchmarks.run`; those with a command of their own have their own tests."""
NAMES = sorted({p.stem for p in (REPOSITORY / "benchmarks").glob("*.py")} - {"__init__", *PROGRAMS})


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`benchmarks.measure`, which is no part of the installed package."""
    monkeypatch.syspath_prepend(REPOSITORY)
    import benchmarks.measure

    return benchmarks.measure


class Clock:
    """A clock that stands still but for the work that says how long it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: Callable[[], float]) -> Callable[[], tuple[Tensor]]:
        def run() -> tuple[Tensor]:
            self.now += seconds()
            return (torch.ones(3),)

        return run


@pytest.fixture
def clock(measure: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "_clock", lambda _: lambda: clock.now)
    return clock


def test_medians_are_those_of_the_work_and_a_common_drift_cancels(measure: types.ModuleType, clock: Clock) -> None:
    """The machine becomes four times slower while it is measured; the difference is seen all the same."""

    def slower(seconds: float) -> Callable[[], float]:
        return lambda: seconds + clock.now / 100

    case = measure.Case(
        settings={"size": 1},
        contenders={"plain": clock.work(slower(1.0)), "more": clock.work(slower(1.5))},
        whole=("layer", clock.work(lambda: 50.0)),
    )
    result = measure.measure(case, measure.Plan(rounds=3, alternations=10, seconds=0.1), CPU)
    assert result.whole == 50.0
    plain, more = result.timings["plain"], result.timings["more"]
    assert plain.difference == plain.difference_error == 0.0
    assert plain.seconds > 2.0, "what was measured did drift"
    # Neighbours are some seconds apart, hundredths of a second of drift, now in the one direction, now in the other.
    assert more.difference == pytest.approx(0.5, abs=0.1)
    assert more.difference_error < 0.2


def test_short_work_is_repeated_within_a_sample_and_outliers_do_not_count(
    measure: types.ModuleType, clock: Clock
) -> None:
    calls = {"plain": 0, "more": 0}

    def counted(name: str, usual: float) -> Callable[[], float]:
        def seconds() -> float:
            calls[name] += 1
            return 100.0 if calls[name] % 97 == 0 else usual

        return seconds

    contenders = {name: clock.work(counted(name, usual)) for name, usual in (("plain", 0.25), ("more", 0.5))}
    case = measure.Case(settings={}, contenders=contenders)
    result = measure.measure(case, measure.Plan(rounds=2, alternations=20, seconds=1.0), CPU)
    # Once to compare results, once to warm up, once to see how long it takes; then 40 samples of a second.
    assert calls == {"plain": 3 + 40 * 4, "more": 3 + 40 * 2}
    assert result.timings["plain"].seconds == 0.25
    assert result.timings["more"].difference == 0.25
    assert result.whole == 0.25, "without a whole the baseline gives the scale"


def test_the_error_is_that_of_a_median(measure: types.ModuleType) -> None:
    """For normal differences: 1.96 standard errors of a median, sqrt(pi / 2) sigma / sqrt(n)."""
    values = torch.randn(4001, generator=torch.Generator().manual_seed(0)).tolist()
    timing = measure._timing(values, [0.0] * len(values))
    # The quartiles of 4001 draws are known to 3 %.
    assert timing.difference_error == pytest.approx(1.96 * math.sqrt(math.pi / 2 / 4001), rel=0.06)


@pytest.mark.parametrize(("tolerance", "passes"), [(0.0, False), (1e-3, False), (1e-1, True)])
def test_a_contender_must_compute_what_the_baseline_computes(
    tolerance: float, passes: bool, measure: types.ModuleType
) -> None:
    wanted = torch.tensor([1.0, -10.0], requires_grad=True)
    contenders = {"plain": lambda: (wanted,), "other": lambda: (wanted + torch.tensor([0.05, 0.0]),)}
    case = measure.Case(settings={"size": 1}, contenders=contenders, tolerance=tolerance)
    plan = measure.Plan(rounds=1, alternations=1, seconds=0.0)
    if passes:
        measure.measure(case, plan, CPU)
    else:
        with pytest.raises(AssertionError, match=r"'size': 1.*: other differs from plain by 0.05"):
            measure.measure(case, plan, CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """Standard output and JSON of a benchmark in its tiny size, run once."""

    @functools.cache
    def run(name: str) -> tuple[str, dict[str, Any]]:
        file = tmp_path_factory.mktemp(name) / "out.json"
        command = [sys.executable, "-m", "benchmarks.run", name, "--tiny", "--rounds", "2", "--alternations", "5"]
        result = subprocess.run(
            [*command, "--seconds", "0.001", "--json", str(file)], capture_output=True, text=True, cwd=REPOSITORY
        )
        assert result.returncode == 0, result.stderr
        return result.stdout, json.loads(file.read_text())

    return run


# A process each, of 12 to 25 s: those of one part stand for the others on every change.
ON_EVERY_CHANGE = {"corruptions", "moe_layer", "packing", "router"}


@pytest.mark.parametrize(
    "name", [name if name in ON_EVERY_CHANGE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_benchmark_runs_in_a_tiny_size(name: str, run: Callable[[str], tuple[str, dict[str, Any]]]) -> None:
    printed, written = run(name)
    facts = written["provenance"]
    assert facts["benchmark"] == name
    assert facts["hardware"]["threads"] == 1
    assert facts["versions"]["torch"] == torch.__version__
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(written["cases"]) > 2
    assert len({row.count("|") for row in rows}) == 1, "every row has as many cells as the heading"
    for case in written["cases"]:
        assert case["whole"] > 0
        assert all(timing["seconds"] > 0 for timing in case["timings"].values())


def test_the_routers_benchmark_has_everything_that_symphony_adds(
    run: Callable[[str], tuple[str, dict[str, Any]]],
) -> None:
    forward, both = run("router")[1]["cases"]
    assert list(forward["timings"]) == ["router", "with graph"]
    assert list(both["timings"]) == ["router", "with graph", "with counting too", "with step too"]
    # Some twenty operations on 4 x 4 matrices more, several times the noise of ten samples.
    assert both["timings"]["with step too"]["difference"] > both["timings"]["with graph"]["difference"]
    assert both["timings"]["router"]["seconds"] < both["whole"]


def test_cases_that_count_items_are_given_as_throughput(measure: types.ModuleType, clock: Clock) -> None:
    from benchmarks.run import largest, markdown

    contenders = {name: clock.work(lambda seconds=seconds: seconds) for name, seconds in (("a", 2.0), ("b", 0.5))}
    case = measure.Case(settings={"size": 1}, contenders=contenders, items=("words", 30))
    results = [(case, measure.measure(case, measure.Plan(rounds=1, alternations=2, seconds=0.0), CPU))]
    assert markdown(results).splitlines()[-1] == "| 1 | 15.0 words/s (1.00x) | 60.0 words/s (4.00x) |"
    assert largest(results) == ""


def test_times_are_given_as_multiples_of_the_fastest_limit(measure: types.ModuleType, clock: Clock) -> None:
    from benchmarks.run import largest, markdown

    def work(seconds: float) -> Callable[[], tuple[Tensor]]:
        return clock.work(lambda: seconds)

    case = measure.Case(
        settings={"size": 1},
        contenders={"a": work(3.0), "b": work(5.0)},
        limits={"slow limit": work(2.5), "limit": work(2.0)},
        references={"reference": work(2.25)},
    )
    result = measure.measure(case, measure.Plan(rounds=1, alternations=2, seconds=0.0), CPU)
    assert result.limit == 2.0
    assert result.whole == 3.0, "the baseline is the first contender, not a limit or a reference"
    assert markdown([(case, result)]).splitlines()[0] == "| size | slow limit | limit | reference | a | b |"
    assert markdown([(case, result)]).splitlines()[-1] == "| 1 | 2.5e+03 ms | 2e+03 ms | 1.12x | 1.50x | 2.50x |"
    assert largest([(case, result)]) == ""


def test_the_layer_is_measured_against_its_limit_and_everybody_else(
    run: Callable[[str], tuple[str, dict[str, Any]]],
) -> None:
    forward, both = run("moe_layer")[1]["cases"]
    ours = ["segments", "fused"] if fused.is_available() else ["segments"]
    others = [*ours, "HF grouped_mm", "HF eager", "LibMoE loop", "CuMo loop"]
    for case in (forward, both):
        assert list(case["timings"]) == ["dense", "dense in chunks", "products alone", *others]
        assert case["limit"] == min(case["timings"][name]["seconds"] for name in ("dense", "dense in chunks"))
    assert both["limit"] > forward["limit"]


def test_data_for_a_benchmark_without_data_is_refused(measure: types.ModuleType) -> None:
    from benchmarks.run import main

    with pytest.raises(SystemExit, match="'router' takes no data"):
        main(["router", "--tiny", "--data", "records.json"])


def test_packing_trains_on_the_same_tokens_in_fewer_places(run: Callable[[str], tuple[str, dict[str, Any]]]) -> None:
    trained, frozen = run("packing")[1]["cases"]
    for case in (trained, frozen):
        assert list(case["timings"]) == ["padded", "grouped by length", "packed"]
        settings = case["settings"]
        assert settings["tokens"] <= settings["places packed"] < settings["places padded"]
    same = {"vision tower": "frozen, cached"}
    assert trained["settings"] | same == frozen["settings"] and trained["settings"]["vision tower"] == "trained"


def test_the_corruptions_benchmark_has_all_of_them_and_names_the_slowest(
    run: Callable[[str], tuple[str, dict[str, Any]]],
) -> None:
    printed, written = run("corruptions")
    times = {case["settings"]["corruption"]: case["whole"] for case in written["cases"]}
    assert len(times) == 19
    slowest = max(times, key=lambda name: times[name])
    mean = 1e3 * sum(times.values()) / 19
    assert f"mean of 19: {mean:.1f} ms; the slowest: {slowest}, {1e3 * times[slowest]:.1f} ms" in printed
