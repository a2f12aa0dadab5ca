"""A router of one's own: Symphony's, with logits that cannot leave (-CAP, CAP).

Commands know its name once they are told the file:

    export SYMPHONY_VLM_PLUGINS=docs/examples/soft_cap_router.py
    symphony-vlm train --config recipe.yaml model.moe.router=soft_cap
"""

import torch
from torch import Tensor

from symphony_vlm.moe.router import Router, register_router

CAP = 5.0


@register_router("soft_cap", gate="linear", expert_graph="symphony")
class SoftCapRouter(Router):
    """A soft cap on the logits, as Gemma 2 has it on attention: no expert can shut the others out."""

    def logits(self, x_TD: Tensor) -> Tensor:
        """The gate's logits ``[T, E]``, fp32, squeezed into (-CAP, CAP)."""
        return CAP * torch.tanh(super().logits(x_TD) / CAP)
