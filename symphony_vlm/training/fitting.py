"""Training one stage: its trainer, going on from the last checkpoint, and saving so that no half is ever seen."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from symphony_vlm.config.recipe import Recipe, StageConfig
from symphony_vlm.data.grouping import EpochSampler
from symphony_vlm.data.placeholders import PaddedDataset
from symphony_vlm.errors import InputError
from symphony_vlm.training.batches import random_sampler
from symphony_vlm.training.callbacks import CheckpointMark, JsonLog, ProgressDisplay
from symphony_vlm.training.consumption import Consumption, TaggedCollator
from symphony_vlm.training.engine import close_engine, engine_arguments
from symphony_vlm.training.gathering import frozen_weights, gather_, is_sharded, refuse_empty_tensors
from symphony_vlm.training.run_data import RunData
from symphony_vlm.training.run_state import RunState, last_checkpoint
from symphony_vlm.training.streamed import StreamedConversations
from symphony_vlm.training.trainer import StageTrainer

__all__ = ["RunContext", "fit", "make_trainer", "replace_folder"]


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What all stages of a run share."""

    recipe: Recipe
    folder: Path
    data: RunData
    tokenizer: Any
    state: RunState
    console: Console

    def model_folder(self, stage: str) -> Path:
        """Where a stage's result is."""
        return self.folder / stage / "model"

    def earlier(self, stage: StageConfig, kind: str) -> Path | None:
        """Result of the last stage of that kind before this one, if there is one."""
        before = self.recipe.stages[: [s.name for s in self.recipe.stages].index(stage.name)]
        found = [s.name for s in before if s.kind == kind]
        return self.model_folder(found[-1]) if found else None


def make_trainer(
    stage: StageConfig,
    context: RunContext,
    model: nn.Module,
    train: Any,
    validation: Any,
    collate: Callable[[Any], Any],
    *,
    rates: Mapping[str, float],
    callbacks: Sequence[TrainerCallback] = (),
    drop_last: bool = False,
    sampler: EpochSampler | None = None,
    labels: Sequence[str] = (),
    pad_token_id: int = 0,
) -> StageTrainer:
    """The trainer of a stage, with its logs, checkpoints and order of samples.

    Args:
        stage: its settings.
        context: the run's.
        model: what trains.
        train: a data set, or a stream.
        validation: a data set, perhaps empty, or None.
        collate: makes batches of their items.
        rates: learning rate by module prefix.
        callbacks: what happens beside, before the logs.
        drop_last: whether an incomplete last batch is left out.
        sampler: the order of the training samples; None: at random.
        labels: names of the samples' sources.
        pad_token_id: what a placeholder consists of.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = context.folder / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    has_validation = validation is not None and len(validation) > 0
    # Where incomplete batches are dropped, a small validation set must still make a complete one.
    eval_batch_size = min(stage.batch_size, len(validation)) if drop_last and has_validation else stage.batch_size
    streaming = isinstance(train, StreamedConversations)
    steps = stage.max_steps if streaming else _total_steps(stage, len(train), drop_last)
    if not streaming:
        sampler = sampler or random_sampler(train, seed=context.recipe.seed)
        if not drop_last and PartialState().num_processes > 1:
            multiple = stage.batch_size * PartialState().num_processes
            train = PaddedDataset(train, multiple=multiple, pad_token_id=pad_token_id)
            sampler = sampler.padded(len(train))
    report = partial(context.console.print, markup=False)
    consumption = Consumption(labels, folder, on_bad_sample=context.recipe.data.on_bad_sample, report=report)
    # Checkpoints fall on log steps, so that a log line never spans an interruption.
    save_steps = max(1, round(stage.save_fraction * steps / stage.log_steps)) * stage.log_steps
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps,
        learning_rate=max(rates.values()),
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup_ratio,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.adam_beta2,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.bf16,
        **_checkpointing(stage),
        logging_steps=stage.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=save_steps,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=2,
        prediction_loss_only=True,
        seed=context.recipe.seed,
        data_seed=context.recipe.seed,
        dataloader_num_workers=stage.dataloader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=drop_last,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        # A stream is told where to begin, see _fit; the Trainer would read all of it again.
        ignore_data_skip=streaming,
        use_cpu=not torch.cuda.is_available(),
        **engine_arguments(stage, model),
    )
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation if has_validation else None,
        data_collator=TaggedCollator(collate),
        rates=rates,
        consumption=consumption,
        sampler=sampler,
        callbacks=[
            *callbacks,
            consumption,
            JsonLog(context.folder / "log.jsonl", stage.name),
            CheckpointMark(
                lambda step: context.state.set(stage.name, step=step, records_seen=consumption.records_seen)
            ),
            TensorBoardCallback(SummaryWriter(str(context.folder / "tensorboard" / stage.name))),
            ProgressDisplay(context.console, stage.name),
        ],
    )
    _drop_default_printer(trainer)
    saves = max(1, steps // save_steps)
    context.console.print(f"[bold]{stage.name}[/]: {steps} steps, a checkpoint every {save_steps} ({saves} planned)")
    return trainer


def fit(trainer: StageTrainer, stage: StageConfig, context: RunContext) -> None:
    """Trains a stage to its end, from its last checkpoint if there is one. The main process then has a whole model.

    Raises:
        InputError: the checkpoint is of another number of processes.
    """
    with PartialState().main_process_first():
        checkpoint = last_checkpoint(context.folder / stage.name)
    known = context.state.get(stage.name)
    processes = PartialState().num_processes
    if checkpoint and known.get("processes", processes) != processes:
        raise InputError(
            f"the stage was begun by {known['processes']} processes and cannot go on with {processes}: each has random "
            "states of its own, and of a sharded model its own part",
            where=f"{context.folder}, stage {stage.name}",
            remedy=f"Use {known['processes']} processes, or remove {checkpoint.parent} to begin the stage anew.",
        )
    begin = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    context.state.set(stage.name, status="running", step=begin, processes=processes)
    if checkpoint and trainer.consumption is not None:
        trainer.consumption.restore(checkpoint)
        if isinstance(trainer.train_dataset, StreamedConversations):
            trainer.train_dataset.start = trainer.consumption.position
    start = time.monotonic()
    model = trainer.model
    frozen = frozen_weights(model, torch.bfloat16 if trainer.is_deepspeed_enabled and stage.bf16 else None)
    if checkpoint and _is_last(checkpoint):
        # Killed after the last step, before the model was saved.
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        trainer.open_finished(checkpoint, trainer.state.max_steps)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if is_sharded(trainer):
        gather_(model, frozen)
        close_engine()
    seconds = round(known.get("seconds", 0.0) + time.monotonic() - start, 1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    context.state.set(stage.name, step=trainer.state.global_step, loss=losses[-1], seconds=seconds)


def _is_last(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Saves next to the target and renames: a folder called ``model`` is always complete."""
    processes = PartialState()
    if processes.is_main_process:
        temporary = folder.with_name(".model.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save(temporary)
        refuse_empty_tensors(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    processes.wait_for_everyone()


def _total_steps(stage: StageConfig, num_samples: int, drop_last: bool) -> int:
    """Optimizer steps as the Trainer counts them: an incomplete accumulation at the end of an epoch is a step."""
    per_batch = stage.batch_size * PartialState().num_processes
    batches = num_samples // per_batch if drop_last else -(-num_samples // per_batch)
    if batches == 0:
        raise InputError(
            f"{num_samples} samples make no batch of {per_batch}", where=stage.name, remedy="Lower the batch size."
        )
    if stage.max_steps > 0:
        return stage.max_steps
    return math.ceil(stage.epochs * -(-batches // stage.gradient_accumulation_steps))


def _checkpointing(stage: StageConfig) -> dict[str, Any]:
    if not stage.gradient_checkpointing:
        return {}
    # Reentrant checkpointing would hide the router's logits from the losses. transformers renamed the setting.
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _drop_default_printer(trainer: StageTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
