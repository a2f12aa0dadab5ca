"""Training one stage: its trainer, going on from the last checkpoint, and saving so that no half is ever seen."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from symphony_vlm.cards.writing import keep_edited_card
from symphony_vlm.config.recipe import Recipe, StageConfig
from symphony_vlm.data.grouping import EpochSampler
from symphony_vlm.data.placeholders import PaddedDataset
from symphony_vlm.errors import InputError, SavingError, Stopped
from symphony_vlm.files import replacing_folder
from symphony_vlm.model.pretrained import keep_cache_
from symphony_vlm.moe.expert_parallel import shard_experts_, unshard_experts_
from symphony_vlm.training.activation_checkpointing import checkpoint_layers_
from symphony_vlm.training.averaging import WeightAverage
from symphony_vlm.training.batches import random_sampler
from symphony_vlm.training.callbacks import JsonLog
from symphony_vlm.training.checkpoints import Checkpoints, step_of
from symphony_vlm.training.compilation import compile_layers_
from symphony_vlm.training.consumption import Consumption, TaggedCollator
from symphony_vlm.training.engine import close_engine, engine_arguments
from symphony_vlm.training.expert_parallel import ExpertParallelTrainer
from symphony_vlm.training.gathering import frozen_weights, gather_, is_sharded, refuse_empty_tensors
from symphony_vlm.training.monitor import StageMonitor
from symphony_vlm.training.profiling import StageProfile
from symphony_vlm.training.reporting import reporters
from symphony_vlm.training.run_data import RunData
from symphony_vlm.training.run_state import RunState
from symphony_vlm.training.streamed import StreamedConversations
from symphony_vlm.training.trainer import StageTrainer
from symphony_vlm.training.writing import attempt, first_failure, free_bytes, size_text

__all__ = ["RunContext", "fit", "make_trainer", "replace_folder"]

PREFETCHED_BATCHES = 4
"""By each worker of the data loader."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What all stages of a run share."""

    recipe: Recipe
    folder: Path
    data: RunData
    tokenizer: Any
    state: RunState
    console: Console
    profile_steps: int = 0
    """Of each stage; see `profiling`."""

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
    monitor = StageMonitor(
        stage, context.recipe.monitor, model, folder, context.console,
        last_saved=lambda: context.state.get(stage.name).get("step", 0),
    )  # fmt: skip
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
        logging_steps=stage.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=save_steps,
        eval_on_start=has_validation and stage.validate_at_start,
        save_strategy="steps",
        save_steps=save_steps,
        prediction_loss_only=True,
        seed=context.recipe.seed,
        data_seed=context.recipe.seed,
        **_loading(stage, cuda=torch.cuda.is_available(), augments=context.recipe.data.augmentation is not None),
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
    trainer_class = StageTrainer
    if stage.expert_parallel_size > 1:
        # Before the optimizer is built, and before the model goes to its device, where all experts may have no place.
        shard_experts_(model, stage.expert_parallel_size)
        trainer_class = ExpertParallelTrainer
    if stage.checkpointed_parts:
        # Before the trainer is built, which asks the model about it.
        checkpoint_layers_(model, stage.checkpointed_parts, every=stage.checkpoint_every)
    average = None if stage.ema_decay is None else WeightAverage(stage.ema_decay)
    profiled = None
    if context.profile_steps and PartialState().is_main_process:
        profiled = StageProfile(model, context.profile_steps, folder / "profile", report)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation if has_validation else None,
        data_collator=TaggedCollator(collate),
        rates=rates,
        consumption=consumption,
        checkpoints=Checkpoints(
            folder,
            keep=stage.keep_checkpoints,
            report=report,
            saved=lambda step: context.state.set(stage.name, step=step, records_seen=consumption.records_seen),
        ),
        sampler=sampler,
        average=average,
        monitor=monitor,
        profiled=profiled,
        callbacks=[
            *([] if profiled is None else [profiled]),
            *callbacks,
            *([] if average is None else [average]),
            *monitor.callbacks,
            consumption,
            JsonLog(context.folder / "log.jsonl", stage.name),
            *reporters(stage.name, context.recipe, context.folder, context.state),
            monitor.display,
        ],
    )
    _drop_default_printer(trainer)
    if isinstance(trainer.model, PreTrainedModel):
        keep_cache_(trainer.model)
    if stage.compile:
        compile_layers_(model, arguments.device)
    saves = max(1, steps // save_steps)
    context.console.print(f"[bold]{stage.name}[/]: {steps} steps, a checkpoint every {save_steps} ({saves} planned)")
    return trainer


def fit(trainer: StageTrainer, stage: StageConfig, context: RunContext) -> None:
    """Trains a stage to its end, from its last checkpoint if there is one. The main process then has a whole model.

    Raises:
        InputError: the checkpoint is of another number of processes.
        Stopped: a signal asked for it.
    """
    assert trainer.checkpoints is not None
    checkpoint = trainer.checkpoints.last()
    known = context.state.get(stage.name)
    processes = PartialState().num_processes
    if checkpoint and known.get("processes", processes) != processes:
        raise InputError(
            f"the stage was begun by {known['processes']} processes and cannot go on with {processes}: each has random "
            "states of its own, and of a sharded model its own part",
            where=f"{context.folder}, stage {stage.name}",
            remedy=f"Use {known['processes']} processes, or remove {checkpoint.parent} to begin the stage anew.",
        )
    begin = step_of(checkpoint) if checkpoint else 0
    context.state.set(stage.name, status="running", step=begin, processes=processes)
    if checkpoint and trainer.consumption is not None:
        trainer.consumption.restore(checkpoint)
        context.state.set(stage.name, records_seen=trainer.consumption.records_seen)
        if isinstance(trainer.train_dataset, StreamedConversations):
            trainer.train_dataset.start = trainer.consumption.position
    if checkpoint:
        trainer.args.eval_on_start = False  # the log has it already
        if trainer.average is not None:
            trainer.average.restore(checkpoint)
    start = time.monotonic()
    model = trainer.model
    frozen = frozen_weights(model, torch.bfloat16 if trainer.is_deepspeed_enabled and stage.bf16 else None)
    if checkpoint and _is_last(checkpoint):
        # Killed after the last step, before the model was saved.
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        trainer.open_finished(checkpoint, trainer.state.max_steps)
    else:
        shown = nullcontext() if trainer.monitor is None else trainer.monitor.shown()
        with trainer.stop.listening(), shown:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = round(known.get("seconds", 0.0) + time.monotonic() - start, 1)
    number = trainer.stop.number(trainer.args.device)
    if number:
        raise _stopped(stage.name, number, trainer, context, seconds)
    if trainer.average is not None:
        trainer.average.apply_(trainer.model)
    # Whoever saves the result finds all of it.
    unshard_experts_(trainer.model)
    if is_sharded(trainer):
        gather_(model, frozen)
        close_engine()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    context.state.set(stage.name, step=trainer.state.global_step, loss=losses[-1], seconds=seconds)


def _stopped(stage: str, number: int, trainer: StageTrainer, context: RunContext, seconds: float) -> Stopped:
    assert trainer.checkpoints is not None
    context.state.set(stage, seconds=seconds)
    last = trainer.checkpoints.last()
    place = f"{stage} from step {step_of(last)}" if last else f"{stage} from its beginning"
    name = signal.Signals(number).name
    return Stopped(
        f"stopped by {name} after step {trainer.state.global_step} of {stage}; "
        f"the same command again continues {place}",
        number,
    )


def _is_last(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Saves next to the target and renames: a folder called ``model`` is always complete.

    Raises:
        SavingError: it could not be written; what was there before is still there.
    """

    def replace() -> None:
        with replacing_folder(folder) as temporary:
            save(temporary)
            keep_edited_card(folder, temporary)
            refuse_empty_tensors(temporary)

    failure = first_failure(attempt(replace) if PartialState().is_main_process else None)
    if failure:
        raise SavingError(
            f"{folder}: the model could not be saved ({failure}); {size_text(free_bytes(folder))} are free there. "
            "Free some space on that disk and run the same command again: it continues from the last checkpoint."
        )


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


def _loading(stage: StageConfig, *, cuda: bool, augments: bool) -> dict[str, Any]:
    """How batches come to the device: on CUDA ahead of time, from memory that it reads while it computes."""
    settings: dict[str, Any] = {"dataloader_num_workers": stage.dataloader_workers}
    if not cuda:
        return settings | {"dataloader_pin_memory": False}
    # A copy that is waited for would also wait for the whole micro-batch before it.
    settings |= {"dataloader_pin_memory": True, "accelerator_config": {"non_blocking": True}}
    if stage.dataloader_workers:
        # Workers that stay never hear which epoch it is, by which augmentation draws.
        settings |= {"dataloader_persistent_workers": not augments, "dataloader_prefetch_factor": PREFETCHED_BATCHES}
    return settings


def _drop_default_printer(trainer: StageTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
