"""A head whose vocabulary is no multiple of eight: as it is, and with rows of zeros added (`model/aligned_head.py`).

Forward and backward, of supervised tokens alone. The first vocabulary is WikiText-103's words, the others are LLaVA's
32,000 ids and one for the picture. On CUDA in bfloat16; on a CPU, where nothing is added in training, in fp32, to see
that it does not matter there.

Shape letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import Case, Plan
from symphony_vlm.model.aligned_head import aligned_logits

__all__ = ["PLAN", "cases"]

PLAN = Plan(rounds=1, alternations=7, seconds=0.01)

ON_CUDA = [(2005, 352, 267735), (8192, 2048, 32001), (8192, 4096, 32001)]
ON_A_CPU = [(512, 192, 4097)]


def cases(*, tiny: bool, device: torch.device) -> Iterator[Case]:
    """Sizes of one head, with logits and gradients of each contender."""
    sizes = [(8, 16, 33)] if tiny else ON_CUDA if device.type == "cuda" else ON_A_CPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for tokens, hidden_size, vocab_size in sizes:
        torch.manual_seed(0)
        head = nn.Linear(hidden_size, vocab_size, bias=False, device=device, dtype=dtype)
        hidden_ND = torch.randn(tokens, hidden_size, device=device, dtype=dtype, requires_grad=True)
        grad_NV = torch.randn(tokens, vocab_size, device=device, dtype=dtype)
        ways: dict[str, Callable[[Tensor], Tensor]] = {"as it is": head, "aligned": partial(aligned_logits, head)}
        yield Case(
            settings={"tokens": tokens, "hidden": hidden_size, "vocabulary": vocab_size},
            contenders={name: partial(_run, way, head, hidden_ND, grad_NV) for name, way in ways.items()},
            items=("tokens", tokens),
            # Sums of up to 8192 products in the order of another kernel, and in bfloat16 rounded to 8 bits.
            tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        )


def _run(
    logits_of: Callable[[Tensor], Tensor], head: nn.Linear, hidden_ND: Tensor, grad_NV: Tensor
) -> Sequence[Tensor]:
    logits_NV = logits_of(hidden_ND)
    return logits_NV, *torch.autograd.grad(logits_NV, [hidden_ND, head.weight], grad_NV)
