"""DeepSpeed's configuration of a stage: a file says how the engine works, the recipe everything else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from symphony_vlm.config.engines import ENGINES
from symphony_vlm.config.reading import config_folder
from symphony_vlm.config.recipe import StageConfig
from symphony_vlm.errors import InputError

__all__ = ["LEAF_MODULE", "deepspeed_settings", "is_deepspeed"]

LEAF_MODULE = "symphony_vlm.moe.layer.SparseMoE"
"""ZeRO-3 gathers all of such a layer at once, whichever of its experts a process needs."""


def is_deepspeed(engine: str) -> bool:
    """Whether an engine's name stands for a DeepSpeed configuration."""
    return engine not in ENGINES or engine.startswith("zero")


def deepspeed_settings(stage: StageConfig, num_processes: int) -> dict[str, Any]:
    """The stage's DeepSpeed configuration, complete.

    Args:
        stage: with `gradient_accumulation_steps` as they will be (`engine.with_accumulation`).
        num_processes: that train together.

    Raises:
        InputError: no such file, not JSON, or a key of it belongs to the recipe and says something else.
    """
    packaged = stage.engine in ENGINES
    path = config_folder() / "deepspeed" / f"{stage.engine}.json" if packaged else Path(stage.engine).expanduser()
    settings = _read(path, stage)
    ours = _of_recipe(stage, num_processes)
    for key, field in (("optimizer", "train, weight_decay, adam_beta2"), ("scheduler", "schedule, warmup_ratio")):
        if key in settings:
            raise _contradiction(path, f"{key!r} is set", field)
    for key, found in _leaves(settings):
        if key in ours and found not in ("auto", ours[key][1]):
            field, value = ours[key]
            raise _contradiction(path, f"{key} is {json.dumps(found)}", field, json.dumps(value))
    settings |= {key: value for key, (_, value) in ours.items() if "." not in key}
    settings["bf16"] = {**settings.get("bf16", {}), "enabled": stage.bf16}
    settings.pop("fp16", None)
    # The optimizer is PyTorch's, with a rate for each module, in every engine and also where its state is offloaded.
    settings["zero_allow_untested_optimizer"] = True
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    zero = settings.setdefault("zero_optimization", {})
    if zero.get("stage") == 3:
        leaves = zero.setdefault("leaf_module", {})
        classes = leaves.get("classes", [])
        leaves["classes"] = list(dict.fromkeys([*([classes] if isinstance(classes, str) else classes), LEAF_MODULE]))
    return settings


def _of_recipe(stage: StageConfig, num_processes: int) -> dict[str, tuple[str, Any]]:
    """DeepSpeed's keys that the recipe decides: the name of its field, and the value."""
    in_step = stage.batch_size * stage.gradient_accumulation_steps * num_processes
    return {
        "train_batch_size": ("batch_size, gradient_accumulation_steps and global_batch_size", in_step),
        "train_micro_batch_size_per_gpu": ("batch_size", stage.batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", stage.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", stage.max_grad_norm),
        "bf16.enabled": ("bf16", stage.bf16),
        **{f"{other}.enabled": ("bf16", False) for other in ("fp16", "amp", "torch_autocast")},
    }


def _contradiction(path: Path, found: str, field: str, value: str | None = None) -> InputError:
    says = "" if value is None else f", which makes it {value}"
    return InputError(
        f"{found}, but that is for the recipe to say ({field}){says}",
        where=str(path),
        remedy="Leave it out of the file and set the recipe's field.",
    )


def _read(path: Path, stage: StageConfig) -> dict[str, Any]:
    where = f"stages.{stage.name}.engine"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{path}: {reason}", where=where, remedy="Give an existing DeepSpeed file.") from error
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", where=str(path)) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise InputError("a DeepSpeed configuration is an object, and so is its zero_optimization", where=str(path))
    return settings


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
