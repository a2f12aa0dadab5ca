"""The experts of one layer: E feed-forward networks with stacked weights.

Shape letters: T tokens, D input size, F expert hidden size, O output size, E experts, K experts per token, N = T * K
routed tokens.

Names and stacking are those of transformers (Mixtral, Qwen3-MoE: ``gate_up_proj [E, 2F, D]``, ``down_proj [E, O, F]``;
without a gate ``up_proj [E, F, D]``; with biases ``..._bias``), so that its experts functions can be called on them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from symphony_vlm.errors import InputError
from symphony_vlm.moe.fused import compute_fused, is_available, warn_of_segments
from symphony_vlm.moe.segments import ExpertParameters, compute_grouped, compute_segments, compute_token
from symphony_vlm.moe.token_exchange import ExpertShard

__all__ = ["Experts"]


_GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of grouped products."""


class _Cast:
    """Experts with weights of another type, as autocast casts a linear layer's; gradients reach the originals."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        self._experts = experts
        for name, parameter in experts.named_parameters():
            setattr(self, name, parameter.to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


class Experts(nn.Module):
    """E experts; a token's output is the weighted sum over its K experts. No token is ever dropped.

    How they are computed is the attribute `implementation`: ``segments`` (here: grouped products where sizes and
    device allow them, else a product for each expert), ``fused`` (the same on a CPU in fp32 by operations that are
    compiled when first used, for SwiGLU without biases; of other types, on other devices and without a compiler it is
    ``segments``), a function that transformers has registered (``grouped_mm``, ``batched_mm``, ``deepgemm``,
    ``sonicmoe``), or ``auto``: ``segments``, but for the few shapes for which ``batched_mm`` is faster. Transformers'
    ``eager`` is left out on purpose: its backward grows with E squared.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: F.
        hidden_act: the activation, by name or as a module.
        output_size: O; default D.
        gated: whether half of the first product, activated, multiplies the other half (SwiGLU and its kin).
        bias: whether both products have biases.
        implementation: see above.
    """

    # What transformers' functions ask about their module.
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    gate_up_proj: Tensor
    up_proj: Tensor
    gate_up_proj_bias: Tensor
    up_proj_bias: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str | nn.Module,
        *,
        output_size: int | None = None,
        gated: bool = True,
        bias: bool = False,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.has_gate, self.has_bias = gated, bias
        self.implementation = implementation
        self.shard: ExpertShard | None = None
        """Set where these are the experts of one rank of several (`expert_parallel.shard_experts_`)."""
        output_size = output_size or hidden_size
        up = "gate_up_proj" if gated else "up_proj"
        up_size = 2 * intermediate_size if gated else intermediate_size
        self.register_parameter(up, nn.Parameter(torch.empty(num_experts, up_size, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, output_size, intermediate_size))
        if bias:
            self.register_parameter(f"{up}_bias", nn.Parameter(torch.empty(num_experts, up_size)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, output_size))
        self.act_fn = ACT2FN[hidden_act] if isinstance(hidden_act, str) else hidden_act
        # `sonicmoe` asks for the activation's name; one that it does not know it refuses.
        self.config = SimpleNamespace(hidden_act="silu" if "SiLU" in type(self.act_fn).__name__ else repr(self.act_fn))

    @property
    def num_experts(self) -> int:
        """E; of a shard, the experts of this rank."""
        return self.down_proj.shape[0]

    @property
    def up_weight(self) -> Tensor:
        """``[E, 2F, D]`` if gated, else ``[E, F, D]``."""
        return self.gate_up_proj if self.has_gate else self.up_proj

    @property
    def up_bias(self) -> Tensor:
        """``[E, 2F]`` if gated, else ``[E, F]``; only with biases."""
        return self.gate_up_proj_bias if self.has_gate else self.up_proj_bias

    def forward(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Dispatches tokens to their experts and combines the results: ``[T, D] -> [T, O]``.

        Args:
            x_TD: tokens.
            weights_TK: fp32 combination weights.
            indices_TK: which experts.

        Raises:
            InputError: the chosen implementation does not exist, or cannot compute experts of this shape.
        """
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        if self.shard is None:
            return self._compute(x_TD, weights_TK, indices_TK)
        total = self.num_experts * self.shard.size
        return self.shard.forward(self._compute, x_TD, weights_TK, indices_TK, num_experts=total)

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        name = self.implementation
        if name == "auto":
            name = self._fitting_implementation(x_TD)
        if name == "fused" and self._can_fuse(x_TD):
            return compute_fused(x_TD, weights_TK, indices_TK, self.gate_up_proj, self.down_proj)
        if name in ("fused", "segments"):
            return self._segments(x_TD, weights_TK, indices_TK)
        # Autocast knows none of the grouped products: it would leave them in the precision of the weights.
        experts: Any = _Cast(self, x_TD.dtype) if torch.is_autocast_enabled(x_TD.device.type) else self
        output_TO: Tensor = self._registered(name)(experts, x_TD, indices_TK, weights_TK)
        return output_TO

    def _fitting_implementation(self, x_TD: Tensor) -> str:
        if not x_TD.is_cuda or torch.is_grad_enabled() or not self._is_square:
            return "segments"
        if torch.compiler.is_compiling():
            # Of other types than bf16 the grouped product is then a loop on the host, which no CUDA graph can hold.
            return "segments" if x_TD.dtype == torch.bfloat16 else "batched_mm"
        # One token's experts are read in place of being sorted for: 2.3 times as fast (docs/performance.md).
        return "batched_mm" if len(x_TD) == 1 else "segments"

    def _segments(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        parts = [self.up_weight, self.down_proj]
        parts += [self.up_bias, self.down_proj_bias] if self.has_bias else []
        if torch.is_autocast_enabled(x_TD.device.type):
            parts = [part.to(x_TD.dtype) for part in parts]
        activate = self._apply_gate if self.has_gate else self.act_fn
        output_TO: Tensor = self._fitting_products(x_TD)(
            x_TD, weights_TK, indices_TK, ExpertParameters(*parts), activate
        )
        return output_TO

    def _fitting_products(self, x_TD: Tensor) -> Callable[..., Tensor]:
        # Compiled, which experts a token chose cannot be read.
        is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if len(x_TD) == 1 and x_TD.device.type == "cpu" and is_plain:
            return compute_token
        return compute_grouped if self._can_group(x_TD) else compute_segments

    def _can_fuse(self, x_TD: Tensor) -> bool:
        if not self.has_gate or self.has_bias or self.config.hidden_act != "silu":
            raise InputError(
                "'fused' computes gated SiLU experts without biases; these have another form",
                where="moe.experts_implementation",
                remedy="Use auto or segments.",
            )
        if torch.compiler.is_compiling():
            return False
        if x_TD.device.type != "cpu" or {x_TD.dtype, self.gate_up_proj.dtype} != {torch.float32}:
            warn_of_segments(x_TD.device.type, x_TD.dtype)
            return False
        return is_available()

    def _can_group(self, x_TD: Tensor) -> bool:
        """Whether the products are grouped: by torch 2.10 or later, for these sizes, on this device."""
        if not hasattr(F, "grouped_mm") or x_TD.dtype not in _GROUPED_TYPES or not self._fits_grouped_mm(x_TD):
            return False
        if x_TD.is_cuda:
            able = torch.cuda.get_device_capability(x_TD.device) >= (8, 0)
        else:
            # Where biases are a part of the product they are rounded with it.
            able = x_TD.device.type == "cpu" and not self.has_bias
        # Compiled, other types than bf16 are an error.
        return able and (x_TD.dtype == torch.bfloat16 or not torch.compiler.is_compiling())

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        product: Tensor = self.act_fn(gate) * up
        return product

    def _registered(self, name: str) -> Callable[..., Any]:
        """A function of transformers, if it exists and its assumptions hold here."""
        if name not in ALL_EXPERTS_FUNCTIONS:
            known = ", ".join(["auto", "segments", "fused", *ALL_EXPERTS_FUNCTIONS.valid_keys()])
            raise InputError(f"{name!r} is not one of {known}", where="moe.experts_implementation")
        if not self._is_square:
            raise InputError(
                f"transformers' {name!r} needs experts as wide at their end as at their beginning; these map "
                f"{self.up_weight.shape[2]} to {self.down_proj.shape[1]}",
                where="moe.experts_implementation",
                remedy="Use auto or segments.",
            )
        if name == "grouped_mm" and not self._fits_grouped_mm(self.down_proj):
            raise InputError(
                f"'grouped_mm' needs rows of a multiple of 16 bytes; these experts are "
                f"{self.up_weight.shape[2]} and {self.down_proj.shape[2]} wide",
                where="moe.experts_implementation",
                remedy="Use auto or segments, or sizes that are multiples of 8.",
            )
        function: Callable[..., Any] = ALL_EXPERTS_FUNCTIONS[name]
        return function

    @property
    def _is_square(self) -> bool:
        """Whether experts are as wide at their end as at their beginning."""
        return self.down_proj.shape[1] == self.up_weight.shape[2]

    def _fits_grouped_mm(self, like: Tensor) -> bool:
        widths = (*self.up_weight.shape[1:], *self.down_proj.shape[1:])
        return all(width * like.element_size() % 16 == 0 for width in widths)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Draws N(0, std) weights and zero biases, unless a checkpoint has already provided them."""
        for name, parameter in self.named_parameters():
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.normal_(0.0, 0.0 if name.endswith("_bias") else std)
