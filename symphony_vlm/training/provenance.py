"""Where a result comes from: versions, commit, seed, hashes, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["provenance"]

PACKAGES = (
    "symphony-vlm",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "open_clip_torch",
    "timm",
    "datasets",
    "deepspeed",
    "numpy",
    "scipy",
    "opencv-python-headless",
    "pillow",
    "tokenizers",
    "safetensors",
    "gradio",
)


def provenance(**facts: Any) -> dict[str, Any]:
    """A JSON-ready record of this process's surroundings, plus ``facts``."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        **facts,
        # With the build (+cpu, +cu130), which the package's metadata does not tell.
        "versions": {"python": sys.version.split()[0], **_versions(), "torch": torch.__version__},
        "git": _git(),
        "hardware": {
            "device": device,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    """Commit and dirty flag of the package's own checkout, None in an installed wheel."""
    repository = Path(__file__).parents[2]
    if not (repository / ".git").exists():
        return None
    try:
        commit = _run_git(repository, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_run_git(repository, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _run_git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
