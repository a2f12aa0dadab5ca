"""How the files of a report are written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from symphony_vlm.evaluation.report_data import Evaluation

__all__ = ["json_text", "manifest_sha256", "write_whole"]


def json_text(content: Mapping[str, Any]) -> str:
    """JSON with sorted keys: equal contents give equal bytes."""
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def manifest_sha256(evaluation: Evaluation) -> str:
    """The id of an evaluation: the hash of its manifest."""
    manifest = json.dumps(evaluation.manifest, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(manifest).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Replaces the file at once: a reader never sees half of it, and a kill leaves the old one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
