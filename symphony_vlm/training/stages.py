"""One function per kind of stage. Each builds a model and a data set, trains, and saves what the next stage opens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from transformers import TrainerCallback, set_seed

from symphony_vlm.config.recipe import StageConfig
from symphony_vlm.data.collator import ConversationCollator
from symphony_vlm.data.images import load_image
from symphony_vlm.data.mixture import SampleList
from symphony_vlm.data.packing import PackedCollator
from symphony_vlm.data.sample import ImageRef, Sample
from symphony_vlm.errors import InputError
from symphony_vlm.model.attention import attention_by_document
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.processor import SymphonyVLMProcessor
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.training.adapting import adapt_, own_base
from symphony_vlm.training.batches import grouped_sampler, pack
from symphony_vlm.training.callbacks import ExpertGraphUpdate, RoutingLog
from symphony_vlm.training.consumption import SourcedConversations
from symphony_vlm.training.contrastive import CaptionCollator, ContrastiveModel, caption_dataset, save_open_clip
from symphony_vlm.training.engine import with_accumulation
from symphony_vlm.training.features import CachedFeatures, fill_feature_cache
from symphony_vlm.training.fitting import RunContext, fit, make_trainer, replace_folder
from symphony_vlm.training.language import run_language
from symphony_vlm.training.parts import (
    assemble,
    keep_precision_,
    new_augmentation,
    new_image_processor,
    new_language_model,
)
from symphony_vlm.training.streamed import streamed
from symphony_vlm.training.text import TextBlocks
from symphony_vlm.training.trainer import AugmentationEpochs, StageTrainer, freeze_except
from symphony_vlm.training.validation import SampleLog, held_out_questions

__all__ = ["prepare_multimodal", "run_stage"]

logger = logging.getLogger(__name__)


def run_stage(stage: StageConfig, context: RunContext) -> None:
    """Trains one stage, continuing from its last checkpoint, and saves its model."""
    set_seed(context.recipe.seed)
    kinds: dict[str, Callable[[StageConfig, RunContext], None]] = {
        "contrastive": _run_contrastive,
        "text": _run_text,
        "multimodal": _run_multimodal,
        "language": run_language,
    }
    kinds[stage.kind](with_accumulation(stage, PartialState().num_processes), context)


def _run_contrastive(stage: StageConfig, context: RunContext) -> None:
    everything, held_out = context.data.get(stage)
    train, validation = everything.with_images(), held_out.with_images()
    if len(train) < len(everything):
        context.console.print(f"{stage.name}: {len(everything) - len(train)} records without an image left out")
    architecture = context.recipe.model.tower.architecture
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
    augmentation = new_augmentation(context.recipe)
    collate = CaptionCollator(model.context_length, model.end_token_id, processor.normalize)
    trainer = make_trainer(
        stage,
        context,
        model,
        dataset(train, augment=augmentation),
        dataset(validation),
        collate,
        rates={"": stage.learning_rate},
        labels=train.labels,
        callbacks=[] if augmentation is None else [AugmentationEpochs(augmentation)],
        # An incomplete last batch has fewer negatives, and so another loss.
        drop_last=True,
    )
    fit(trainer, stage, context)
    save = partial(save_open_clip, model, image_mean=processor.image_mean, image_std=processor.image_std)
    replace_folder(context.model_folder(stage.name), save)


def _run_text(stage: StageConfig, context: RunContext) -> None:
    train, validation = context.data.get(stage)
    template = stage.template or context.recipe.model.template
    blocks = partial(TextBlocks, tokenizer=context.tokenizer, template=template, block_size=stage.max_length)
    model = new_language_model(context.recipe.model, context.tokenizer, None)
    keep_precision_(model, bf16=stage.bf16)
    held_out = _optional_blocks(blocks, validation)
    rates = {"": stage.learning_rate}
    trainer = make_trainer(stage, context, model, blocks(train), held_out, _stack, rates=rates)
    fit(trainer, stage, context)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        context.tokenizer.save_pretrained(folder)

    replace_folder(context.model_folder(stage.name), save)


def _run_multimodal(stage: StageConfig, context: RunContext) -> None:
    trainer, model = prepare_multimodal(stage, context)
    with attention_by_document(model.language_model) if stage.packing else nullcontext():
        fit(trainer, stage, context)
    processor = model.processor
    assert processor is not None

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    replace_folder(context.model_folder(stage.name), save)


def prepare_multimodal(
    stage: StageConfig, context: RunContext
) -> tuple[StageTrainer, SymphonyVLMForConditionalGeneration]:
    """A multimodal stage up to its first step: its trainer, and the model in it."""
    train, validation = context.data.get(stage)
    model, saved = _starting_model(stage, context)
    processor = model.processor
    assert processor is not None
    freeze_except(model, stage.train)
    if stage.lora is not None:
        adapt_(model, stage.lora, stage, context, saved)
    keep_precision_(model, bf16=stage.bf16)
    load_rgb = partial(load_image, max_pixels=context.recipe.data.max_pixels)
    image_processor = _image_processor(processor, stage)
    samples = [train, validation]
    cached = _cached_features(model, image_processor, samples, context, load_rgb) if stage.cache_features else None
    dataset = partial(
        SourcedConversations,
        encode=partial(_encode, processor, stage),
        to_square=image_processor.prepare,
        load=load_rgb,
        features=cached,
    )
    collate = ConversationCollator(
        processor.tokenizer.pad_token_id,
        image_processor.normalize,
        model.config.image_token_id if stage.independent_turns else None,
        None if cached is None else torch.empty(0, model.vision_tower.num_tokens, model.vision_tower.hidden_size),
    )
    pad = processor.tokenizer.pad_token_id
    augmentation = new_augmentation(context.recipe)
    training = partial(dataset, augment=augmentation)
    parts: dict[str, Any] = {"train": training(train), "validation": dataset(validation), "collate": collate}
    parts |= {"labels": train.labels, "sampler": None}
    if context.recipe.data.streaming:
        stream = context.data.stream(stage)
        parts["train"] = streamed(
            stream, training, batch_size=stage.batch_size, pad_token_id=pad, augmentation=augmentation
        )
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
    if augmentation is not None and not context.recipe.data.streaming:
        callbacks.append(AugmentationEpochs(augmentation))
    if model.routing is not None:
        # A folder of its own: TensorBoard follows one growing file per folder.
        reports = context.recipe.monitor.report_to
        board = context.folder / "tensorboard" / stage.name / "routing" if "tensorboard" in reports else None
        callbacks.append(RoutingLog(context.folder / stage.name / "routing.jsonl", model.routing, tensorboard=board))
    if questions := held_out_questions(validation, stage.sample_generations):
        board = context.folder / "tensorboard" / stage.name / "samples"
        path = context.folder / stage.name / "samples.jsonl"
        callbacks.append(SampleLog(path, questions, template=stage.template, load=load_rgb, tensorboard=board))
    trainer = make_trainer(stage, context, model, **parts, rates=stage.train, callbacks=callbacks, pad_token_id=pad)
    return trainer, model


def _image_processor(processor: SymphonyVLMProcessor, stage: StageConfig) -> SymphonyImageProcessor:
    """The model's own, or a copy with the stage's way of making squares; what is saved is always the model's."""
    own: SymphonyImageProcessor = processor.image_processor
    if stage.resize_mode is None or stage.resize_mode == own.resize_mode:
        return own
    changed = copy.copy(own)
    changed.resize_mode = stage.resize_mode
    return changed


def _cached_features(
    model: SymphonyVLMForConditionalGeneration,
    image_processor: SymphonyImageProcessor,
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
    folder = Path(context.recipe.data.feature_cache or context.folder / "features").expanduser()
    if torch.cuda.is_available():
        model.vision_tower.to(PartialState().device)
    return fill_feature_cache(model.vision_tower, image_processor, samples, folder, context.console, load=load)


def _starting_model(
    stage: StageConfig, context: RunContext
) -> tuple[SymphonyVLMForConditionalGeneration, str | Path | None]:
    """The last multimodal stage's model, the recipe's ``model.start``, or the parts put together; perhaps upcycled.

    Also the folder or hub name where exactly this model is saved, if it is.
    """
    from symphony_vlm.model.loading import load, resolve_model_folder

    if stage.lora is not None and (base := own_base(stage, context)).is_dir():
        return load(base, device="cpu"), base
    earlier = context.earlier(stage, "multimodal") or context.recipe.model.start
    if earlier is not None:
        model = load(earlier, device="cpu")
    else:
        model = assemble(
            context.recipe.model,
            context.tokenizer,
            encoder=context.earlier(stage, "contrastive"),
            language=context.earlier(stage, "text"),
        )
    if stage.upcycle:
        assert context.recipe.model.moe is not None
        model.upcycle_(MoEConfig.from_dict(context.recipe.model.moe), seed=context.recipe.seed)
        return model, None
    return model, None if earlier is None else resolve_model_folder(earlier)


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
