"""Validation beside training: it leaves no trace in what trains, and shows answers to held-out questions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.data.sample import ImageRef, Message, Sample
from symphony_vlm.data.templates import stop_token_ids
from symphony_vlm.training.averaging import refuse_sharded
from symphony_vlm.training.callbacks import cut_log

__all__ = ["HeldOutQuestion", "SampleLog", "held_out_questions", "undisturbed"]

MAX_NEW_TOKENS = 64


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Random states and train modes are afterwards what they were: a data loader draws a number when it starts."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, kw_only=True)
class HeldOutQuestion:
    """The first question of a held-out record."""

    messages: tuple[Message, ...]
    """The system message, if there is one, and the question."""
    question: str
    reference: str
    """The record's answer."""
    images: tuple[ImageRef, ...]


def held_out_questions(samples: Sequence[Sample], count: int) -> list[HeldOutQuestion]:
    """The first questions of so many samples, spread evenly over all; the same at every call."""
    count = min(count, len(samples))
    return [_first_question(samples[len(samples) * number // count]) for number in range(count)]


def _first_question(sample: Sample) -> HeldOutQuestion:
    asked = next(i for i, message in enumerate(sample.messages) if message.role == "user")
    answer = next(message.text for message in sample.messages[asked:] if message.role == "assistant")
    return HeldOutQuestion(
        messages=sample.messages[: asked + 1],
        question=sample.messages[asked].text.strip(),
        reference=answer,
        images=sample.images,
    )


class SampleLog(TrainerCallback):
    """At each validation the model's greedy answers to the same questions, in a file of JSON lines and in TensorBoard.

    The first process answers. A continued stage cuts the lines of steps that it will repeat.

    Args:
        path: of the file.
        questions: what is asked.
        template: instead of the processor's own.
        load: opens an image.
        tensorboard: folder of the events.
    """

    def __init__(
        self,
        path: Path,
        questions: Sequence[HeldOutQuestion],
        *,
        template: str | None,
        load: Callable[[ImageRef], Image.Image],
        tensorboard: Path,
    ) -> None:
        self._path = path
        self._questions = questions
        self._template = template
        self._load = load
        self._tensorboard = tensorboard
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_sharded(kwargs["model"], "sample_generations")
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            cut_log(self._path, lambda entry: state.global_step > 0 and entry["step"] <= state.global_step)
            self._writer = SummaryWriter(str(self._tensorboard))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for number, asked in enumerate(self._questions):
            entry = {
                "step": state.global_step,
                "question": asked.question,
                "reference": asked.reference,
                "answer": self._answer(kwargs["model"], asked, bf16=args.bf16),
                "image": [image.name or str(image.path) for image in asked.images],
            }
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            text = "\n\n".join(f"**{name}**: {entry[name]}" for name in ("question", "reference", "answer", "image"))
            self._writer.add_text(f"samples/{number}", text, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    @torch.no_grad()
    def _answer(self, model: Any, asked: HeldOutQuestion, *, bf16: bool) -> str:
        processor = model.processor
        model.eval()
        opened = [self._load(image) for image in asked.images]
        counts = processor.count_image_tokens([(image.height, image.width) for image in opened])
        encoded = processor.encode(
            asked.messages, template=self._template, num_image_tokens=counts, generation_prompt=True
        )
        inputs = {"input_ids": torch.tensor([encoded.input_ids])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if encoded.image_order:
            inputs.update(processor.image_processor([opened[index] for index in encoded.image_order]))
        stops = stop_token_ids(processor.layout(self._template), processor.tokenizer)
        # Every new length would be compiled anew.
        autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
        with torch.compiler.set_stance("force_eager"), autocast:
            ids = model.generate(
                **{name: tensor.to(model.device) for name, tensor in inputs.items()},
                do_sample=False,
                use_cache=True,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=stops,
            )
        new = [token for token in ids[0, len(encoded.input_ids) :].tolist() if token not in stops]
        answer: str = processor.tokenizer.decode(new, skip_special_tokens=True)
        return answer.strip()
