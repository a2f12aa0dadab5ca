"""Log-probabilities of a text's tokens under a causal LM, window by window.

Shape letters: N tokens of the text, B windows of a batch, S tokens of a window, T scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.perplexity.windows import Window
from symphony_vlm.model.loss import only_supervised_logits

__all__ = ["log_probabilities"]

MAX_LOGITS = 2**27
"""Of a batch: 512 MiB in fp32. A vocabulary of 267,735 words makes batches of one window."""


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, ids_N: Tensor, windows: Sequence[Window], *, batch_size: int
) -> NDArray[np.float64]:
    """Natural log-probability of every token that a window scores, ``[N]`` in float64; NaN for the others.

    Args:
        model: a causal LM in evaluation mode.
        ids_N: the text's tokens.
        windows: what is seen and scored.
        batch_size: windows in a forward pass, at most; fewer if their logits would not fit into `MAX_LOGITS`.

    Raises:
        InputError: a token id outside of the model's vocabulary, or the model has no head.
    """
    head = model.get_output_embeddings()
    rows = model.get_input_embeddings().weight.shape[0]
    if head is None:
        raise InputError(f"{type(model).__name__} has no head that predicts tokens", where="--model")
    if int(ids_N.max()) >= rows:
        raise InputError(
            f"the tokenizer gives ids up to {int(ids_N.max())} and the model has {rows} rows",
            where="--model",
            remedy="Tokenizer and weights must come from one save.",
        )
    result_N = torch.full((len(ids_N),), float("nan"), dtype=torch.float64)
    for batch in _batches(windows, batch_size, rows):
        ids_BS = torch.stack([ids_N[window.begin : window.end] for window in batch])
        predicts_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for row, window in enumerate(batch):
            predicts_BS[row, window.first_target - 1 - window.begin : window.end - 1 - window.begin] = True
        targets_T = torch.cat([ids_N[window.first_target : window.end] for window in batch])
        with only_supervised_logits(head, predicts_BS):
            logits_TV = model(input_ids=ids_BS.to(model.device), use_cache=False).logits[0]
        found_T = -F.cross_entropy(logits_TV.float(), targets_T.to(logits_TV.device), reduction="none")
        result_N[torch.cat([torch.arange(w.first_target, w.end) for w in batch])] = found_T.double().cpu()
    return result_N.numpy()


def _batches(windows: Sequence[Window], batch_size: int, vocabulary: int) -> Iterator[list[Window]]:
    """Windows of one length together: padding would change nothing but cost time."""
    batch: list[Window] = []
    logits = 0
    for window in windows:
        size = window.num_targets * vocabulary
        other = batch and window.end - window.begin != batch[0].end - batch[0].begin
        if batch and (other or len(batch) == batch_size or logits + size > MAX_LOGITS):
            yield batch
            batch, logits = [], 0
        batch.append(window)
        logits += size
    if batch:
        yield batch
