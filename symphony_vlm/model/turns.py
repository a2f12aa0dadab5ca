"""Several questions about one image in one sequence, each as if it stood alone. Pure functions.

Shape letters: B batch, S sequence.

In a conversation later questions and answers repeat what earlier ones have said about the picture ("Where is the
striped object?"), and a model in training finds it easier to read that than to look. Separate turns share the image
and nothing else: the gradient is that of separate samples, the image's tokens are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from symphony_vlm.errors import InputError

__all__ = ["separate_turns"]


def separate_turns(
    turn_ids_BS: Tensor, attention_mask_BS: Tensor, *, implementation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attention mask and positions with which no turn sees another.

    Args:
        turn_ids_BS: turn of each token, -1 for what all turns share, which stands in front.
        attention_mask_BS: 1 for real tokens; padding stands at the end.
        implementation: the language model's attention; ``sdpa`` and ``eager`` take such a mask.
        dtype: of an additive mask.

    Returns:
        ``[B, 1, S, S]``, bool for sdpa (True: may be seen) and additive for eager; and position ids ``[B, S]``, which
        begin again after the shared tokens with every turn.

    Raises:
        InputError: the attention implementation takes no such mask.
    """
    if implementation not in ("sdpa", "eager"):
        raise InputError(
            f"the attention implementation {implementation!r} takes no mask by turns",
            where="stage.independent_turns",
            remedy="Load the language model with attn_implementation='sdpa'.",
        )
    size = turn_ids_BS.shape[1]
    place_S = torch.arange(size, device=turn_ids_BS.device)
    shared_BS = turn_ids_BS < 0
    real_BS = attention_mask_BS.bool()
    related_BSS = (turn_ids_BS[:, :, None] == turn_ids_BS[:, None, :]) | shared_BS[:, None, :]
    # Padding sees every real token, so that no row of the mask is empty; nothing sees padding.
    related_BSS = related_BSS | ~real_BS[:, :, None]
    seen_BSS = related_BSS & (place_S[:, None] >= place_S) & real_BS[:, None, :]

    begins_BS = torch.nn.functional.pad(turn_ids_BS[:, 1:] != turn_ids_BS[:, :-1], (1, 0))
    beginning_BS = torch.where(begins_BS, place_S, 0).cummax(1).values
    num_shared_B1 = shared_BS.sum(1, keepdim=True)
    positions_BS = torch.where(shared_BS, place_S, place_S - beginning_BS + num_shared_B1)
    mask_B1SS = seen_BSS[:, None]
    if implementation == "eager":
        mask_B1SS = torch.zeros_like(mask_B1SS, dtype=dtype).masked_fill(~mask_B1SS, torch.finfo(dtype).min)
    return mask_B1SS, positions_BS
