"""The social graph of the experts: who is selected together, smoothed over optimizer steps (arXiv 2510.16411).

Shape letters: T tokens, E experts, L layers.

Routing multiplies the gate values by the adjacency matrix, g_sym = A g. Symphony's matrix is a moving average of the
normalised co-selection counts; a learnable and a fixed one are there to compare it with. Counting happens in the
forward pass but only into a scratch tensor; the matrix itself changes once per optimizer step, in
`update_expert_graphs`. Changing it inside the forward pass would break autograd's version counter, count twice under
activation checkpointing, and drift apart between ranks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.precision import KeepsPrecision

__all__ = [
    "ControlGraph",
    "ExpertGraph",
    "LearnableGraph",
    "StoredGraph",
    "SymphonyGraph",
    "expert_graphs",
    "make_expert_graph",
    "normalize_counts",
    "set_expert_graph_",
    "update_expert_graphs",
]

_SINKHORN_ITERATIONS = 50


class ExpertGraph(KeepsPrecision):
    """A graph of one layer's experts: what its kinds have in common.

    The matrix stays fp32 when the model is cast to another precision: its steps are (1 - momentum) small, which
    bfloat16 (8 bits of mantissa) would round away.
    """

    adjacency_EE: Tensor
    """fp32; entry (j, k) is how much expert j listens to expert k."""
    num_updates: Tensor
    """Steps of the moving average taken; 0 for a graph that is not counted."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    @property
    def is_active(self) -> bool:
        """Whether the graph takes part in routing in the current mode (setting ``active``)."""
        return self.config.active == "always" or (self.config.active == "train") == self.training

    def forward(self, values_TE: Tensor) -> Tensor:
        """Smooths gate values or logits over the graph: ``[T, E] -> [T, E]``, out_j = sum_k a_jk in_k."""
        return values_TE @ self.adjacency_EE.T

    def whole_adjacency(self) -> Tensor:
        """`adjacency_EE` to be read, without gradient. Where an engine has sharded it, every rank must call this."""
        return self.adjacency_EE.detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start. Keeps what a checkpoint has already filled in."""
        # Loading builds modules on the meta device and flags what the checkpoint provides; the rest is raw memory.
        if not getattr(self.num_updates, "_is_hf_initialized", False):
            self.num_updates.zero_()


class StoredGraph(ExpertGraph):
    """A matrix that is stored, not trained: the identity, the plain router, until something sets or moves it.

    By itself it is the ``fixed`` graph, which `set_expert_graph_` sets and nothing moves.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.register_buffer("adjacency_EE", torch.eye(config.num_experts, dtype=torch.float32))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the identity. Keeps what a checkpoint has already filled in."""
        super().reset()
        if not getattr(self.adjacency_EE, "_is_hf_initialized", False):
            self.adjacency_EE.copy_(torch.eye(self.config.num_experts))


class LearnableGraph(ExpertGraph):
    """The row-softmax of a trained matrix: no counting, the graph that the loss itself would choose."""

    STRAY = 0.1
    """What a fresh row gives to the other experts, all together: little enough that routing starts as the plain
    router's but for close races, and enough to learn from. The gradient of a softmax is in proportion to its entries:
    at 1e-6 an edge would take as good as for ever to grow."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        size = (config.num_experts, config.num_experts)
        self.logits_EE = nn.Parameter(torch.empty(size, dtype=torch.float32))

    @property
    def adjacency_EE(self) -> Tensor:  # type: ignore[override]
        """The matrix, row-stochastic, with its gradient."""
        # Mixed precision of FSDP2 and DeepSpeed lets the forward pass see parameters in 16 bits.
        return self.logits_EE.float().softmax(-1)

    @torch.no_grad()
    def whole_adjacency(self) -> Tensor:
        """See the base class. FSDP2 and ZeRO-3 leave each rank a part of the parameter between passes."""
        return _whole(self.logits_EE).float().softmax(-1)

    @torch.no_grad()
    def reset(self) -> None:
        """Near the identity. Keeps what a checkpoint has already filled in."""
        super().reset()
        if not getattr(self.logits_EE, "_is_hf_initialized", False):
            others = max(1, self.config.num_experts - 1)
            self.logits_EE.copy_(math.log(others * (1 - self.STRAY) / self.STRAY) * torch.eye(self.config.num_experts))


class SymphonyGraph(StoredGraph):
    """The moving average of the normalised co-selection counts."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        # Scratch, deliberately not buffers: DDP broadcasts rank 0's buffers at every forward, which would overwrite
        # the other ranks' counts between two micro-batches.
        self._counts_EE: Tensor | None = None
        self._num_tokens: Tensor | None = None

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
    def update(self, counts: Tensor, momentum: float | None = None) -> None:
        """One step of the moving average from counts in the layout of `take_counts`, summed over ranks.

        Args:
            counts: see above.
            momentum: instead of the setting's; 0 sets the graph to these counts alone.
        """
        _update([self], counts[None], momentum)

    def seen(self, counts_LEE: Tensor) -> Tensor:
        """What the matrix is made of, ``[L, E, E]``: the counts of L layers as they are."""
        return counts_LEE


class ControlGraph(SymphonyGraph):
    """Symphony's graph, its counts replaced: a negative control that differs from Symphony in nothing else.

    Strength, momentum, normalisation and the start at the identity are Symphony's, and so are the counts' totals; what
    the graph says of the experts is not. ``uniform``: every pair counts the same. ``random``: pairs have the weights of
    one symmetric matrix, log-normal of deviation 1 (about as unequal as trained graphs), the same at every step.
    ``shuffled``: every expert gets the counts of the expert before it, so that the graph has the right weights between
    the wrong experts. New experts have no order, so one matrix and one rotation are as good as any; of two experts a
    rotation changes nothing.
    """

    def seen(self, counts_LEE: Tensor) -> Tensor:
        """The counts replaced."""
        if self.config.expert_graph == "shuffled":
            return counts_LEE.roll((1, 1), (-2, -1))
        own_LE = counts_LEE.diagonal(dim1=-2, dim2=-1)
        weights_EE = torch.ones_like(counts_LEE[0])
        if self.config.expert_graph == "random":
            weights_EE = _random_weights(len(weights_EE)).to(counts_LEE)
        off_EE = weights_EE - torch.diag(weights_EE.diagonal())
        share_EE = off_EE / off_EE.sum().clamp(min=1e-30)
        others_L = counts_LEE.sum((-2, -1)) - own_LE.sum(-1)
        return share_EE * others_L[:, None, None] + torch.diag_embed(own_LE.mean(-1, keepdim=True).expand_as(own_LE))


@functools.cache
def _random_weights(num_experts: int) -> Tensor:
    """Symmetric, the same in every run."""
    rows_EE = torch.randn(num_experts, num_experts, generator=torch.Generator().manual_seed(num_experts))
    return ((rows_EE + rows_EE.T) / math.sqrt(2)).exp()


_GRAPHS: dict[str | None, type[ExpertGraph]] = {
    "symphony": SymphonyGraph,
    "learnable": LearnableGraph,
    "fixed": StoredGraph,
    "uniform": ControlGraph,
    "random": ControlGraph,
    "shuffled": ControlGraph,
}


def _whole(parameter: Tensor) -> Tensor:
    """All of a parameter that FSDP2 (a DTensor) or DeepSpeed ZeRO-3 may have sharded."""
    if hasattr(parameter, "full_tensor"):
        gathered: Tensor = parameter.full_tensor()
        return gathered
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.clone()
    return parameter


def make_expert_graph(config: MoEConfig) -> ExpertGraph | None:
    """The expert graph of a composition (setting ``expert_graph``)."""
    kind = _GRAPHS.get(config.expert_graph)
    return None if kind is None else kind(config)


def normalize_counts(counts_EE: Tensor, num_tokens: Tensor, config: MoEConfig) -> Tensor:
    """The target matrix A_hat = (1 - strength) I + strength * norm(C); an expert never co-selected keeps a row of I.

    Args:
        counts_EE: co-selection counts C = S^T S, ``[E, E]``, symmetric, or of several layers, ``[L, E, E]``.
        num_tokens: the tokens counted (used by ``normalization: frequency``), a scalar or ``[L]``.
        config: `normalization`, `diagonal`, `strength`.

    Returns:
        As many matrices, fp32.
    """
    identity_EE = torch.eye(counts_EE.shape[-1], device=counts_EE.device)
    counts_EE = counts_EE.float()
    if config.diagonal == "drop":
        counts_EE = counts_EE * (1 - identity_EE)
    degree_E = counts_EE.sum(-1)
    alone_E = degree_E == 0
    degree_E = degree_E.masked_fill(alone_E, 1.0)
    if config.normalization == "row":
        norm_EE = counts_EE / degree_E[..., None]
    elif config.normalization == "symmetric":
        norm_EE = counts_EE * degree_E.rsqrt()[..., None] * degree_E.rsqrt()[..., None, :]
    elif config.normalization == "frequency":
        norm_EE = counts_EE / num_tokens.clamp(min=1)[..., None, None]
    else:
        norm_EE = _sinkhorn(counts_EE, alone_E)
    norm_EE = torch.where(alone_E[..., None], identity_EE, norm_EE)
    return (1 - config.strength) * identity_EE + config.strength * norm_EE


def _sinkhorn(counts_EE: Tensor, alone_E: Tensor) -> Tensor:
    """Scales rows and columns in turn until both sum to 1 (to the accuracy of a fixed number of rounds)."""
    matrix_EE = counts_EE + torch.diag_embed(alone_E.float())
    for _ in range(_SINKHORN_ITERATIONS):
        matrix_EE = matrix_EE / matrix_EE.sum(-2, keepdim=True)
        matrix_EE = matrix_EE / matrix_EE.sum(-1, keepdim=True)
    return matrix_EE


def expert_graphs(model: nn.Module) -> Iterator[tuple[str, ExpertGraph]]:
    """The expert graphs of a model with their module names, in order."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertGraph):
            yield name, module


@torch.no_grad()
def set_expert_graph_(model: nn.Module, adjacency_EE: Tensor) -> None:
    """Gives every fixed expert graph of a model one matrix, in place; it is saved with the model and never moves.

    For controls. A graph that says nothing is ``torch.full((E, E), 1 / E)``, one that says something at random
    ``rows / rows.sum(1, keepdim=True)`` of ``rows = torch.rand(E, E, generator=...)``, and one that has lost what it
    was counted from is a trained graph with its experts shuffled.

    Args:
        model: built with ``expert_graph: fixed``.
        adjacency_EE: ``[E, E]``, entry (j, k) is how much expert j listens to expert k.

    Raises:
        InputError: the model has no fixed graph, or the matrix does not fit it.
    """
    graphs = [graph for _, graph in expert_graphs(model) if graph.config.expert_graph == "fixed"]
    if not graphs:
        raise InputError(
            "the model has no expert graph that stays as it is set",
            where="moe.expert_graph",
            remedy="Build the model with expert_graph: fixed.",
        )
    for graph in graphs:
        if adjacency_EE.shape != graph.adjacency_EE.shape or not adjacency_EE.isfinite().all():
            size = graph.config.num_experts
            raise InputError(
                f"a matrix of shape {tuple(adjacency_EE.shape)} was given, {size} x {size} finite numbers are needed",
                where="adjacency_EE",
            )
        graph.adjacency_EE.copy_(adjacency_EE)


@torch.no_grad()
def update_expert_graphs(model: nn.Module, *, momentum: float | None = None) -> None:
    """Moves every counted expert graph one step; call it once after each optimizer step, on every rank.

    The Trainer's callback does this; in another training loop write ``optimizer.step(); update_expert_graphs(model)``.
    One all-reduce of one tensor sums the counts over data-parallel ranks, so that all ranks keep bit-equal graphs.

    Args:
        model: anything with expert graphs in it.
        momentum: instead of the setting's (`SymphonyGraph.update`).
    """
    graphs = [graph for _, graph in expert_graphs(model) if isinstance(graph, SymphonyGraph)]
    if not graphs:
        return
    counts = [graph.take_counts() for graph in graphs]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        stacked = torch.cat(counts)
        dist.all_reduce(stacked)
        counts = list(stacked.split([len(c) for c in counts]))
    for _, group in itertools.groupby(zip(graphs, counts, strict=True), key=lambda pair: _stackable(*pair)):
        alike, theirs = zip(*group, strict=True)
        _update(alike, torch.stack(theirs), momentum)


def _stackable(graph: SymphonyGraph, counts: Tensor) -> tuple[object, ...]:
    """Equal for layers whose graphs move together."""
    return type(graph), graph.config, counts.device


def _update(graphs: Sequence[SymphonyGraph], counts_LN: Tensor, momentum: float | None) -> None:
    """One step of the graphs of L layers of one configuration.

    All at once, for on an accelerator such small matrices take the time that starting a kernel takes, whatever their
    number.

    Args:
        graphs: of L layers.
        counts_LN: their counts, N = E * E + 1 of each (`SymphonyGraph.take_counts`).
        momentum: instead of the setting's.
    """
    config, num_tokens_L = graphs[0].config, counts_LN[:, -1]
    counts_LEE = counts_LN[:, :-1].unflatten(-1, (config.num_experts, config.num_experts))
    target_LEE = normalize_counts(graphs[0].seen(counts_LEE), num_tokens_L, config)
    # No token at all (every rank empty, or a frozen layer): the step leaves the graph as it is. `where` instead of `if`
    # keeps the decision on the device.
    counted_L = num_tokens_L > 0
    kept_L11 = torch.where(counted_L, config.momentum if momentum is None else momentum, 1.0)[:, None, None]
    matrices = [graph.adjacency_EE for graph in graphs]
    moved_LEE = kept_L11 * torch.stack(matrices) + (1 - kept_L11) * target_LEE
    torch._foreach_copy_(matrices, moved_LEE.unbind())
    torch._foreach_add_([graph.num_updates for graph in graphs], counted_L.long().unbind())
