"""A study's figures as PNG: scores under growing harm, load and entropy in training, the graphs over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from symphony_vlm.evaluation.drawing import INK, MUTED, PAPER, SERIES, STYLE, draw_adjacency
from symphony_vlm.evaluation.routing.prompts import MODALITIES
from symphony_vlm.study.routing_facts import routing_log
from symphony_vlm.study.scores import ArmScores, Floats
from symphony_vlm.study.setting import Setting
from symphony_vlm.study.statistics import mean_over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["mean_over_logs", "write_figures"]

_DOTS_PER_INCH = 120
_COLUMNS = 4
_PANEL = (2.7, 2.0)
_TIMES = 4
"""Moments of training at which graphs are drawn."""


def write_figures(setting: Setting, scores: Mapping[str, ArmScores], prefix: str, folder: Path) -> list[str]:
    """Draws one data set's arms.

    Args:
        setting: which arms are compared with which.
        scores: by arm.
        prefix: of the files' names.
        folder: where they go.

    Returns:
        Names of the files: ``..._curves.png``; ``..._differences.png`` if an arm has a baseline; ``..._routing.png`` if
        one has experts; ``..._drift.png`` if their routing of corrupted pictures was measured; ``..._graphs.png`` if
        one has a graph.
    """
    names = [f"{prefix}_curves.png"]
    _draw_curves(setting, scores, folder / names[0])
    baselines = {arm: setting.study.arms[arm].baseline for arm in scores}
    shared = {arm: name for arm, name in baselines.items() if name in scores}
    pairs = {arm: name for arm, name in shared.items() if name and set(scores[arm].seeds) & set(scores[name].seeds)}
    if pairs:
        names.append(f"{prefix}_differences.png")
        _draw_differences(setting, scores, pairs, folder / names[-1])
    logs = {arm: [log for cell in found.cells if (log := routing_log(cell.run))] for arm, found in scores.items()}
    logs = {arm: found for arm, found in logs.items() if found}
    if logs:
        names.append(f"{prefix}_routing.png")
        _draw_routing(logs, folder / names[-1])
    if any(cell.drift for found in scores.values() for cell in found.cells):
        names.append(f"{prefix}_drift.png")
        _draw_drift(setting, scores, folder / names[-1])
    graphs = {arm: found[0] for arm, found in logs.items() if found[0][-1].get("graphs")}
    if graphs:
        names.append(f"{prefix}_graphs.png")
        _draw_graphs(graphs, folder / names[-1])
    return names


def _draw_curves(setting: Setting, scores: Mapping[str, ArmScores], path: Path) -> None:
    """A panel for each compared arm, its baseline in grey; an arm compared with none has a panel if it is nobody's."""
    baselines = {arm: setting.study.arms[arm].baseline for arm in scores}
    used = set(baselines.values())
    shown = [arm for arm in scores if baselines[arm] in scores or arm not in used]
    title = f"{setting.unit.name}, mean over seeds with 95 % bands"
    with _panels(path, len(shown), title, share_y=True) as panels:
        for arm, axes in zip(shown, panels, strict=True):
            baseline = baselines[arm]
            if baseline is not None and baseline in scores:
                other = scores[baseline]
                _curve(axes, setting.curve(other, other.seeds), color=MUTED, line=(0, (4, 2)))
            _curve(axes, setting.curve(scores[arm], scores[arm].seeds), color=SERIES[0], line="-")
            axes.set_title(arm if baseline is None else f"{arm} (grey: {baseline})", fontsize=8)
            axes.set_xlabel(setting.harm, fontsize=8)
            axes.grid(axis="y")


def _draw_differences(setting: Setting, scores: Mapping[str, ArmScores], pairs: Mapping[str, str], path: Path) -> None:
    """Arm minus baseline, paired: what of the bands of `_draw_curves` both have in common is gone."""
    better = "above" if setting.unit.higher_is_better else "below"
    title = f"{setting.unit.name}: arm minus baseline, paired, with 95 % bands; {better} 0 the arm is better"
    with _panels(path, len(pairs), title, share_y=True) as panels:
        for (arm, baseline), axes in zip(pairs.items(), panels, strict=True):
            seeds = [seed for seed in scores[arm].seeds if seed in scores[baseline].seeds]
            own, other = (setting.curve(scores[name], seeds) for name in (arm, baseline))
            points = [(x, sums - plain, weights) for (x, sums, weights), (_, plain, _) in zip(own, other, strict=True)]
            _curve(axes, points, color=SERIES[0], line="-")
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set_title(f"{arm} - {baseline}", fontsize=8)
            axes.set_xlabel(setting.harm, fontsize=8)
            axes.grid(axis="y")


def _curve(axes: Axes, curve: Sequence[tuple[float, Floats, Floats]], *, color: str, line: Any) -> None:
    points = [(harm, mean_over_seeds(sums, weights)) for harm, sums, weights in curve]
    x = [harm for harm, _ in points]
    axes.plot(x, [found.value for _, found in points], color=color, linestyle=line, marker="o", markersize=3)
    low, high = ([getattr(found, end) for _, found in points] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _draw_routing(logs: Mapping[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Coefficient of variation of the load, and entropy of a token's gate as a share of the largest, over steps."""
    title = (
        "blue: variation of the experts' load; orange: entropy of a token's gate / log E; means over layers and seeds"
    )
    with _panels(path, len(logs), title, share_y=True) as panels:
        for (arm, found), axes in zip(logs.items(), panels, strict=True):
            for color, line, value in ((SERIES[0], "-", _load_cv), (SERIES[1], (0, (4, 2)), _relative_entropy)):
                axes.plot(*mean_over_logs(found, value), color=color, linestyle=line)
            axes.set_title(arm, fontsize=8)
            axes.set_xlabel("step", fontsize=8)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")


def mean_over_logs(
    logs: Sequence[Sequence[Mapping[str, Any]]], value: Callable[[Mapping[str, Any]], float]
) -> tuple[list[int], list[float]]:
    """Steps and means at those that all logs have: a run that was interrupted has one more, where it stopped."""
    by_log = [{entry["step"]: value(entry) for entry in log} for log in logs]
    steps = sorted(set.intersection(*map(set, by_log)))
    return steps, [mean(found[step] for found in by_log) for step in steps]


def _load_cv(entry: Mapping[str, Any]) -> float:
    return mean(layer["load_cv"] for layer in entry["layers"].values())


def _relative_entropy(entry: Mapping[str, Any]) -> float:
    return mean(layer["token_entropy"] / math.log(max(2, len(layer["load"]))) for layer in entry["layers"].values())


def _draw_drift(setting: Setting, scores: Mapping[str, ArmScores], path: Path) -> None:
    """Answers lost over experts changed: a dot for each seed and arm, those of negative controls hollow."""
    title = "corrupted pictures: right answers lost over experts changed, both in %; a dot for each seed"
    with _panels(path, len(MODALITIES), title, columns=len(MODALITIES), size=(4.2, 3.4), share_y=True) as panels:
        for kind, axes in zip(MODALITIES, panels, strict=True):
            arms = {arm: [cell.drift[kind] for cell in found.cells if cell.drift] for arm, found in scores.items()}
            for place, (arm, found) in enumerate(item for item in arms.items() if item[1]):
                points = [(cell["fluctuation"], cell["answers_lost"]) for cell in found]
                known = [(100 * moved, 100 * lost) for moved, lost in points if moved is not None and lost is not None]
                color, marker = SERIES[place % len(SERIES)], "os^Dv"[place // len(SERIES) % 5]
                face = "none" if setting.study.arms[arm].control else color
                x, y = np.reshape(known, (-1, 2)).T
                axes.scatter(x, y, s=22, marker=marker, facecolors=face, edgecolors=color, label=arm)
            axes.set_xlabel(f"experts changed, tokens of {kind} (%)", fontsize=8)
            axes.grid(axis="y")
        panels[0].set_ylabel("right answers lost (%)", fontsize=8)
        panels[-1].legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))


def _draw_graphs(logs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """A row for each arm: the first sparse layer's graph of the first seed over the steps, its diagonal left out."""
    title = (
        "expert graphs in training, first seed, first sparse layer\nrows receive, columns give; each arm has its scale"
    )
    with _panels(path, _TIMES * len(logs), title, columns=_TIMES, size=(2.0, 2.0)) as panels:
        rows = iter(panels)
        for arm, log in logs.items():
            with_graphs = [entry for entry in log if entry.get("graphs")]
            chosen = [with_graphs[round(i)] for i in np.linspace(0, len(with_graphs) - 1, _TIMES)]
            weights = [np.asarray(next(iter(entry["graphs"].values()))["adjacency"]) for entry in chosen]
            off = [np.where(np.eye(len(matrix)) > 0, np.nan, matrix) for matrix in weights]
            top = max(1e-6, *(float(np.nanmax(matrix)) for matrix in off)) if len(weights[0]) > 1 else 1.0
            for entry, matrix, axes in zip(chosen, off, rows, strict=False):
                draw_adjacency(axes, matrix, top=top, fontsize=None)
                axes.set_title(f"{arm}, step {entry['step']}", fontsize=7)
                axes.set_xticks([])
                axes.set_yticks([])


@contextmanager
def _panels(
    path: Path,
    count: int,
    title: str,
    *,
    columns: int = _COLUMNS,
    size: tuple[float, float] = _PANEL,
    share_y: bool = False,
) -> Iterator[Sequence[Axes]]:
    """A grid of so many axes, saved at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    with mpl.rc_context(STYLE):
        figure: Figure = Figure(figsize=(size[0] * max(columns, 2), size[1] * rows + 0.5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=INK)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel()
        for axes in grid[count:]:
            axes.set_visible(False)
        for axes in grid[:count]:
            axes.tick_params(labelsize=7)
        yield list(grid[:count])
        figure.savefig(path, dpi=_DOTS_PER_INCH, facecolor=PAPER, metadata={"Software": None})
