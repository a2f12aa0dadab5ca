"""One function per kind of stage. Each builds a model and a data set, trains, and saves what the next stage opens."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from symphony_vlm.config.recipe import Recipe, StageConfig
from symphony_vlm.data.collator import ConversationCollator
from symphony_vlm.data.grouping import EpochSampler
from symphony_vlm.data.images import load_image
from symphony_vlm.data.mixture import SampleList
from symphony_vlm.data.packing import PackedCollator
from symphony_vlm.data.placeholders import PaddedDataset
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.errors import InputError
from symphony_vlm.model.attention import attention_by_document
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.training.batches import grouped_sampler, pack, random_sampler
from symphony_vlm.training.callbacks import CheckpointMark, ExpertGraphUpdate, JsonLog, ProgressDisplay, RoutingLog
from symphony_vlm.training.consumption import Consumption, SourcedConversations, TaggedCollator
from symphony_vlm.training.contrastive import CaptionCollator, ContrastiveModel, caption_dataset, save_open_clip
from symphony_vlm.training.features import CachedFeatures, fill_feature_cache
from symphony_vlm.training.parts import assemble, new_image_processor, new_language_model
from symphony_vlm.training.run_data import RunData
from symphony_vlm.training.run_state import RunState, last_checkpoint
from symphony_vlm.training.streamed import StreamedConversations, streamed
from symphony_vlm.training.text import TextBlocks
from symphony_vlm.training.trainer import StageTrainer, freeze_except

__all__ = ["RunContext", "run_stage"]

logger = logging.getLogger(__name__)


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


def run_stage(stage: StageConfig, context: RunContext) -> None:
    """Trains one stage, continuing from its last checkpoint, and saves its model."""
    set_seed(context.recipe.seed)
    kinds: dict[str, Callable[[StageConfig, RunContext], None]] = {
        "contrastive": _run_contrastive,
        "text": _run_text,
        "multimodal": _run_multimodal,
    }
    kinds[stage.kind](stage, context)


def _run_contrastive(stage: StageConfig, context: RunContext) -> None:
    everything, held_out = context.data.get(stage)
    train, validation = everything.with_images(), held_out.with_images()
    if len(train) < len(everything):
        context.console.print(f"{stage.name}: {len(everything) - len(train)} records without an image left out")
    architecture = context.recipe.model.vision.architecture
    if architecture is None:
        raise InputError(
            "a contrastive stage trains a new encoder", where=stage.name, remedy="Set vision.architecture."
        )
    processor = new_image_processor(context.recipe.model)
    model = ContrastiveModel(architecture, len(context.tokenizer))
    dataset = partial(
        caption_dataset,
        tokenizer=context.tokenizer,
        to_square=processor.prepare,
        load=partial(load_image, max_pixels=context.recipe.data.max_pixels),
    )
    collate = CaptionCollator(model.context_length, model.end_token_id, processor.normalize)
    trainer = _trainer(
        stage,
        context,
        model,
        dataset(train),
        dataset(validation),
        collate,
        rates={"": stage.learning_rate},
        labels=train.labels,
        # An incomplete last batch has fewer negatives, and so another loss.
        drop_last=True,
    )
    _fit(trainer, stage, context)
    save = partial(save_open_clip, model, image_mean=processor.image_mean, image_std=processor.image_std)
    _replace_folder(context.model_folder(stage.name), save)


def _run_text(stage: StageConfig, context: RunContext) -> None:
    train, validation = context.data.get(stage)
    template = stage.template or context.recipe.model.template
    blocks = partial(TextBlocks, tokenizer=context.tokenizer, template=template, block_size=stage.max_length)
    model = new_language_model(context.recipe.model, context.tokenizer, None)
    held_out = _optional_blocks(blocks, validation)
    rates = {"": stage.learning_rate}
    trainer = _trainer(stage, context, model, blocks(train), held_out, _stack, rates=rates)
    _fit(trainer, stage, context)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        context.tokenizer.save_pretrained(folder)

    _replace_folder(context.model_folder(stage.name), save)


def _run_multimodal(stage: StageConfig, context: RunContext) -> None:
    train, validation = context.data.get(stage)
    model = _starting_model(stage, context)
    processor = model.processor
    assert processor is not None
    if stage.upcycle:
        assert context.recipe.model.moe is not None
        model.upcycle_(MoEConfig.from_dict(context.recipe.model.moe), seed=context.recipe.seed)
    freeze_except(model, stage.train)
    load_rgb = partial(load_image, max_pixels=context.recipe.data.max_pixels)
    cached = _cached_features(model, [train, validation], context, load_rgb) if stage.cache_features else None
    dataset = partial(
        SourcedConversations,
        encode=partial(_encode, processor, stage),
        to_square=processor.image_processor.prepare,
        load=load_rgb,
        features=cached,
    )
    collate = ConversationCollator(
        processor.tokenizer.pad_token_id,
        processor.image_processor.normalize,
        model.config.image_token_id if stage.independent_turns else None,
        None if cached is None else torch.empty(0, model.vision_tower.num_tokens, model.vision_tower.hidden_size),
    )
    pad = processor.tokenizer.pad_token_id
    parts: dict[str, Any] = {"train": dataset(train), "validation": dataset(validation), "collate": collate}
    parts |= {"labels": train.labels, "sampler": None}
    if context.recipe.data.streaming:
        stream = context.data.stream(stage)
        parts["train"] = streamed(stream, dataset, batch_size=stage.batch_size, pad_token_id=pad)
        parts["labels"] = stream.labels
    elif stage.packing:
        seed = context.recipe.seed
        report = partial(context.console.print, markup=False)
        parts["train"] = pack(parts["train"], stage, seed=seed, report=report)
        parts["validation"] = pack(parts["validation"], stage, seed=seed)
        parts["collate"] = PackedCollator(collate)
    elif stage.group_by != "none":
        parts["sampler"] = grouped_sampler(parts["train"], stage, seed=context.recipe.seed)
    callbacks: list[TrainerCallback] = [ExpertGraphUpdate()]
    if model.routing is not None:
        # A folder of its own: TensorBoard follows one growing file per folder.
        board = context.folder / "tensorboard" / stage.name / "routing"
        callbacks.append(RoutingLog(context.folder / stage.name / "routing.jsonl", model.routing, tensorboard=board))
    trainer = _trainer(stage, context, model, **parts, rates=stage.train, callbacks=callbacks, pad_token_id=pad)
    with attention_by_document(model.language_model) if stage.packing else nullcontext():
        _fit(trainer, stage, context)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    _replace_folder(context.model_folder(stage.name), save)


def _cached_features(
    model: SymphonyVLMForConditionalGeneration,
    samples: Sequence[SampleList],
    context: RunContext,
    load: Callable[[ImageRef], Image.Image],
) -> CachedFeatures:
    if model.config.moe_config is not None and "vision" in model.config.moe_config.modules:
        raise InputError(
            "experts in the vision tower have losses and graphs of their own, which need it to run",
            where="stage.cache_features",
            remedy="Set cache_features: false.",
        )
    assert model.processor is not None
    folder = Path(context.recipe.data.feature_cache or context.folder / "features").expanduser()
    if torch.cuda.is_available():
        model.vision_tower.to(PartialState().device)
    image_processor = model.processor.image_processor
    return fill_feature_cache(model.vision_tower, image_processor, samples, folder, context.console, load=load)


def _starting_model(stage: StageConfig, context: RunContext) -> SymphonyVLMForConditionalGeneration:
    """The last multimodal stage's model, the recipe's ``model.start``, or the parts put together."""
    from symphony_vlm.model.loading import load

    earlier = context.earlier(stage, "multimodal") or context.recipe.model.start
    if earlier is not None:
        return load(earlier, device="cpu")
    return assemble(
        context.recipe.model,
        context.tokenizer,
        encoder=context.earlier(stage, "contrastive"),
        language=context.earlier(stage, "text"),
    )


def _trainer(
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


def _fit(trainer: StageTrainer, stage: StageConfig, context: RunContext) -> None:
    with PartialState().main_process_first():
        checkpoint = last_checkpoint(context.folder / stage.name)
    known = context.state.get(stage.name)
    context.state.set(stage.name, status="running", step=int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    if checkpoint and trainer.consumption is not None:
        trainer.consumption.restore(checkpoint)
        if isinstance(trainer.train_dataset, StreamedConversations):
            trainer.train_dataset.start = trainer.consumption.position
    start = time.monotonic()
    if checkpoint and _is_last(checkpoint):
        # Killed after the last step, before the model was saved. The Trainer would train one more step.
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = round(known.get("seconds", 0.0) + time.monotonic() - start, 1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    context.state.set(stage.name, step=trainer.state.global_step, loss=losses[-1], seconds=seconds)


def _is_last(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def _replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Saves next to the target and renames: a folder called ``model`` is always complete."""
    processes = PartialState()
    if processes.is_main_process:
        temporary = folder.with_name(".model.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    processes.wait_for_everyone()


def _total_steps(stage: StageConfig, num_samples: int, drop_last: bool) -> int:
    """Optimizer steps as the Trainer counts them: an incomplete accumulation at the end of an epoch is a step."""
    per_batch = stage.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
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


def _encode(processor: SymphonyVLMProcessor, stage: StageConfig, sample: Sample) -> Any:
    return processor.encode(
        sample.messages,
        template=stage.template,
        num_image_tokens=processor.count_tokens_of_files(sample.images),
        max_length=stage.max_length,
        origin=sample.origin,
    )


def _optional_blocks(blocks: Callable[[Any], TextBlocks], samples: Sequence[Sample]) -> TextBlocks | None:
    try:
        return blocks(samples)
    except InputError:
        logger.info("the held-out conversations are shorter than one block; no validation loss for this stage")
        return None


def _stack(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
