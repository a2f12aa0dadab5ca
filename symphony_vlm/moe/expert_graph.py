"""The social graph of the experts: who is selected together, smoothed over optimizer steps (arXiv 2510.16411).

Shape letters: T tokens, E experts, L layers.

Routing multiplies the gate values by the adjacency matrix, g_sym = A g. The matrix is a moving average of the
normalised co-selection counts. Counting happens in the forward pass but only into a scratch tensor; the matrix itself
changes once per optimizer step, in `update_expert_graphs`. Changing it inside the forward pass would break autograd's
version counter, count twice under activation checkpointing, and drift apart between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symphony_vlm.moe.configuration import MoEConfig

__all__ = ["ExpertGraph", "expert_graphs", "normalize_counts", "update_expert_graphs"]

_SINKHORN_ITERATIONS = 50


class ExpertGraph(nn.Module):
    """Adjacency matrix of one layer's experts.

    The matrix stays fp32 when the model is cast to another precision: its steps are (1 - momentum) small, which
    bfloat16 (8 bits of mantissa) would round away.
    """

    adjacency_EE: Tensor
    num_updates: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("adjacency_EE", torch.eye(config.num_experts, dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        # Scratch, deliberately not buffers: DDP broadcasts rank 0's buffers at every forward, which would overwrite
        # the other ranks' counts between two micro-batches.
        self._counts_EE: Tensor | None = None
        self._num_tokens: Tensor | None = None

    @property
    def is_active(self) -> bool:
        """Whether the graph takes part in routing in the current mode (setting ``active``)."""
        return self.config.active == "always" or (self.config.active == "train") == self.training

    def forward(self, values_TE: Tensor) -> Tensor:
        """Smooths gate values or logits over the graph: ``[T, E] -> [T, E]``, out_j = sum_k a_jk in_k."""
        return values_TE @ self.adjacency_EE.T

    @torch.no_grad()
    def count(self, membership_TE: Tensor) -> None:
        """Adds co-selections to the scratch counts.

        Args:
            membership_TE: fp32 ``[T, E]``; row t holds how much token t belongs to each expert (one-hot of the
                selected set, or its weights). Rows of padding tokens are zero.
        """
        counts_EE = membership_TE.T @ membership_TE
        num_tokens = (membership_TE.sum(-1) > 0).sum()
        if self._counts_EE is None or self._num_tokens is None:
            self._counts_EE, self._num_tokens = counts_EE, num_tokens
        else:
            self._counts_EE += counts_EE
            self._num_tokens += num_tokens

    def take_counts(self) -> Tensor:
        """The counts since the last call, flattened with the token count at the end: ``[E * E + 1]``, fp32."""
        device = self.adjacency_EE.device
        counts_EE, num_tokens = self._counts_EE, self._num_tokens
        self._counts_EE = self._num_tokens = None
        if counts_EE is None or num_tokens is None:
            return torch.zeros(self.config.num_experts**2 + 1, device=device)
        return torch.cat([counts_EE.flatten(), num_tokens.float().reshape(1)]).to(device)

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """One step of the moving average from counts in the layout of `take_counts`, summed over ranks."""
        num_experts = self.config.num_experts
        counts_EE, num_tokens = counts[:-1].view(num_experts, num_experts), counts[-1]
        target_EE = normalize_counts(counts_EE, num_tokens, self.config)
        # No token at all (every rank empty, or a frozen layer): the step leaves the graph as it is. `where` instead
        # of `if` keeps the decision on the device.
        momentum = torch.where(num_tokens > 0, self.config.momentum, 1.0)
        self.adjacency_EE.copy_(momentum * self.adjacency_EE + (1 - momentum) * target_EE)
        self.num_updates += (num_tokens > 0).long()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the identity, the plain router. Keeps what a checkpoint has already filled in."""
        # Loading builds modules on the meta device and flags what the checkpoint provides; the rest is raw memory.
        if not getattr(self.adjacency_EE, "_is_hf_initialized", False):
            self.adjacency_EE.copy_(torch.eye(self.config.num_experts))
        if not getattr(self.num_updates, "_is_hf_initialized", False):
            self.num_updates.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.adjacency_EE
        super()._apply(fn, recurse)
        if self.adjacency_EE.dtype != torch.float32:
            self.adjacency_EE = before.to(device=self.adjacency_EE.device, dtype=torch.float32)
        return self


def normalize_counts(counts_EE: Tensor, num_tokens: Tensor, config: MoEConfig) -> Tensor:
    """The target matrix A_hat = (1 - strength) I + strength * norm(C); an expert never co-selected keeps a row of I.

    Args:
        counts_EE: co-selection counts C = S^T S, ``[E, E]``, symmetric.
        num_tokens: scalar, the tokens counted (used by ``normalization: frequency``).
        config: `normalization`, `diagonal`, `strength`.

    Returns:
        ``[E, E]`` fp32.
    """
    identity_EE = torch.eye(len(counts_EE), device=counts_EE.device)
    counts_EE = counts_EE.float()
    if config.diagonal == "drop":
        counts_EE = counts_EE * (1 - identity_EE)
    degree_E = counts_EE.sum(-1)
    alone_E = degree_E == 0
    degree_E = degree_E.masked_fill(alone_E, 1.0)
    if config.normalization == "row":
        norm_EE = counts_EE / degree_E[:, None]
    elif config.normalization == "symmetric":
        norm_EE = counts_EE * degree_E.rsqrt()[:, None] * degree_E.rsqrt()[None, :]
    elif config.normalization == "frequency":
        norm_EE = counts_EE / num_tokens.clamp(min=1)
    else:
        norm_EE = _sinkhorn(counts_EE, alone_E)
    norm_EE = torch.where(alone_E[:, None], identity_EE, norm_EE)
    return (1 - config.strength) * identity_EE + config.strength * norm_EE


def _sinkhorn(counts_EE: Tensor, alone_E: Tensor) -> Tensor:
    """Scales rows and columns in turn until both sum to 1 (to the accuracy of a fixed number of rounds)."""
    matrix_EE = counts_EE + torch.diag(alone_E.float())
    for _ in range(_SINKHORN_ITERATIONS):
        matrix_EE = matrix_EE / matrix_EE.sum(0, keepdim=True)
        matrix_EE = matrix_EE / matrix_EE.sum(1, keepdim=True)
    return matrix_EE


def expert_graphs(model: nn.Module) -> Iterator[tuple[str, ExpertGraph]]:
    """The expert graphs of a model with their module names, in order."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertGraph):
            yield name, module


@torch.no_grad()
def update_expert_graphs(model: nn.Module) -> None:
    """Moves every expert graph one step; call it once after each optimizer step, on every rank.

    The Trainer's callback does this; in another training loop write ``optimizer.step(); update_expert_graphs(model)``.
    One all-reduce of one tensor sums the counts over data-parallel ranks, so that all ranks keep bit-equal graphs.
    """
    graphs = [graph for _, graph in expert_graphs(model)]
    if not graphs:
        return
    counts = [graph.take_counts() for graph in graphs]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        stacked = torch.cat(counts)
        dist.all_reduce(stacked)
        counts = list(stacked.split([len(c) for c in counts]))
    for graph, count in zip(graphs, counts, strict=True):
        graph.update(count)
