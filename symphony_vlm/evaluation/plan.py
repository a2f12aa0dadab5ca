"""What to evaluate, and the manifest that keeps one folder to one evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.attacks.attack import Attack
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.files import write_json
from symphony_vlm.model.loading import resolve_model_folder

__all__ = ["SCORINGS", "EvaluationPlan", "Scoring", "check_manifest", "record_batch_check"]

Scoring = Literal["generate", "likelihood"]
SCORINGS: tuple[Scoring, ...] = ("generate", "likelihood")


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What to evaluate. What changes answers or items is part of the manifest."""

    model: str
    tasks: tuple[str, ...]
    data: Path | None = None
    image_folder: Path | None = None
    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    corrupt_at: str = "native"
    """Where corruptions are applied, see `corruptions.placement`; the clean pictures have the same size."""
    limit: int | None = None
    """At most about so many questions per clean cell, whole pictures of a seeded order."""
    corrupted_limit: int | None = None
    """The same for corrupted cells; default: `limit`. Its pictures are the first of the clean cell's."""
    attacks: tuple[Attack, ...] = ()
    """Each is combined with the clean and with every corrupted cell."""
    budget_minutes: float | None = None
    """Choose `limit` so that everything ends in so many minutes."""
    budget: Mapping[str, Any] | None = None
    """How `limit` was chosen for the time, see `budget`."""
    seed: int = 0
    batch_size: int = 64
    max_new_tokens: int | None = None
    scoring: Scoring = "generate"
    """``likelihood``: of items with options the likeliest is the answer."""
    max_errors: float = 0.01
    """Share of a cell's items that may fail; above it the cell has no score."""
    check_batch: int = 0
    """So many clean items of each task are also answered one by one, to compare."""
    routing: bool = False
    """Records what the routers decide and compares corrupted with clean prompts; changes no answer."""


def check_manifest(plan: EvaluationPlan, output: Path, items: Mapping[str, Sequence[EvaluationItem]]) -> dict[str, Any]:
    """Writes the manifest; a folder with another one is refused, since its predictions would be mixed."""
    manifest = _manifest(plan, items)
    found: dict[str, Any] = {}
    path = output / "manifest.json"
    if path.is_file():
        found = json.loads(path.read_text())
        found = {"scoring": "generate"} | found  # before there was another
        changed = [key for key in manifest if found.get(key) != manifest[key]]
        if changed:
            raise InputError(
                f"the folder holds another evaluation; it differs in {', '.join(changed)}",
                where=str(output),
                remedy="Give another --output.",
            )
    attacks = {attack.spec: attack.parameters for attack in plan.attacks}
    if attacks:
        # As with corruptions, another start may add some; the same name must stand for the same attack.
        known = found.get("attacks", {})
        for spec in attacks.keys() & known.keys():
            if attacks[spec] != known[spec]:
                raise InputError(
                    f"{spec} was another attack when the folder was begun: {known[spec]}, now {attacks[spec]}",
                    where=str(output),
                    remedy="Give another --output.",
                )
        manifest["attacks"] = known | attacks
    write_json(path, found | manifest)
    return manifest


def record_batch_check(output: Path, batch_invariant: bool) -> None:
    """Notes in the manifest what `batch_check` has found."""
    path = output / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"batch_invariant": batch_invariant})


def _manifest(plan: EvaluationPlan, items: Mapping[str, Sequence[EvaluationItem]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, listed in items.items():
        for item in listed:
            digest.update(json.dumps([name, item.id, item.question, item.answers]).encode())
    return {
        "model": plan.model,
        "model_sha256": _weights_hash(plan.model),
        "task": list(plan.tasks),
        "items_sha256": digest.hexdigest(),
        "n_items": {name: len(listed) for name, listed in items.items()},
        "image_folder": str(plan.image_folder.resolve()) if plan.image_folder else None,
        "limit": plan.limit,
        "corrupted_limit": plan.corrupted_limit,
        "budget": None if plan.budget is None else dict(plan.budget),
        "seed": plan.seed,
        "max_new_tokens": plan.max_new_tokens,
        "decoding": "greedy",
        "scoring": plan.scoring,
        "corrupt_at": plan.corrupt_at,
    }


def _weights_hash(model: str) -> str | None:
    """sha256 over a local model's configuration and weights; None for a hub name."""
    folder = Path(resolve_model_folder(model))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
