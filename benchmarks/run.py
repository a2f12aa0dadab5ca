"""Runs a benchmark, prints a Markdown table and writes JSON.

Example: python -m benchmarks.run router --json router.json

Memory is treated as the commands of ``symphony-vlm`` treat it, for all contenders alike.

A benchmark is a file here with a function ``cases(*, tiny, device)`` that yields `measure.Case`. One on data also takes
``data`` and ``image_folder``. Its function ``summary(results)``, if it has one, says what stands under the table.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.measure import Case, Plan, Result, measure
from symphony_vlm.cli.memory import keep_freed_memory
from symphony_vlm.files import write_json
from symphony_vlm.training.provenance import provenance

__all__ = ["main"]

_NOT_BENCHMARKS = {"__init__", "measure", "paired_stages", "run", "stage_recipe", "terminal_display", "train_stage"}

Results = list[tuple[Case, Result]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device(options.device)
    plan = _plan(options)
    results: Results = []
    for case in _cases(options, device):
        print(_words(case), file=sys.stderr)
        results.append((case, measure(case, plan, device)))
    facts = provenance(benchmark=options.name, device=options.device, processor=_processor(), plan=asdict(plan))
    if options.json is not None:
        cases = [{"settings": dict(case.settings), **asdict(result)} for case, result in results]
        write_json(options.json, {"provenance": facts, "cases": cases})
    print(f"{options.name} on {facts['processor']}, {options.threads} thread(s), torch {torch.__version__}\n")
    print(markdown(results))
    summary = getattr(importlib.import_module(f"benchmarks.{options.name}"), "summary", largest)
    print(f"\n{summary(results)}")


def _cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    cases = importlib.import_module(f"benchmarks.{options.name}").cases
    given = {"data": options.data, "image_folder": options.image_folder}
    given = {name: value for name, value in given.items() if value is not None}
    if not given.keys() <= inspect.signature(cases).parameters.keys():
        raise SystemExit(f"benchmark {options.name!r} takes no data")
    yield from cases(tiny=options.tiny, device=device, **given)


def _plan(options: argparse.Namespace) -> Plan:
    """The benchmark's own plan, if it has one, with what the command says instead."""
    default = Plan(rounds=7, alternations=20, seconds=0.005)
    plan: Plan = getattr(importlib.import_module(f"benchmarks.{options.name}"), "PLAN", default)
    given = {name: getattr(options, name) for name in ("rounds", "alternations", "seconds")}
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def markdown(results: Results) -> str:
    """A row per case: times of the whole and the baseline, and what the other contenders add to the baseline.

    Percentages are shares of the whole. A case that counts items gives how many each contender gets through in a
    second, and the ratio to the baseline; one that has limits, the multiple of the fastest.
    """
    settings = list(results[0][0].settings)
    wholes = list(dict.fromkeys(case.whole[0] for case, _ in results if case.whole))
    names = list(dict.fromkeys(name for case, result in results for name in result.timings))
    rows = [[*settings, *wholes, *names]]
    rows.append(["---"] * len(rows[0]))
    for case, result in results:
        cells = [str(value) for value in case.settings.values()]
        cells += [f"{1e3 * result.whole:.3g} ms" if case.whole and case.whole[0] == name else "" for name in wholes]
        cells += [_cell(case, result, name) for name in names]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(case: Case, result: Result, name: str) -> str:
    if name not in result.timings:
        return ""
    timing = result.timings[name]
    if result.limit is not None:
        return f"{1e3 * timing.seconds:.3g} ms" if name in case.limits else f"{timing.seconds / result.limit:.2f}x"
    if case.items is not None:
        ratio = next(iter(result.timings.values())).seconds / timing.seconds
        return f"{case.items[1] / timing.seconds:,.1f} {case.items[0]}/s ({ratio:.2f}x)"
    if len(case.contenders) == 1 and case.whole is None:
        return f"{1e3 * timing.seconds:.3g} ms"
    if name == next(iter(case.contenders)):
        return f"{1e3 * timing.seconds:.3g} ms ({timing.seconds / result.whole:.2%})"
    share = f"{timing.difference / result.whole:+.2%}"
    return f"{1e3 * timing.difference:+.3f} ± {1e3 * timing.difference_error:.3f} ms ({share})"


def largest(results: Results) -> str:
    """The largest share that each contender adds to the baseline, over the cases; nothing on cases that count items."""
    worst: dict[str, tuple[float, Case]] = {}
    for case, result in results:
        for name, timing in list(result.timings.items())[1:] if case.items is None and not case.limits else []:
            share = timing.difference / result.whole
            if name not in worst or share > worst[name][0]:
                worst[name] = (share, case)
    return "\n".join(f"{name}: at most {share:+.2%} ({_words(case)})" for name, (share, case) in worst.items())


def _words(case: Case) -> str:
    return ", ".join(f"{key} {value}" for key, value in case.settings.items())


def _processor() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    import platform

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _NOT_BENCHMARKS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure speed.")
    parser.add_argument("name", choices=names)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rounds", type=int, help="samples of the whole (default 7, or the benchmark's own)")
    parser.add_argument("--alternations", type=int, help="samples of each contender a round (default 20, or its own)")
    parser.add_argument("--seconds", type=float, help="shortest sample (default 0.005, or the benchmark's own)")
    parser.add_argument("--threads", type=int, default=1, help="1 (default) counts processor time, more wall time")
    parser.add_argument("--device", default="cpu", help="where the work happens (default cpu)")
    parser.add_argument("--data", type=Path, help="conversations, for a benchmark on data (default: generated)")
    parser.add_argument("--image-folder", type=Path, help="base of the conversations' image paths")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test of the benchmark itself")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
