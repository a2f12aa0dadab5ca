"""Evaluation folders of two made-up routers, written as the runner writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.evaluation.statistics import clustered_bootstrap_mean

CORRUPTIONS = ("gaussian_noise", "fog", "jpeg_compression")
GROUPS = ("colour", "count", "shape", "where")
NASTY = "<script>alert('x')</script> & | $ _"


def write_evaluation(
    folder: Path,
    *,
    router: str,
    sturdiness: float,
    corruptions: Sequence[str] = CORRUPTIONS,
    n_images: int = 40,
    training: bool = True,
) -> Path:
    """Writes manifest, results, predictions and training; ``sturdiness`` is how little a severity costs."""
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    model = f"runs/quickstart/{router}/model"
    skill = np.random.default_rng(1).random((n_images, len(GROUPS)))
    own = np.random.default_rng(len(router)).random((n_images, len(GROUPS)))
    rows: list[dict[str, Any]] = []
    for corruption, severity in [("none", 0), *((c, s) for c in corruptions for s in range(1, 6))]:
        cost = (1 - sturdiness) * severity * (0.06 + 0.03 * (corruption == "gaussian_noise"))
        right = 0.75 * skill + 0.25 * own < 0.72 - cost
        records = [
            _record(i, j, bool(right[i, j]), corruption, severity) for i in range(n_images) for j in range(len(GROUPS))
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"predictions/scenes.{corruption}.{severity}.jsonl").write_text(lines, encoding="utf-8")
        cell = {"model": model, "router": router, "corruption": corruption, "severity": severity}
        rows.append(_row(records, metric="accuracy", **cell))
        if severity == 0:
            for group in GROUPS:
                part = [record for record in records if record["group"] == group]
                rows.append(_row(part, metric=f"accuracy/{group}", **cell))
    baselines = [
        _baseline("constant answer", 0.26),
        _baseline("text only", 0.31 + 0.01 * len(router) / 10),
        _baseline("grey image", 0.30 + 0.01 * len(router) / 10),
    ]
    manifest = {
        "model": model,
        "router": router,
        "task": ["scenes"],
        "seed": 0,
        "versions": {"torch": "2.8.0"},
        "git_commit": "0" * 40,
    }
    # Data that is not there: these pictures were never drawn.
    provenance = {"seed": 0, "data": "no/such/test.json"}
    _dump(folder / "results.json", {"results": rows, "provenance": provenance, "baselines": baselines})
    _dump(folder / "manifest.json", manifest)
    if training:
        _dump(folder / "training.json", make_training(router))
    return folder


def make_training(router: str, *, n_layers: int = 2, n_experts: int = 4) -> dict[str, Any]:
    """A log of two stages, routing every 20 steps, and graphs for a Symphony router."""
    rng = np.random.default_rng(len(router))
    log, routing = [], []
    for stage, start, steps in (("pretrain", 4.0, 100), ("instruct", 2.5, 160)):
        for step in range(1, steps + 1):
            loss = 0.4 + (start - 0.4) * np.exp(-step / 40) + 0.05 * rng.standard_normal()
            entry = {"stage": stage, "step": step, "epoch": step / steps, "loss": loss, "cross_entropy": loss - 0.01}
            log.append({**entry, "balance": 1 + 0.2 * np.exp(-step / 30), "z": 0.1, "learning_rate": 1e-3})
            if step % 20 == 0 and stage == "instruct":
                layers, graphs = {}, {}
                for layer in range(n_layers):
                    load = rng.dirichlet(np.full(n_experts, 4 + step / 10))
                    layers[str(layer)] = {
                        "load": [round(float(x), 6) for x in load],
                        "load_cv": float(load.std() / load.mean()),
                        "gate_entropy": 1.2,
                        "token_entropy": 0.9,
                    }
                    graphs[f"language_model.model.layers.{layer}.mlp.router.expert_graph"] = _graph(
                        rng, n_experts, step
                    )
                routing.append(
                    {"stage": stage, "step": step, "layers": layers, "graphs": graphs if "sym" in router else {}}
                )
    return {"recipe": "quickstart", "log": log, "routing": routing}


def _graph(rng: np.random.Generator, n_experts: int, step: int) -> dict[str, Any]:
    off = rng.random((n_experts, n_experts)) ** 2
    np.fill_diagonal(off, 0)
    adjacency = 0.5 * np.eye(n_experts) + 0.5 * off / off.sum(1, keepdims=True)
    top = np.argsort(-(adjacency - np.diag(np.diag(adjacency))).ravel())[:3]
    edges = [[int(k) // n_experts, int(k) % n_experts, float(adjacency.ravel()[k])] for k in top]
    return {
        "adjacency": np.round(adjacency, 6).tolist(),
        "self_weight": 0.5,
        "spectral_gap": 0.42,
        "top_edges": edges,
        "num_updates": step,
    }


def _record(image: int, question: int, right: bool, corruption: str, severity: int) -> dict[str, Any]:
    name = f"scene-{image:04d}"
    prediction = "red" if right else NASTY
    return {
        "item_id": f"{name}-{question}",
        "task": "scenes",
        "split": "test",
        "image_key": name,
        "image_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "pixels_sha256": hashlib.sha256(f"{name}{corruption}{severity}".encode()).hexdigest(),
        "corruption": corruption,
        "severity": severity,
        "question": f"What {GROUPS[question]} is it? {NASTY}",
        "prediction": prediction,
        "answer": "red",
        "score": float(right),
        "error": None,
        "parsed": prediction,
        "parse_status": "ok",
        "group": GROUPS[question],
    }


def _row(records: Sequence[dict[str, Any]], *, metric: str, **cell: Any) -> dict[str, Any]:
    scores = [record["score"] for record in records]
    images = [record["image_key"] for record in records]
    interval = clustered_bootstrap_mean(scores, images, seed=0, n_resamples=1000)
    counts = {"n_items": len(records), "n_images": len(set(images)), "n_errors": 0, "n_unparsed": 0}
    ends = {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}
    return {**cell, "task": "scenes", "split": "test", "metric": metric, **ends, "higher_is_better": True, **counts}


def _baseline(name: str, value: float) -> dict[str, Any]:
    ends = {"value": value, "ci_low": value - 0.07, "ci_high": value + 0.07}
    return {"name": name, "task": "scenes", "metric": "accuracy", **ends, "n_items": 160}


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
