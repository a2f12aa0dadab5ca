"""The libraries: is each there, in a version that fits, and does it do the least that it is needed for?"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial

from symphony_vlm.doctor import operations
from symphony_vlm.doctor.finding import Check, Outcome

__all__ = ["OPTIONAL", "REQUIRED", "library_checks"]

REQUIRED: dict[str, str | Callable[[], str]] = {
    "torch": operations.torch,
    "torchvision": operations.torchvision,
    "transformers": operations.transformers,
    "accelerate": "accelerate",
    "tokenizers": operations.tokenizers,
    "safetensors": operations.safetensors,
    "open_clip_torch": "open_clip",
    "datasets": operations.datasets,
    "pillow": operations.pillow,
    "opencv-python-headless": operations.opencv,
    "numpy": "numpy",
    "scipy": "scipy.stats",
    "matplotlib": operations.matplotlib,
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "jinja2": "jinja2",
    "typer": "typer",
    "rich": "rich",
    "tensorboard": "torch.utils.tensorboard",
    "gradio": "gradio",
    "starlette": "starlette.applications",
    "uvicorn": "uvicorn",
}
"""Distributions that pyproject.toml requires, with a module to import or an operation to try."""

OPTIONAL: dict[str, tuple[str | Callable[[], str], str, str]] = {
    "deepspeed": ("deepspeed", "the engines zero1 to zero3", "symphony-vlm[deepspeed]"),
    "ninja": ("ninja", "compiling deepspeed's extensions", "symphony-vlm[deepspeed]"),
    "peft": ("peft", "LoRA stages", "symphony-vlm[lora]"),
    "bitsandbytes": (operations.bitsandbytes, "models in 8 and 4 bits", "symphony-vlm[qlora]"),
    "wandb": ("wandb", "monitor.report_to: wandb", "symphony-vlm[wandb]"),
    "flash-attn": ("flash_attn", "flash attention on CUDA; without it sdpa is used", "flash-attn"),
    "pycocoevalcap": ("pycocoevalcap.cider.cider", "CIDEr of the task captions", "symphony-vlm[captions]"),
    "sacrebleu": ("sacrebleu", "BLEU of the task captions", "symphony-vlm[captions]"),
    "lmms_eval": ("lmms_eval", "running our models in lmms-eval", "symphony-vlm[lmms-eval]"),
    "openai": ("openai", "talking to `symphony-vlm serve` from Python", "openai"),
    "playwright": ("playwright.sync_api", "make test-browser", "playwright"),
}
"""Distributions that something here can use: module or operation, what for, what to install."""


def library_checks() -> list[Check]:
    """Checks of every library, required ones first."""
    needed = _requirements()
    checks = [
        Check(
            name=name,
            group="Libraries",
            run=partial(_try_required, name, probe, needed.get(_canonical(name), "")),
            required=True,
        )
        for name, probe in REQUIRED.items()
    ]
    return checks + [
        Check(name=name, group="Optional libraries", run=partial(_try_optional, name, *parts))
        for name, parts in OPTIONAL.items()
    ]


def _requirements() -> dict[str, str]:
    """The versions that this package's metadata asks for; none if it runs from a checkout and is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("symphony-vlm") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [Requirement(line) for line in lines]
    return {_canonical(r.name): str(r.specifier) for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _try_required(name: str, probe: str | Callable[[], str], specifier: str) -> Outcome:
    from packaging.specifiers import SpecifierSet

    install = f"pip install '{name}{specifier}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Outcome(status="absent", detail="not installed", remedy=install)
    try:
        remark = _try(probe)
    except Exception as error:
        return Outcome(status="broken", detail=f"{version}, {_first_line(error)}", remedy=install)
    if not SpecifierSet(specifier).contains(version, prereleases=True):
        return Outcome(status="warning", detail=f"{version}, and {specifier} is needed", remedy=install)
    return Outcome(status="ok", detail=", ".join(filter(None, [version, remark])))


def _try_optional(name: str, probe: str | Callable[[], str], purpose: str, install: str) -> Outcome:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Outcome(status="absent", detail=f"for {purpose}", remedy=f"pip install '{install}'")
    try:
        remark = _try(probe)
    except Exception as error:
        return Outcome(
            status="broken", detail=f"{version}, {_first_line(error)}", remedy=f"It is for {purpose}: reinstall it."
        )
    return Outcome(status="ok", detail=", ".join(filter(None, [version, remark])))


def _try(probe: str | Callable[[], str]) -> str:
    if callable(probe):
        return probe()
    importlib.import_module(probe)
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
