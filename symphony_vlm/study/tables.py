"""Aggregates a study's cells into results.json and a page of Markdown tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.lines_file import cell_name, read_line_records
from symphony_vlm.evaluation.statistics import Interval, holm
from symphony_vlm.files import write_json, write_text
from symphony_vlm.study.cells import StudyCell
from symphony_vlm.study.configuration import Study
from symphony_vlm.study.page import conditions, page_text
from symphony_vlm.study.statistics import Comparison, compare_arms, mean_nats

__all__ = ["write_results"]

Floats = NDArray[np.float64]
DEAD = 0.1
"""An expert with less than a tenth of an equal share of the tokens counts as dead."""


def write_results(study: Study, cells: Sequence[StudyCell], output: Path, provenance: dict[str, Any]) -> Path:
    """Writes ``results.json`` and ``results.md`` of the finished cells.

    Args:
        study: what was done.
        cells: all of them; seeds that an arm or its baseline has not finished are left out of the comparison.
        output: the study's folder.
        provenance: versions, hardware and the like.

    Raises:
        InputError: no cell is finished, or two cells scored different lines.
    """
    done = [cell for cell in cells if cell.is_done()]
    if not done:
        raise InputError("no cell is finished", where=str(output), remedy="Run the study.")
    arms: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    for text in study.texts:
        own = [cell for cell in done if cell.text == text]
        nats = {
            name: _Nats([c for c in own if c.arm == name]) for name in study.arms if any(c.arm == name for c in own)
        }
        found = [_comparison(study, text, name, nats) for name, arm in study.arms.items() if arm.baseline in nats]
        family = [row for rows in found for row in rows]
        tested = [row for row in family if row["p_seeds"] is not None]
        for row, adjusted in zip(tested, holm([row["p_seeds"] for row in tested]), strict=True):
            row["p_holm"] = adjusted
        comparisons += family
        arms += [_arm(text, name, own_nats, study) for name, own_nats in nats.items()]
    document = {
        "study": study.model_dump(mode="json"),
        "n_cells": len(cells),
        "n_cells_done": len(done),
        "arms": arms,
        "comparisons": comparisons,
        "provenance": provenance,
    }
    write_json(output / "results.json", document)
    page = output / "results.md"
    write_text(page, page_text(study, document))
    return page


class _Nats:
    """Nats of every cluster of lines by seed and by clean or attacked text, for one arm on one text."""

    def __init__(self, cells: Sequence[StudyCell]) -> None:
        self.seeds = [cell.seed for cell in cells]
        self.cells = list(cells)
        self._sums: dict[str, dict[int, Floats]] = {}
        self.words_G: Floats = np.zeros(0)
        self._names: list[str] = []
        for cell in cells:
            for name, records in read_line_records(cell.measured).items():
                self._add(cell, name, list(records.values()))

    def _add(self, cell: StudyCell, name: str, records: list[dict[str, Any]]) -> None:
        clusters = sorted({record["cluster"] for record in records})
        index = {cluster: i for i, cluster in enumerate(clusters)}
        nats, words = np.zeros(len(clusters)), np.zeros(len(clusters))
        for record in records:
            nats[index[record["cluster"]]] -= record["log_probability"]
            words[index[record["cluster"]]] += record["n_words"]
        if self._names and (clusters != self._names or not np.array_equal(words, self.words_G)):
            raise InputError("scored other lines than the cells before it", where=cell.name)
        self._names, self.words_G = clusters, words
        self._sums.setdefault(name, {})[cell.seed] = nats

    def of(self, name: str, seeds: Sequence[int]) -> Floats:
        """``[S, G]``."""
        return np.stack([self._sums[name][seed] for seed in seeds])


def _arm(text: str, name: str, nats: _Nats, study: Study) -> dict[str, Any]:
    routing = [_last_routing(cell) for cell in nats.cells]
    values = {}
    for condition in conditions(study):
        interval = mean_nats(nats.of(condition, nats.seeds), nats.words_G)
        per_seed = nats.of(condition, nats.seeds).sum(1) / nats.words_G.sum()
        values[condition] = _perplexity(interval) | {"per_seed": [math.exp(value) for value in per_seed]}
    return {
        "text": text,
        "arm": name,
        "seeds": nats.seeds,
        "values": values,
        "dead_experts": statistics.mean(dead for dead, _ in routing),
        "experts": routing[0][1],
        "seconds": statistics.mean(float((cell.folder / "seconds.txt").read_text()) for cell in nats.cells),
    }


def _comparison(study: Study, text: str, name: str, nats: dict[str, _Nats]) -> list[dict[str, Any]]:
    """On the clean text, on each attacked one, and whether the attack costs the arm more or less."""
    if name not in nats:
        return []
    baseline = study.arms[name].baseline
    assert baseline is not None
    arm, other = nats[name], nats[baseline]
    seeds = [seed for seed in arm.seeds if seed in other.seeds]
    if not seeds:
        return []
    rows = []
    for condition in conditions(study):
        first, second = other.of(condition, seeds), arm.of(condition, seeds)
        rows.append(_row(text, name, baseline, condition, seeds, compare_arms(first, second, arm.words_G)))
        if condition != cell_name(None):
            clean_first, clean_second = other.of(cell_name(None), seeds), arm.of(cell_name(None), seeds)
            loss = compare_arms(first - clean_first, second - clean_second, arm.words_G)
            rows.append(_row(text, name, baseline, f"loss by {condition}", seeds, loss))
    return rows


def _row(text: str, arm: str, baseline: str, condition: str, seeds: Sequence[int], found: Comparison) -> dict[str, Any]:
    return {
        "text": text,
        "arm": arm,
        "baseline": baseline,
        "condition": condition,
        "n_seeds": len(seeds),
        "nats_per_word": asdict(found.interval),
        "p_seeds": found.p_seeds,
        "p_holm": None,
        "p_text": found.p_text,
    }


def _perplexity(nats: Interval) -> dict[str, float]:
    return {"value": math.exp(nats.value), "ci_low": math.exp(nats.low), "ci_high": math.exp(nats.high)}


def _last_routing(cell: StudyCell) -> tuple[int, int]:
    """Dead experts and all experts at the end of training."""
    dead = total = 0
    for path in (cell.folder / "run").glob("*/routing.jsonl"):
        layers = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["layers"]
        for layer in layers.values():
            dead += sum(share < DEAD / len(layer["load"]) for share in layer["load"])
            total += len(layer["load"])
    return dead, total
