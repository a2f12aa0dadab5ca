"""Cross entropy over a large vocabulary without ever holding all logits.

Shape letters: B batch, S sequence, D hidden size, V vocabulary, N supervised tokens, n those of a chunk.

The logits of a chunk are made, and at once the gradients that follow from them, before the next chunk's: nothing as
large as ``[N, V]`` exists, and the backward pass computes nothing again. It is the scheme of Liger Kernel's linear
cross entropy (arXiv 2410.10989), out of whole operations instead of a kernel. Whatever a family does to its logits
after the head (Gemma's soft cap, Cohere's scale) is done by its own code: its causal LM's forward runs for every chunk,
with the decoder's output given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_vlm.model.aligned_head import aligned_head

__all__ = ["MAX_LOGITS", "DeferredHead", "chunked_cross_entropy", "needs_chunks"]

MAX_LOGITS = 2**29
"""Logits at once: 2 GiB in fp32, of which cross entropy and its gradient need about twice as much."""


def needs_chunks(language_model: PreTrainedModel, num_positions: int) -> bool:
    """Whether so many positions may have too many logits, and the model is one whose logits can be made in parts.

    How many of the positions are supervised is known to the device alone, and is not asked for: the answer would come
    when all work before it is done. Of few of them there is one chunk.

    FSDP2 and ZeRO-3 gather the head's weights around a module's one call; with them the logits stay whole.
    """
    if num_positions * language_model.config.get_text_config().vocab_size <= MAX_LOGITS:
        return False
    parameters = language_model.get_output_embeddings().parameters()
    sharded = any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in parameters)
    return not sharded and not hasattr(language_model, "unshard") and language_model.base_model is not language_model


class DeferredHead:
    """A causal LM's forward pass as far as its head, which is then run on chunks of the supervised tokens.

    Args:
        language_model: the causal LM.
        supervised_BS: bool, where a target is.
    """

    def __init__(self, language_model: PreTrainedModel, supervised_BS: Tensor) -> None:
        self._model = language_model
        self._head: nn.Module = language_model.get_output_embeddings()
        self._decoder: nn.Module = language_model.base_model
        self._supervised_BS = supervised_BS
        self._decoded: Any = None
        self.hidden_ND: Tensor
        """What the head is to see."""

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Around the model's forward pass, which then makes no logits: ``[1, 0, V]``."""

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._decoded = output

        def defer(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.hidden_ND = args[0][self._supervised_BS.to(args[0].device)]
            return (self.hidden_ND[None, :0], *args[1:])

        handles = [self._decoder.register_forward_hook(keep), self._head.register_forward_pre_hook(defer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that train of the head, and of whatever else makes logits of hidden states."""
        inside = {id(parameter) for parameter in self._decoder.parameters()}
        outside = [p for p in self._model.parameters() if id(p) not in inside]
        found = {id(p): p for p in (*self._head.parameters(), *outside)}  # a tied head is the decoder's embedding too
        return [parameter for parameter in found.values() if parameter.requires_grad]

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """``[n, D] -> [n, V]``."""

        def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (hidden_nD[None], *args[1:])

        def decoded(*args: Any, **kwargs: Any) -> Any:
            return self._decoded

        handle = self._head.register_forward_pre_hook(replace)
        own = vars(self._decoder).get("forward")
        vars(self._decoder)["forward"] = decoded
        try:
            # Not the module's call: its hooks open records of a forward pass, and this is a part of one.
            with aligned_head(self._head):
                logits_1nV: Tensor = self._model.forward(use_cache=False).logits
        finally:
            handle.remove()
            vars(self._decoder).pop("forward")
            if own is not None:
                vars(self._decoder)["forward"] = own
        return logits_1nV[0]


def chunked_cross_entropy(head: DeferredHead, targets_N: Tensor) -> Tensor:
    """Summed cross entropy of the supervised tokens, fp32, with the gradients of all logits at once.

    Args:
        head: after its model's forward pass.
        targets_N: of the supervised tokens.
    """
    vocab_size = head._model.config.get_text_config().vocab_size
    size = max(1, MAX_LOGITS // vocab_size)
    arguments = (head.logits, targets_N, size, head.hidden_ND, *head.parameters)
    summed: Tensor = _Chunked.apply(*arguments)  # type: ignore[no-untyped-call]
    return summed


class _Chunked(torch.autograd.Function):
    """Sum of cross entropies; the gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Callable[[Tensor], Tensor],
        targets_N: Tensor,
        size: int,
        hidden_ND: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        of_hidden, *of_parameters = ctx.needs_input_grad[3:]
        summed = torch.zeros((), device=hidden_ND.device)
        grads_ND: list[Tensor] = []
        grads: list[Tensor | None] = [None] * len(parameters)
        for hidden_nD, targets_n in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                hidden_nD = hidden_nD.detach().requires_grad_(of_hidden)
                logits_nV = logits(hidden_nD)
            loss, grad_nV = _with_gradient(logits_nV.detach(), targets_n.to(logits_nV.device))
            summed += loss
            if not any(ctx.needs_input_grad):
                continue
            trained = [p for p, is_wanted in zip(parameters, of_parameters, strict=True) if is_wanted]
            wanted = [hidden_nD] * of_hidden + trained
            found = list(torch.autograd.grad(logits_nV, wanted, grad_nV, allow_unused=True))
            if of_hidden:
                grads_ND.append(found.pop(0))
            grads = _added(grads, of_parameters, found)
        ctx.of_hidden = torch.cat(grads_ND) if grads_ND else None
        ctx.of_parameters = [None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]
        return summed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else (g * grad).to(g.dtype) for g in (ctx.of_hidden, *ctx.of_parameters))
        return (None, None, None, *scaled)


def _with_gradient(logits_nV: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy in fp32, and its gradient, softmax less one-hot, in the place of the log-softmax."""
    log_probs_nV = torch.log_softmax(logits_nV, -1, dtype=torch.float32)
    loss = -log_probs_nV.gather(1, targets_n[:, None]).sum()
    grad_nV = log_probs_nV.exp_()
    grad_nV.scatter_add_(1, targets_n[:, None], grad_nV.new_full((len(targets_n), 1), -1.0))
    return loss, grad_nV.to(logits_nV.dtype)


def _added(
    sums: Sequence[Tensor | None], is_wanted: Sequence[bool], found: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the chunks so far and of one more, in fp32: chunks are many and each adds little."""
    new = iter(found)
    result: list[Tensor | None] = []
    for total, wanted in zip(sums, is_wanted, strict=True):
        grad = next(new) if wanted else None
        if grad is not None:
            total = grad.float() if total is None else total.add_(grad)
        result.append(total)
    return result
