"""Training steps with eager and with compiled layers (setting ``compile`` of a stage).

Forward, backward and AdamW of a causal LM at a learning rate of 0, dense and with four experts, on one batch: the best
that compiling can do, as batches of other lengths are compiled anew. What compiling itself takes is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import Case
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.upcycle import upcycle_
from symphony_vlm.training.compilation import compile_layers_

__all__ = ["cases"]


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """A dense and a sparse model.

    Args:
        tiny: sizes for a test of the benchmark, and no compiler, which takes a minute.
        device: where the model is.
    """
    size, layers, tokens = (32, 1, (2, 16)) if tiny else (256, 6, (8, 128))
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size // 4,
        vocab_size=1024,
    )
    for num_experts in (0,) if tiny else (0, 4):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        if num_experts:
            upcycle_(model, MoEConfig(num_experts=num_experts))
        ids_BS = torch.randint(0, 1024, tokens, device=device)
        eager, compiled = model.to(device).train(), copy.deepcopy(model).train()
        compile_layers_(compiled, device, backend="eager" if tiny else "inductor")
        yield Case(
            settings={"hidden size": size, "layers": layers, "experts": num_experts, "tokens": ids_BS.numel()},
            contenders={"eager": _steps(eager, ids_BS), "compiled": _steps(compiled, ids_BS)},
            items=("tokens", ids_BS.numel()),
            tolerance=1e-5,  # fused kernels round otherwise
        )


def _steps(model: Any, ids_BS: Tensor) -> Callable[[], Sequence[Tensor]]:
    """An optimizer step; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def run() -> Sequence[Tensor]:
        loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    return run
