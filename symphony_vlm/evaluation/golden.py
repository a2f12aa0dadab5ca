"""Known scores of published outputs, recomputed. The data are third parties' and stay outside; here are the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.rows import read_rows
from symphony_vlm.evaluation.scoring import OnUnparsed, score_files
from symphony_vlm.evaluation.statistics import Floats, mcnemar, paired_difference
from symphony_vlm.evaluation.task import get_task

__all__ = ["Check", "verify_scorers"]

SAME = 1e-6
"""Sums of the same numbers in another order agree far better; figures are published with six digits or fewer."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure: what it must be, and what came out."""

    source: str
    figure: str
    expected: float
    got: float
    tolerance: float = SAME

    @property
    def difference(self) -> float:
        """Got minus expected."""
        return self.got - self.expected

    @property
    def good(self) -> bool:
        """Whether the difference is within the tolerance."""
        return abs(self.difference) <= self.tolerance


MME_SCORES: Mapping[str, float] = {
    "perception": 963.6114445778312,
    "cognition": 249.64285714285714,
    "existence": 185.0,
    "count": 88.3333,
    "position": 63.3333,
    "color": 75.0,
    "posters": 79.5918,
    "celebrity": 47.3529,
    "scene": 136.75,
    "landmark": 93.5,
    "artwork": 87.25,
    "OCR": 107.5,
    "commonsense_reasoning": 87.1429,
    "numerical_calculation": 65.0,
    "text_translation": 47.5,
    "code_reasoning": 50.0,
}
"""LaVIN's published sample; subtasks to four decimals."""
MME_UNPARSED = 12

MMMU_RIGHT: tuple[tuple[str, str, bool, OnUnparsed, int, int], ...] = (
    ("llava1.5_13b", "", False, None, 329, 2),
    ("llava1.5_13b", "", False, 42, 330, 2),
    ("qwen_vl", "", False, None, 309, 48),
    ("qwen_vl", "", False, 42, 325, 48),
    ("llava1.5_13b", "total_val_output.json", True, None, 330, 0),
    ("qwen_vl", "total_val_output.json", True, None, 325, 0),
    ("", "llava1.5_13b_val.json", True, None, 324, 0),
)
"""Folder, file in it, whether its answers are parsed already, fallback, right of 900, unparsed."""
MMMU_ITEMS = 900

MMSTAR_SCORES: Mapping[str, float] = {
    "accuracy": 781 / 1500,
    "accuracy_strict": 770 / 1500,
    "accuracy/coarse perception": 0.656,
    "accuracy/fine-grained perception": 0.520,
    "accuracy/instance reasoning": 0.624,
    "accuracy/logical reasoning": 0.460,
    "accuracy/math": 0.532,
    "accuracy/science & technology": 0.332,
}

RBENCH: Mapping[str, tuple[float, float, float]] = {
    "mean ref": (0.424242, 0.619596, 0.370943),
    "mean dis": (0.436364, 0.597980, 0.345505),
    "mean com": (0.872727, 0.757172, 0.490909),
    "mean dis - ref": (0.012121, -0.021616, -0.025438),
    "standard error": (0.015914, 0.010315, 0.006440),
    "items worse": (28, 111, 191),
    "items better": (34, 78, 134),
    "retention": (1.028571, 0.965112, 0.931424),
}
"""R-Bench, per type MCQ, VQA, CAP."""
RBENCH_TYPES = ("MCQ", "VQA", "CAP")
RBENCH_TABLE: Mapping[str, int] = {"both right": 182, "right to wrong": 28, "wrong to right": 34, "both wrong": 251}
RBENCH_MCNEMAR = 0.525773
RBENCH_INTERVAL = (-0.018, 0.042)


def verify_scorers(folder: Path) -> list[Check]:
    """Recomputes every known score.

    Args:
        folder: With ``mme_lavin``, ``mmmu``, ``mmstar`` and ``rbench``.

    Raises:
        InputError: The folder, or a file in it, is not there or cannot be read.
    """
    parts: Mapping[str, Callable[[Path], Iterator[Check]]] = {
        "mme_lavin": _mme,
        "mmmu": _mmmu,
        "mmstar": _mmstar,
        "rbench": _rbench,
    }
    absent = [name for name in parts if not (folder / name).is_dir()]
    if absent:
        raise InputError(
            f"has no folder {', '.join(absent)}" if folder.is_dir() else "is not a folder",
            where=f"golden files {str(folder)!r}",
            remedy="Name it with --golden, or set SYMPHONY_VLM_SHARED_DATA to the folder above it.",
        )
    return [check for name, part in parts.items() for check in part(folder / name)]


def _mme(folder: Path) -> Iterator[Check]:
    for truth in (None, folder / "ground_truth"):
        score = score_files(get_task("mme"), folder / "predictions", annotations=truth)
        source = "MME, LaVIN" if truth is None else "MME, LaVIN, with annotations"
        yield Check(source=source, figure="unparsed", expected=MME_UNPARSED, got=score.n_unparsed)
        for name, expected in MME_SCORES.items():
            tolerance = SAME if name in ("perception", "cognition") else 5e-5
            yield Check(
                source=source, figure=name, expected=expected, got=_number(score.values[name]), tolerance=tolerance
            )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mmmu(folder: Path) -> Iterator[Check]:
    for model, file, is_parsed, on_unparsed, right, unparsed in MMMU_RIGHT:
        path = folder / "example_outputs" / model / file
        annotations = folder / "answer_dict_val.json" if is_parsed else None
        score = score_files(get_task("mmmu"), path, annotations=annotations, on_unparsed=on_unparsed)
        fallback = "" if on_unparsed is None else f", random:{on_unparsed}"
        source = f"MMMU, {'/'.join(filter(None, (model, file)))}{fallback}"
        got = sum(outcome.scored.score for outcome in score.outcomes)
        yield Check(source=source, figure="right of 900", expected=right, got=got)
        yield Check(
            source=source, figure="accuracy", expected=right / MMMU_ITEMS, got=_number(score.values["accuracy"])
        )
        yield Check(source=source, figure="unparsed", expected=unparsed, got=score.n_unparsed)


def _mmstar(folder: Path) -> Iterator[Check]:
    score = score_files(get_task("mmstar"), folder / "llava_next_yi_34b_mmstar.jsonl")
    for name, expected in MMSTAR_SCORES.items():
        yield Check(source="MMStar, LLaVA-NeXT Yi-34B", figure=name, expected=expected, got=_number(score.values[name]))


def _rbench(folder: Path) -> Iterator[Check]:
    tables = {part: read_rows(folder / f"Result_{part}_llava15.csv") for part in ("ref", "dis", "com")}
    for place, kind in enumerate(RBENCH_TYPES):
        scores: dict[str, Floats] = {}
        names: list[str] = []
        for part, rows in tables.items():
            chosen = [row for row in rows if row.text("type") == kind]
            scores[part] = np.array([float(row.text("result")) for row in chosen])
            names = [row.text("name") for row in chosen]
        change = scores["dis"] - scores["ref"]
        paired = paired_difference(scores["ref"], scores["dis"], names, seed=0)
        got = {
            **{f"mean {part}": float(values.mean()) for part, values in scores.items()},
            "mean dis - ref": paired.value,
            "standard error": float(change.std(ddof=1) / np.sqrt(len(change))),
            "items worse": float((change < 0).sum()),
            "items better": float((change > 0).sum()),
            "retention": float(scores["dis"].sum() / scores["ref"].sum()),
        }
        source = f"R-Bench, {kind}"
        for figure, expected in RBENCH.items():
            # Published to six decimals.
            yield Check(source=source, figure=figure, expected=expected[place], got=got[figure], tolerance=6e-7)
        if kind == "MCQ":
            yield from _two_by_two(source, scores["ref"], scores["dis"])
            for name, end, found in zip(("low", "high"), RBENCH_INTERVAL, (paired.low, paired.high), strict=True):
                # "About", to three decimals; means of -1, 0 and 1 move in steps of 1/495, one to either side.
                yield Check(
                    source=source,
                    figure=f"95 % interval, {name}",
                    expected=end,
                    got=found,
                    tolerance=1 / len(change) + 5e-4,
                )


def _two_by_two(source: str, clean: Floats, corrupted: Floats) -> Iterator[Check]:
    before, after = clean == 1, corrupted == 1
    counts = {
        "both right": int((before & after).sum()),
        "right to wrong": int((before & ~after).sum()),
        "wrong to right": int((~before & after).sum()),
        "both wrong": int((~before & ~after).sum()),
    }
    for figure, expected in RBENCH_TABLE.items():
        yield Check(source=source, figure=figure, expected=expected, got=counts[figure])
    p = mcnemar(counts["right to wrong"], counts["wrong to right"])
    yield Check(source=source, figure="McNemar p", expected=RBENCH_MCNEMAR, got=p, tolerance=6e-7)
