"""How far the routing of an arm moves on corrupted pictures, and whether answers are lost where it moves.

Definitions are those of docs/routing-drift.md; means over the layers and, unweighted, over the common corrupted cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from symphony_vlm.corruptions.catalogue import COMMON
from symphony_vlm.evaluation.routing.prompts import MODALITIES
from symphony_vlm.evaluation.statistics import holm
from symphony_vlm.study.scores import ArmScores
from symphony_vlm.study.statistics import compare_seeds

__all__ = ["FIGURES", "drift_rows", "read_drift"]

FIGURES = ("fluctuation", "fluctuation_plain", "kappa", "flips_prevented", "flips_caused", "margin_clean")
COMPARED = "fluctuation"


def read_drift(results: Path) -> dict[str, dict[str, float | None]]:
    """Of one model's results.json, by modality: `FIGURES`, ``answers_lost`` and ``association``.

    ``answers_lost`` is the share of the answers that are right on a clean picture and wrong on the corrupted one (the
    same for all modalities); ``association`` the area under the ROC curve of an item's `COMPARED` for that.

    Returns:
        Empty if the results have no routing.
    """
    document = json.loads(results.read_text(encoding="utf-8"))
    blocks = (document.get("robustness") or {}).get("routing_drift")  # a dense model has none
    if not blocks or blocks[0]["mean"] is None:
        return {}
    means = blocks[0]["mean"]["all"]
    found: dict[str, dict[str, float | None]] = {}
    for kind in MODALITIES:
        areas = [
            area
            for cell in blocks[0]["cells"]
            if cell["corruption"] in COMMON and cell["attack"] == "none"
            for area in cell["association"]
            if (area["drift"], area["modality"]) == (COMPARED, kind)
        ]
        lost, right = (sum(area[name] for area in areas) for name in ("n_flips", "n_kept"))
        known = [area["value"] for area in areas if area["value"] is not None]
        found[kind] = {name: means[kind][name]["value"] for name in FIGURES if kind in means}
        found[kind]["answers_lost"] = lost / (lost + right) if lost + right else None
        found[kind]["association"] = mean(known) if known else None
    return found


def drift_rows(arms: Mapping[str, ArmScores], baselines: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """A row for every arm with routers and modality: means over seeds, and its `COMPARED` minus the baseline's.

    Args:
        arms: on one part of one data set.
        baselines: of the arms, those that have one.
    """
    rows: list[dict[str, Any]] = []
    for name, scores in arms.items():
        for kind in MODALITIES:
            by_seed = _by_seed(scores, kind)
            if by_seed:
                figures = {figure: _mean([found[figure] for found in by_seed.values()]) for figure in _names(by_seed)}
                other = baselines.get(name)
                against = _by_seed(arms[other], kind) if other is not None and other in arms else {}
                if all(found.get("kappa") is None for found in against.values()):
                    against = {}  # its tokens have no choice of experts, so that any change is one more than its
                per_seed = {"seeds": list(by_seed), "per_seed": [found[COMPARED] for found in by_seed.values()]}
                compared = _compared(by_seed, against)
                rows.append({"arm": name, "modality": kind, "figures": figures, **per_seed, **compared})
    tested = [row for row in rows if row["p_seeds"] is not None]
    for row, adjusted in zip(tested, holm([row["p_seeds"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return [row | {"baseline": baselines.get(row["arm"])} for row in rows]


def _by_seed(scores: ArmScores, kind: str) -> dict[int, Mapping[str, float | None]]:
    return {cell.seed: cell.drift[kind] for cell in scores.cells if cell.drift.get(kind, {}).get(COMPARED) is not None}


def _names(by_seed: Mapping[int, Mapping[str, float | None]]) -> Sequence[str]:
    return list(next(iter(by_seed.values())))


def _compared(
    by_seed: Mapping[int, Mapping[str, float | None]], against: Mapping[int, Mapping[str, float | None]]
) -> dict[str, Any]:
    pairs = [(found[COMPARED], against[seed][COMPARED]) for seed, found in by_seed.items() if seed in against]
    differences = [own - other for own, other in pairs if own is not None and other is not None]
    if not differences:
        return {"difference": None, "p_seeds": None, "p_holm": None}
    interval, p_seeds = compare_seeds(differences)
    return {"difference": asdict(interval), "p_seeds": p_seeds, "p_holm": None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
