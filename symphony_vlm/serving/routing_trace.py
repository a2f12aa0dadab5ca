"""Which experts the tokens of a conversation went to, recorded while it is generated.

Shape letters: S tokens of a conversation, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

__all__ = ["ConversationRouting", "RoutingTrace"]


@dataclass(frozen=True, kw_only=True)
class ConversationRouting:
    """The experts of a conversation's tokens, up to the last one that the model has read.

    The token that ends an answer is predicted and not read, so it has no experts.
    """

    token_ids: tuple[int, ...]
    """Of all tokens, ``S``; images as runs of the placeholder."""
    answer_start: int
    """Where the last answer begins."""
    num_experts: int
    experts: dict[int, Tensor]
    """By decoder layer, int ``[S, K]``, the expert with the highest weight first."""
    weights: dict[int, Tensor]
    """Their combination weights, fp32 ``[S, K]``."""


class RoutingTrace:
    """Adds up what the routers decide in the passes of a conversation, in step with its KV cache.

    Args:
        model: with experts in its decoder.
    """

    def __init__(self, model: SymphonyVLMForConditionalGeneration) -> None:
        self._model = model
        self._experts: dict[int, list[Tensor]] = {}
        self._weights: dict[int, list[Tensor]] = {}

    @contextmanager
    def recording(self, reused: int) -> Iterator[None]:
        """Around a generation that goes on from the first `reused` tokens of the one before."""
        for pieces in (*self._experts.values(), *self._weights.values()):
            pieces[:] = [torch.cat(pieces)[:reused]]
        hook = self._model.language_model.register_forward_hook(self._add)
        try:
            yield
        finally:
            hook.remove()

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The recorder's own hook, which was there first, has closed the record of this pass.
        assert self._model.routing is not None
        for key, routed in self._model.routing.outputs.items():
            if isinstance(key, int):
                # Copies: a view of the K best would keep the scores of all experts.
                self._experts.setdefault(key, []).append(routed.indices_TK.to(torch.int32))
                self._weights.setdefault(key, []).append(routed.weights_TK.clone())

    def routing(self, token_ids: list[int], answer_start: int) -> ConversationRouting:
        """The record after a generation.

        Args:
            token_ids: of the prompt and the answer.
            answer_start: length of the prompt.
        """
        assert self._model.config.moe_config is not None
        experts = {layer: torch.cat(pieces).cpu() for layer, pieces in sorted(self._experts.items())}
        weights = {layer: torch.cat(pieces).cpu() for layer, pieces in sorted(self._weights.items())}
        read = min((len(rows) for rows in experts.values()), default=0)
        return ConversationRouting(
            token_ids=tuple(token_ids[:read]),
            answer_start=answer_start,
            num_experts=self._model.config.moe_config.num_experts,
            experts=experts,
            weights=weights,
        )
