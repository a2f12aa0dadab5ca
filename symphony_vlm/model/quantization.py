"""Holds the weights of a language model in 8 or 4 bits: in use, or frozen while adapters train.

LLM.int8: arXiv 2208.07339; NF4 and QLoRA: arXiv 2305.14314. Both are bitsandbytes', on CUDA devices and CPUs.
"""

from __future__ import annotations

from typing import Any

import torch

from symphony_vlm.errors import InputError
from symphony_vlm.model.adapters import linear_layers
from symphony_vlm.moe.experts import Experts

__all__ = ["QUANTIZATIONS", "check_quantization", "quantize_", "quantize_experts_"]

QUANTIZATIONS = ("none", "8bit", "4bit")
_DEVICES = ("cuda", "cpu")
# bitsandbytes' product with 4-bit weights on a CPU reads blocks of 64 inputs and 32 outputs; real models have them.
_BLOCK = (64, 32)


def check_quantization(bits: str, device: torch.device) -> None:
    """Raises an `InputError` if a model cannot be opened so on a device; asked before its weights are read."""
    if bits not in QUANTIZATIONS:
        raise InputError(f"{bits!r} is not one of {', '.join(QUANTIZATIONS)}", where="quantization")
    if bits == "none":
        return
    if device.type not in _DEVICES:
        raise InputError(f"{bits} needs a device of {' or '.join(_DEVICES)}, not {device.type!r}", where="quantization")
    _bitsandbytes(bits, "quantization", "leave it out (bfloat16 halves the memory everywhere)")


def _bitsandbytes(bits: str, where: str, otherwise: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"{bits} needs bitsandbytes ({error})",
            where=where,
            remedy=f"pip install 'symphony-vlm[qlora]', or {otherwise}.",
        ) from error
    return bitsandbytes


def quantize_(model: Any, bits: str, compute_dtype: torch.dtype) -> None:
    """Replaces the language model's linear layers by bitsandbytes', in place.

    Their weights are quantised when the model is next moved to a device, be it the CPU where it is. The head,
    embeddings, routers, the stacked weights of experts (`quantize_experts_`) and everything outside of the language
    model keep their precision, and of 4 bits so do layers whose inputs are no multiple of 64 or outputs of 32.

    Args:
        model: with a `language_model`, on the CPU.
        bits: ``8bit`` (LLM.int8) or ``4bit`` (NF4).
        compute_dtype: of the products with 4-bit weights.

    Raises:
        InputError: bitsandbytes is missing, or no layer can be quantised.
    """
    layers = _bitsandbytes(bits, "lora.quantization", "set quantization: none").nn
    chosen = {name: linear for name, linear in linear_layers(model).items() if bits == "8bit" or _has_blocks(linear)}
    if not chosen:
        raise InputError(
            f"no linear layer of the language model has {_BLOCK[0]} n inputs and {_BLOCK[1]} n outputs",
            where="quantization: 4bit",
            remedy="Use 8bit or none.",
        )
    for name, linear in chosen.items():
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


def _has_blocks(linear: torch.nn.Linear) -> bool:
    return linear.in_features % _BLOCK[0] == 0 and linear.out_features % _BLOCK[1] == 0


def quantize_experts_(model: Any, device: torch.device) -> None:
    """Moves the stacked weights of the language model's experts to a device and holds them there in 4 bits (NF4).

    One layer at a time is whole on the device. A layer's weights are whole again while it computes. For a model in
    use: nothing can be trained through them, nor saved. LLM.int8 has no form for stacked weights.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module in model.language_model.modules():
        if isinstance(module, Experts):
            module.to(device)
            for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                replace_parameter_4bit(module, name, quant_type="nf4")
