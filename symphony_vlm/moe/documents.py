"""Documents: which tokens of a packed batch belong together. Everything that looks across tokens asks here.

Shape letters: B rows, S tokens of a row, T = B * S, L tokens of a document.

A packed row holds several conversations, one after the other. Attention and token graphs stay inside each, positions
begin again with each, and the padding behind the last one counts nowhere. The language model's forward pass carries
one `Documents` as the keyword ``documents``, which transformers hands on to every attention layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Documents", "window_mask"]


class Documents(NamedTuple):
    """The documents of a batch. A tuple, because parallel engines look for the tensors of arguments in nothing else."""

    ids_BS: Tensor
    """Which document of its row each token belongs to, -1 for padding."""
    lengths: tuple[int, ...]
    """Numbers of tokens of the runs of equal ids, row by row; their sum is T. Padding is a run like any other."""

    @classmethod
    def from_ids(cls, ids_BS: Tensor) -> Documents:
        """Measures the documents, at the cost of one synchronisation with the device for each batch.

        Args:
            ids_BS: as `ids_BS`; the tokens of a document stand side by side.

        Raises:
            ValueError: a document stands in two places of its row.
        """
        rows_B1 = torch.arange(ids_BS.shape[0], device=ids_BS.device)[:, None]
        keys_T = (ids_BS + 1 + rows_B1 * (ids_BS.shape[1] + 1)).flatten()
        runs, counts = keys_T.unique_consecutive(return_counts=True)
        if len(runs) != len(keys_T.unique()):
            raise ValueError("document_ids: the tokens of a document must stand side by side in its row")
        return cls(ids_BS, tuple(counts.tolist()))

    @property
    def is_real_BS(self) -> Tensor:
        """bool, False for padding."""
        return self.ids_BS >= 0

    @property
    def position_ids_BS(self) -> Tensor:
        """Positions, which begin again with each document. Padding counts as a document of its own."""
        places_S = torch.arange(self.ids_BS.shape[1], device=self.ids_BS.device)
        begins_BS = torch.nn.functional.pad(self.ids_BS[:, 1:] != self.ids_BS[:, :-1], (1, 0))
        starts_BS = torch.where(begins_BS, places_S, 0).cummax(1).values
        return places_S - starts_BS

    @property
    def flash_attention_arguments(self) -> dict[str, Any]:
        """Where documents begin, in the words of transformers' flash attention, which takes a batch as one row."""
        ends = torch.tensor((0, *self.lengths), device=self.ids_BS.device).cumsum(0).to(torch.int32)
        longest = max(self.lengths)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Who sees whom in a document longer than a layer's sliding window, bool ``[1, 1, L, L]``; None: causal."""
    if window is None or length <= window:
        return None
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
