"""Writes a model as a checkpoint of transformers' own classes, which runs without this package, and proves it equal.

The frozen expert graph is folded into the gates (`moe.folding`), so nothing of it remains to be computed. What cannot
be expressed exactly is refused, with the name of the setting that is in the way.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from symphony_vlm.cards.writing import write_model_card
from symphony_vlm.errors import InputError
from symphony_vlm.model.loading import load, load_language_model, local_folder, model_type_of
from symphony_vlm.model.pretrained import keep_cache_
from symphony_vlm.model.stock_llava import llava_config, llava_weights, save_llava_processor
from symphony_vlm.model.stock_text import stock_text_config, stock_text_weights
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.proof import logits_of_probe, prove_equal
from symphony_vlm.moe.recording import sparse_layers

__all__ = ["export", "export_checkpoint"]

FORMATS = ("transformers",)


@torch.no_grad()
def export(model: PreTrainedModel, output: str | Path, format: str = "transformers") -> float:
    """Folds the expert graphs and writes a checkpoint that transformers opens without this package.

    A causal LM becomes Mixtral (from Llama, Mistral), Qwen2-MoE or Qwen3-MoE, or its own class again after
    `symphonize_`; a vision-language model becomes Llava around one of these, with its processor. The checkpoint is
    opened again before it is left at `output`: every weight must be what was written, and the logits of fixed random
    inputs in fp32 must be those of the model.

    Args:
        model: with sparse layers; a vision-language model may be dense. It is left as it was.
        output: folder to create.
        format: ``transformers``.

    Returns:
        The largest absolute difference of fp32 logits.

    Raises:
        InputError: the model cannot be expressed, or `output` exists.
        RuntimeError: the checkpoint is not the model; nothing is left at `output`.
    """
    if format not in FORMATS:
        raise InputError(f"{format!r} is not one of {', '.join(FORMATS)}", where="format")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("the folder exists and is not empty", where=str(output), remedy="Give a new folder.")
    config, weights = _stock(model)
    stock = _build(config, weights)
    stock.generation_config = _generation_config(model)
    keep_cache_(stock)

    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        stock.save_pretrained(temporary)
        if isinstance(model, SymphonyVLMForConditionalGeneration):
            save_llava_processor(model, temporary)
        write_model_card(temporary)
        difference = _prove(model, type(stock), temporary, weights)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def _stock(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Configuration and weights of the stock model."""
    if isinstance(model, SymphonyVLMForConditionalGeneration):
        return llava_config(model), llava_weights(model)
    if not any(True for _ in sparse_layers(model)):
        raise InputError(
            f"{type(model).__name__} has no sparse layers with a router of this package, so there is nothing to fold",
            where="export",
            remedy="Save it with model.save_pretrained(folder): transformers opens that as it is.",
        )
    language_model: Any = getattr(model, "moe_modules", {"language": model})["language"]
    return stock_text_config(language_model), stock_text_weights(language_model)


def _build(config: PreTrainedConfig, weights: dict[str, Tensor]) -> Any:
    """The stock model around the weights, which are not copied."""
    with torch.device("meta"):
        llava = isinstance(config, LlavaConfig)
        stock: Any = LlavaForConditionalGeneration(config) if llava else AutoModelForCausalLM.from_config(config)
    needed = stock.state_dict()
    faults = {
        "missing": sorted(set(needed) - set(weights)),
        "unexpected": sorted(set(weights) - set(needed)),
        "of another shape": sorted(k for k in set(needed) & set(weights) if needed[k].shape != weights[k].shape),
    }
    problems = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in faults.items() if keys]
    if problems:
        raise InputError(
            f"the model's weights are not those of {type(stock).__name__}: {'; '.join(problems)}",
            where="export",
            remedy="Only models as their classes build them can be exported; merge adapters first.",
        )
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    return stock


def _generation_config(model: PreTrainedModel) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config)
    if isinstance(model, SymphonyVLMForConditionalGeneration):
        # Our class never answers with the placeholder either.
        config.suppress_tokens = sorted({model.config.image_token_id, *(config.suppress_tokens or ())})
    return config


def _prove(model: PreTrainedModel, stock_class: Any, folder: Path, weights: dict[str, Tensor]) -> float:
    """Opens the checkpoint and compares every weight, and the logits in fp32.

    The weights as well, because the tokens of a probe visit only some of the experts.
    """
    with _in_fp32(model):
        before = logits_of_probe(model)
    # The classes' own loop over experts: their default, a kernel, refuses widths that are no multiple of 16 bytes.
    opened = stock_class.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").to(model.device)
    found = opened.state_dict()
    for name, weight in weights.items():
        if not torch.equal(found[name], weight.float()):
            raise RuntimeError(
                f"{name} is not what was written when the checkpoint is opened again; "
                "this is a fault in the export, please report it with the model's configuration"
            )
    if isinstance(model, SymphonyVLMForConditionalGeneration):
        opened.probe_inputs = model.probe_inputs  # the same picture and text
    return prove_equal(before, logits_of_probe(opened), "exporting")


@contextmanager
def _in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """The model in fp32 for a while: 16 bits could not show a difference of 1e-5. Not a bit of it is lost."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    originals = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    _recompute_rotary_tables_(model)
    try:
        yield
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.data = original


def _recompute_rotary_tables_(model: PreTrainedModel) -> None:
    """``model.to(torch.bfloat16)`` rounds these tables; no checkpoint has them, and whoever opens one computes them."""
    for module in list(model.modules()):
        if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config"):
            fresh: Any = type(module)(module.config)
            for name, table in fresh.named_buffers():
                buffer = module.get_buffer(name)
                buffer.data = table.to(buffer.device)


TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template")


def export_checkpoint(name: str, output: Path, format: str = "transformers") -> float:
    """`export` of a saved model; a causal LM's tokenizer files are copied.

    Args:
        name: folder of a model or of a finished run, or a hub name.
        output: see `export`.
        format: see `export`.

    Raises:
        InputError: there is no model, or see `export`.
        RuntimeError: see `export`.
    """
    folder = local_folder(name)
    is_vlm = model_type_of(str(folder)) == "symphony_vlm"
    # Three copies of the model exist for a moment, which an accelerator's memory might not hold.
    model = load(folder, device="cpu") if is_vlm else load_language_model(folder, device="cpu")
    difference = export(model, output, format)
    if not is_vlm:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(TOKENIZER_FILES):
                shutil.copy2(path, output / path.name)
    write_model_card(output, source=folder)  # with what is known of the model's training
    return difference
