"""Finished jobs with known scores, so that tables can be tested without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.study.configuration import Study
from symphony_vlm.study.drift import FIGURES
from symphony_vlm.study.jobs import Job


def small_study(**values: Any) -> Study:
    """Two arms, two seeds, one text."""
    given = {
        "name": "small", "recipe": "wikitext2_tiny", "seeds": [0, 1], "texts": {"wiki": {"path": "a.txt"}},
        "arms": {"smoe": [], "symphony": {"settings": ["model.moe.router=symphony_smoe"], "baseline": "smoe"}},
        "perplexity": {"rates": [0.1], "context": 32, "stride": 16},
    }  # fmt: skip
    return Study.model_validate(given | values)


def picture_study(**values: Any) -> Study:
    """Two arms, two seeds, drawn scenes, six corrupted cells of which four are common."""
    given: dict[str, Any] = {
        "name": "small",
        "recipe": "tiny",
        "seeds": [0, 1],
        "arms": {
            "smoe": ["model.moe.router=smoe"],
            "symphony": {"settings": ["model.moe.router=symphony_smoe"], "baseline": "smoe"},
        },
        "pictures": {"task": "scenes", "scenes": {"train": 96, "test": 16}},
        "evaluation": {
            "corruptions": ["fog", "contrast", "saturate"],
            "severities": [1, 5],
            "limit": 16,
            "corrupted_limit": 8,
        },
    }
    return Study.model_validate(given | values)


def finish(job: Job) -> None:
    """As if its commands had run."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "seconds.txt").write_text("90.0\n")
    job.finish()


def write_lines(folder: Path, nats: float, *, lines: int = 12, loss: float = 0.5) -> None:
    """Ten words a line, of so many nats each clean, and ``loss`` more attacked."""
    records = [
        {"cell": name, "line": line, "cluster": f"line {line}", "n_words": 10, "log_probability": -10 * (nats + more)}
        for name, more in (("clean", 0.0), ("word_swap@0.1", loss))
        for line in range(lines)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lines.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def write_predictions(folder: Path, scores: Sequence[tuple[str, int, Sequence[float]]]) -> None:
    """Two questions a picture; ``scores`` has corruption, severity and a score for every question."""
    folder.mkdir(parents=True, exist_ok=True)
    for corruption, severity, values in scores:
        records = [
            {"item_id": f"q{n}", "image_key": f"picture {n // 2}", "score": float(score), "prediction": f"a{score}"}
            for n, score in enumerate(values)
        ]
        path = folder / f"scenes.{corruption}.{severity}.jsonl"
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def write_drift(folder: Path, changed: Sequence[float] | None) -> None:
    """A results.json with one block of routing: experts changed among the tokens of pictures and of text.

    Without a number there are no routers; where none ever changes all experts are always chosen, and κ is not defined.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if changed is None:
        (folder / "results.json").write_text(json.dumps({"results": []}))
        return
    kinds = dict(zip(("image", "text"), changed, strict=True))
    means = {
        kind: {name: {"value": value} for name in FIGURES} | {"kappa": {"value": 0.5 if value else None}}
        for kind, value in kinds.items()
    }
    areas = [
        {"drift": drift, "modality": kind, "value": 0.75 if drift == "fluctuation" else 0.1, "n_flips": 1, "n_kept": 3}
        for drift in ("js_gate", "fluctuation")
        for kind in kinds
    ]
    nothing_lost = [area | {"value": None, "n_flips": 0, "n_kept": 4} for area in areas]
    cells = [
        {"corruption": name, "severity": 1, "attack": "none", "association": found}
        for name, found in (("fog", areas), ("contrast", nothing_lost), ("saturate", areas))
    ]
    block = {"mean": {"all": means}, "cells": cells}
    (folder / "results.json").write_text(json.dumps({"robustness": {"routing_drift": [block]}}))


def write_routing(run: Path, adjacency: Sequence[Sequence[float]] | None = None) -> None:
    """Two records of one layer of four experts, two of them dead."""
    path = run / "instruct" / "routing.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    layer = {"load": [0.5, 0.5, 0.0, 0.0], "load_cv": 1.0, "token_entropy": 0.7, "gate_entropy": 0.7, "tokens": 9}
    entry: dict[str, Any] = {"layers": {"0": layer}}
    if adjacency is not None:
        entry["graphs"] = {"layers.0": {"adjacency": adjacency}}
    path.write_text("".join(json.dumps({"step": step, **entry}) + "\n" for step in (1, 2)))
