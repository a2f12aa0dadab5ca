"""Any image-text model of transformers answers the same questions about the same pixels as a model of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.task import EvaluationItem
from symphony_vlm.model.loading import resolve_model_folder

__all__ = ["StockPredictor", "load_stock_model"]

_PROBE = "QUESTION"
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "typical_p": None,
    "repetition_penalty": None,
    "max_length": None,
}
"""What a checkpoint's own generation settings must not change. Its end and suppressed tokens stay."""


class StockPredictor:
    """Greedy answers of a model of transformers, asked through its processor's chat template.

    The same interface as `predictor.Predictor`; here an image's features are its pixels, as models differ in what a
    picture becomes.

    Args:
        model: in evaluation mode.
        processor: of the same checkpoint, see `load_stock_model`.
        batch_size: questions per batch.
        max_new_tokens: longest answer.
    """

    def __init__(self, model: Any, processor: Any, *, batch_size: int, max_new_tokens: int) -> None:
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._lead = _text_after_images(model, processor)

    def encode_images(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The images themselves, uint8 ``[H, W, 3]``."""
        return list(images)

    def answer(self, items: Sequence[EvaluationItem], features: Sequence[Sequence[np.ndarray] | None]) -> list[str]:
        """One answer per item.

        Args:
            items: questions.
            features: for each item its images in order, or None.
        """
        answers = [""] * len(items)
        for chosen in self._batches(items, features):
            conversations = [self._conversation(items[i].question, features[i] or ()) for i in chosen]
            for i, text in zip(chosen, self._answer_batch(conversations), strict=True):
                answers[i] = text
        return answers

    def _batches(
        self, items: Sequence[EvaluationItem], features: Sequence[Sequence[np.ndarray] | None]
    ) -> Iterator[list[int]]:
        """Batches of questions of similar length. Processors take no batch in which some texts lack images."""
        by_images: dict[int, list[int]] = {}
        for i, images in enumerate(features):
            by_images.setdefault(len(images or ()), []).append(i)
        for group in by_images.values():
            group.sort(key=lambda i: len(items[i].question))
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]

    def _conversation(self, question: str, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "image", "image": Image.fromarray(pixels)} for pixels in images]
        content.append({"type": "text", "text": self._lead + question if images else question})
        return [{"role": "user", "content": content}]

    @torch.no_grad()
    def _answer_batch(self, conversations: list[list[dict[str, Any]]]) -> list[str]:
        inputs = self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            # Generation continues at the end of every row.
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self._model.device, dtype=self._model.dtype)
        ids = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, use_cache=True)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self._processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


def load_stock_model(name: str, *, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """A model of transformers in evaluation mode, set to greedy decoding, and its processor.

    No code of a checkpoint is run and no pickle is read. Images are resized by Pillow where the processor can, as the
    models were published with: its other backend is up to one grey level apart.

    Args:
        name: folder of a saved model, or a hub name.
        device: e.g. ``cuda``; default: the accelerator if there is one, else the CPU.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16``.

    Raises:
        InputError: there is no image-text model, it needs code of its own, or its processor cannot ask.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    folder = resolve_model_folder(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        processor = AutoProcessor.from_pretrained(folder, **options)
        if getattr(processor, "image_processor", None) is not None:
            processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_usable(folder, error) from error
    _check_weights(loading, folder)
    _check_processor(processor, folder)
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder, expected a model that continues its prompt", where=folder
        )
    _set_greedy(model, processor)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


def _not_usable(folder: str, error: Exception) -> InputError:
    text = str(error)
    if "trust_remote_code" in text:
        return InputError(
            "the model comes with Python code of its own, which is never run here",
            where=folder,
            remedy="Give a model whose class is part of transformers.",
        )
    if "Unrecognized configuration class" in text:
        return InputError(
            "is no image-text model of transformers",
            where=folder,
            remedy="Give one that AutoModelForImageTextToText opens.",
        )
    return InputError(
        text.strip().splitlines()[0][:300],
        where=folder,
        remedy="Give the folder of an image-text model with its processor, weights in safetensors files.",
    )


def _check_weights(loading: dict[str, Any], folder: str) -> None:
    """Transformers fills in what is missing at random, with a warning."""
    for kind in ("missing", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in loading.get(f"{kind}_keys") or ())
        if names:
            raise InputError(
                f"{len(names)} weights of the model are {kind} in the checkpoint ({', '.join(names[:3])})",
                where=folder,
                remedy="Give a complete checkpoint of this configuration.",
            )


def _check_processor(processor: Any, folder: str) -> None:
    missing = [part for part in ("image_processor", "tokenizer") if getattr(processor, part, None) is None]
    if missing:
        raise InputError(
            f"the processor has no {' and no '.join(missing)}",
            where=folder,
            remedy="Save the model's processor beside it: processor.save_pretrained(folder).",
        )
    if not processor.chat_template:
        raise InputError(
            "the processor has no chat template, which says how a question is put to the model",
            where=folder,
            remedy="Put the model's chat template into the folder as chat_template.jinja.",
        )


def _set_greedy(model: Any, processor: Any) -> None:
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    settings = model.generation_config
    for name, value in _GREEDY.items():
        setattr(settings, name, value)
    settings.pad_token_id = processor.tokenizer.pad_token_id
    # A chat model's answers end with its tokenizer's EOS, which older configurations do not list.
    known = settings.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or ())
    settings.eos_token_id = sorted({*ends, processor.tokenizer.eos_token_id} - {None})


def _text_after_images(model: Any, processor: Any) -> str:
    """What has to stand before a question after its images: a line feed for a Llava whose template writes none.

    Raises:
        InputError: the template leaves out the image or the question.
    """
    content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
    where = str(getattr(model, "name_or_path", "")) or "chat template"
    try:
        prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # jinja's own errors and those that a template raises for what it does not take
    except Exception as error:
        raise InputError(f"the chat template does not take an image and a question ({error})", where=where) from error
    mark = getattr(processor, "image_token", None)
    before, question, _ = prompt.partition(_PROBE)
    if not question or (isinstance(mark, str) and mark not in before):
        raise InputError(
            f"the chat template leaves out the {'question' if not question else 'image'}: {prompt[:120]!r}",
            where=where,
            remedy="Put a chat template for images into the folder as chat_template.jinja.",
        )
    is_llava = str(model.config.model_type).startswith("llava")
    return "\n" if is_llava and isinstance(mark, str) and before.endswith(mark) else ""
