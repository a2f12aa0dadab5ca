"""The proof that a conversion changed the structure of a model and not its function: logits before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["MAX_LOGIT_DIFFERENCE", "largest_difference", "logits_of_probe", "prove_equal"]

MAX_LOGIT_DIFFERENCE = 1e-5
"""Largest difference of logits that a conversion may cause in fp32, relative to the largest logit where that exceeds 1.
Identical experts whose weights sum to 1 give the dense output exactly but for the rounding of w1 * y + w2 * y against
y, about 1e-7 relative per layer."""


@torch.no_grad()
def logits_of_probe(model: PreTrainedModel) -> Tensor:
    """Logits of fixed random inputs, in evaluation mode; a model with other inputs than ids has ``probe_inputs()``."""
    inputs = model.probe_inputs() if hasattr(model, "probe_inputs") else _probe_ids(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    logits: Tensor = model(**inputs, use_cache=False).logits
    for module, training in modes.items():
        module.training = training
    return logits


def _probe_ids(model: PreTrainedModel) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    return {"input_ids": torch.randint(0, vocab_size, (2, 16), generator=generator, device="cpu").to(model.device)}


def largest_difference(before: Tensor, after: Tensor) -> float:
    """The largest absolute difference of two logits."""
    return float((after - before).abs().max())


def prove_equal(before: Tensor, after: Tensor, conversion: str) -> float:
    """The largest absolute difference of two logits.

    Args:
        before: fp32 logits of the original.
        after: of the converted model.
        conversion: names it in the error.

    Raises:
        RuntimeError: it is above `MAX_LOGIT_DIFFERENCE`.
    """
    difference = largest_difference(before, after)
    allowed = MAX_LOGIT_DIFFERENCE * max(1.0, float(before.abs().max()))
    if not difference <= allowed:
        raise RuntimeError(
            f"{conversion} changed the logits by {difference:.2e}, more than {allowed:.0e}; "
            "this is a fault in the conversion, please report it with the model's configuration"
        )
    return difference
