"""A router of one's own: Symphony's, with logits that cannot leave (-CAP, CAP).

As a module it registers the router; as a program it is the command line, which then knows the name:

    python docs/examples/soft_cap_router.py train --config recipe.yaml model.moe.router=soft_cap
"""

import torch
from torch import Tensor

from symphony_vlm.cli import main
from symphony_vlm.moe.router import Router, register_router

CAP = 5.0


@register_router("soft_cap", gate="linear", expert_graph="symphony")
class SoftCapRouter(Router):
    """A soft cap on the logits, as Gemma 2 has it on attention: no expert can shut the others out."""

    def logits(self, x_TD: Tensor) -> Tensor:
        """The gate's logits ``[T, E]``, fp32, squeezed into (-CAP, CAP)."""
        return CAP * torch.tanh(super().logits(x_TD) / CAP)


if __name__ == "__main__":
    main()
