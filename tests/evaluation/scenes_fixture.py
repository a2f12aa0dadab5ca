"""Evaluation folders over real pictures: generated scenes, true corruptions and hashes, made-up answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.corruptions import canary
from symphony_vlm.data.scenes import generate_scenes
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.pictures import open_picture
from symphony_vlm.evaluation.statistics import clustered_bootstrap_mean
from symphony_vlm.evaluation.task import get_task

GRID = (("gaussian_noise", 1), ("gaussian_noise", 3), ("gaussian_noise", 5), ("fog", 1), ("fog", 3), ("fog", 5))


def make_scenes(folder: Path, *, pictures: int = 30) -> Path:
    """Generated scenes; returns the file of questions."""
    return generate_scenes(folder, train=1, test=pictures, seed=0).test_json


def write_scene_evaluation(
    folder: Path,
    data: Path,
    *,
    router: str,
    cost: float,
    grid: Sequence[tuple[str, int]] = GRID,
    seed: int = 0,
    luck: int = 0,
    name_data: bool = True,
) -> Path:
    """Writes what the runner writes; ``cost`` is what a severity takes from the share of right answers.

    Args:
        folder: Written to.
        data: From `make_scenes`.
        router: Also the model's name.
        cost: 0 to 0.2.
        grid: Corrupted cells.
        seed: Of the corruptions.
        luck: Another number gives other answers of equal skill: another training run.
        name_data: Whether results.json says where the data is.
    """
    task = get_task("scenes")
    items = task.load(data, None, folder, 0)
    easy = np.random.default_rng(1).random(len(items))
    own = np.random.default_rng([len(router), luck]).random(len(items))
    model = f"runs/{router}{luck or ''}/model"
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for corruption, severity in (("none", 0), *grid):
        cell = Cell(task=task, corruption=corruption, severity=severity, seed=seed)
        drawn: dict[str, tuple[str, str]] = {}
        records: list[dict[str, Any]] = []
        loss = cost * severity * (1.3 if "noise" in corruption else 0.8)
        for item, chance, form in zip(items, 0.7 * easy + 0.3 * own, own, strict=True):
            if item.image_key not in drawn:
                picture = open_picture(item.images[0], cell)
                drawn[item.image_key] = picture.sha256, hashlib.sha256(picture.pixels.tobytes()).hexdigest()
            wrong = "blue" if item.answers[0] != "blue" else "red"
            # Some answers are wrong for their form alone: the lenient rule takes them.
            other = f"The answer is {item.answers[0]}." if form < 0.2 else wrong
            said = item.answers[0] if chance < 0.8 - loss else other
            scored = task.score(said, item)
            records.append(
                {
                    "item_id": item.id,
                    "task": "scenes",
                    "split": "test",
                    "image_key": item.image_key,
                    "image_sha256": drawn[item.image_key][0],
                    "pixels_sha256": drawn[item.image_key][1],
                    "corruption": corruption,
                    "severity": severity,
                    "seed": seed,
                    "corrupt_at": "native",
                    "attack": "none",
                    "question": item.question,
                    "prediction": said,
                    "answer": item.answers[0],
                    "score": scored.score,
                    "lenient": float(item.answers[0] in said),
                    "parsed": scored.parsed,
                    "parse_status": scored.status,
                    "error": None,
                }
            )
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"predictions/scenes.{corruption}.{severity}.jsonl").write_text(lines, encoding="utf-8")
        interval = clustered_bootstrap_mean(
            [r["score"] for r in records], [r["image_key"] for r in records], seed=0, n_resamples=500
        )
        row = {"model": model, "router": router, "task": "scenes", "split": "test", "corruption": corruption}
        row |= {"severity": severity, "metric": "accuracy", "higher_is_better": True, "value": interval.value}
        row |= {"ci_low": interval.low, "ci_high": interval.high, "n_items": len(items), "n_images": len(drawn)}
        rows.append({**row, "n_errors": 0, "n_unparsed": 0})
    provenance = {"seed": 0, "corruption_canary": canary(), **({"data": str(data)} if name_data else {})}
    manifest = {"model": model, "task": ["scenes"], "seed": seed, "corrupt_at": "native", "image_folder": None}
    baselines = [{"name": "constant answer ('red')", "task": "scenes", "metric": "accuracy", "value": 0.2}]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    document = {"results": rows, "provenance": provenance, "baselines": baselines}
    (folder / "results.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
