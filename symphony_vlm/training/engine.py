"""Engines: from a stage's settings to those of the Trainer, and back to a single process's world when the stage ends.

DDP and FSDP2 are PyTorch's, ZeRO is DeepSpeed's; Hugging Face's Trainer and accelerate run all of them.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from symphony_vlm.config.recipe import Recipe, StageConfig
from symphony_vlm.errors import InputError
from symphony_vlm.training.deepspeed_settings import deepspeed_settings, is_deepspeed

__all__ = ["check_engines", "close_engine", "engine_arguments", "opening_accelerate", "with_accumulation"]


def check_engines(recipe: Recipe) -> None:
    """Whether every stage can run as it is set, by the processes that there are. For the first second of a run.

    Raises:
        InputError: an engine has no processes to share out, lacks its package, or contradicts the recipe; or the
            batch does not divide.
    """
    for stage in (with_accumulation(stage, PartialState().num_processes) for stage in recipe.stages):
        if stage.engine == "auto":
            continue
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                f"engine {stage.engine} works in processes that a launcher starts, and this one was started alone",
                where=f"stages.{stage.name}.engine",
                remedy="Start it with torchrun --nproc-per-node N -m train.instruct ... (N may be 1), or set auto.",
            )
        if is_deepspeed(stage.engine):
            if find_spec("deepspeed") is None:
                raise InputError(
                    f"engine {stage.engine} needs DeepSpeed, which is not installed",
                    where=f"stages.{stage.name}.engine",
                    remedy="pip install symphony-vlm[deepspeed], or use fsdp2, which PyTorch brings along.",
                )
            deepspeed_settings(stage, PartialState().num_processes)


def with_accumulation(stage: StageConfig, num_processes: int) -> StageConfig:
    """The stage with as many accumulated micro-batches as its `global_batch_size` takes on so many processes.

    Raises:
        InputError: it does not divide.
    """
    if stage.global_batch_size is None:
        return stage
    together = stage.batch_size * num_processes
    accumulation, left = divmod(stage.global_batch_size, together)
    if left:
        raise InputError(
            f"{stage.global_batch_size} samples in a step do not divide into micro-batches of {stage.batch_size} on "
            f"{num_processes} process{'es' if num_processes > 1 else ''} ({together} at a time)",
            where=f"stages.{stage.name}.global_batch_size",
            remedy="Change batch_size or the number of processes.",
        )
    return stage.model_copy(update={"gradient_accumulation_steps": accumulation, "global_batch_size": None})


def engine_arguments(stage: StageConfig, model: nn.Module) -> dict[str, Any]:
    """The keywords of `TrainingArguments` by which the Trainer uses the stage's engine.

    Args:
        stage: its settings, which `check_engines` has passed.
        model: what trains.
    """
    if is_deepspeed(stage.engine):
        _prepare_deepspeed()
        return {"deepspeed": deepspeed_settings(stage, PartialState().num_processes)}
    if stage.engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": _fsdp_settings(model)}
    return {}


def _fsdp_settings(model: nn.Module) -> dict[str, Any]:
    settings: dict[str, Any] = {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}
    blocks = sorted(_repeated_blocks(model))
    return settings | ({"transformer_layer_cls_to_wrap": blocks} if blocks else {})


def _repeated_blocks(model: nn.Module) -> set[str]:
    """Class names of the layers that stand in rows (decoder layers, blocks of a tower): each is sharded by itself."""
    names = set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            kinds = {type(item) for item in module}
            kind = kinds.pop()
            if not kinds and not kind.__module__.startswith("torch.nn.") and any(True for _ in module[0].parameters()):
                names.add(kind.__name__)
    return names


def _prepare_deepspeed() -> None:
    """What DeepSpeed asks of its environment and finds only under its own launcher."""
    if not torch.cuda.is_available():
        # How many processes this machine has; by torchrun's name for it.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(PartialState().num_processes)))
    # It calls collectives by names that PyTorch 2.13 has replaced.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if shutil.which("ninja") is None:  # a Python that was started by its path, its environment not activated
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


@contextmanager
def opening_accelerate(arguments: TrainingArguments) -> Iterator[None]:
    """Around the Trainer's opening of accelerate."""
    if getattr(arguments, "n_gpu", 1) > 1:
        # One process that sees several GPUs. DataParallel would run the model in threads, which share its routing
        # record, and multiply the batch.
        arguments._n_gpu = 1
    plugin = getattr(arguments, "fsdp_plugin_args", None)
    if plugin is None:
        yield
        return
    if arguments.bf16:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Accelerate's own would add up gradients, and give back the loss, in 16 bits.
        plugin["mixed_precision_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate takes FSDP for a matter of accelerators and would quietly train with DDP. It only looks at this
        # name, once, and replaces it; `fully_shard` itself works on CPUs.
        state.distributed_type = DistributedType.MULTI_XPU
    yield


def close_engine() -> None:
    """Takes back what an engine has set for the whole process, so that the next stage may have another."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()
