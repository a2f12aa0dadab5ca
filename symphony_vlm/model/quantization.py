"""Holds the linear layers of a language model in 8 or 4 bits: in use, or frozen while adapters train.

LLM.int8: arXiv 2208.07339; NF4 and QLoRA: arXiv 2305.14314.
"""

from __future__ import annotations

from typing import Any

import torch

from symphony_vlm.errors import InputError
from symphony_vlm.model.adapters import linear_layers

__all__ = ["QUANTIZATIONS", "check_quantization", "quantize_"]

QUANTIZATIONS = ("none", "8bit", "4bit")


def check_quantization(bits: str, device: torch.device) -> None:
    """Raises an `InputError` if a model cannot be opened so on a device; asked before its weights are read."""
    if bits not in QUANTIZATIONS:
        raise InputError(f"{bits!r} is not one of {', '.join(QUANTIZATIONS)}", where="quantization")
    if bits == "none":
        return
    _bitsandbytes(bits, "quantization", "leave it out (bfloat16 halves the memory everywhere)")
    if device.type != "cuda":
        raise InputError(f"{bits} needs a CUDA device, not {device.type!r}", where="quantization")


def _bitsandbytes(bits: str, where: str, otherwise: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"{bits} needs bitsandbytes ({error})",
            where=where,
            remedy=f"pip install 'symphony-vlm[qlora]', or {otherwise}.",
        ) from error
    if not torch.cuda.is_available():
        raise InputError(
            f"{bits} needs a CUDA device, and there is none here",
            where=where,
            remedy=f"{otherwise[:1].upper()}{otherwise[1:]}; extra symphony-vlm[qlora] helps on CUDA only.",
        )
    return bitsandbytes


def quantize_(model: Any, bits: str, compute_dtype: torch.dtype) -> None:
    """Replaces the language model's linear layers by bitsandbytes', in place.

    Their weights are quantised when the model moves to the GPU. The head, embeddings, routers, the stacked weights of
    experts and everything outside of the language model keep their precision.

    Args:
        model: with a `language_model`, on the CPU.
        bits: ``8bit`` (LLM.int8) or ``4bit`` (NF4).
        compute_dtype: of the products with 4-bit weights.

    Raises:
        InputError: bitsandbytes or a CUDA device is missing.
    """
    bitsandbytes = _bitsandbytes(bits, "lora.quantization", "set quantization: none")
    layers = bitsandbytes.nn
    for name, linear in linear_layers(model).items():
        sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
        sizes["bias"] = linear.bias is not None
        frozen = {"requires_grad": False}
        if bits == "4bit":
            new = layers.Linear4bit(**sizes, compute_dtype=compute_dtype, quant_type="nf4")
            new.weight = layers.Params4bit(linear.weight.data, quant_type="nf4", **frozen)
        else:
            new = layers.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=6.0)
            new.weight = layers.Int8Params(linear.weight.data, has_fp16_weights=False, **frozen)
        new.bias = linear.bias
        model.language_model.set_submodule(name, new)
    # How PEFT learns which of its layers to use.
    model.language_model.is_loaded_in_4bit = bits == "4bit"
    model.language_model.is_loaded_in_8bit = bits == "8bit"
