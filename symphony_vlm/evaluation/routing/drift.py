"""How far the routing of corrupted prompts lies from that of the clean ones: sums of items, and figures of sums.

Every figure is a function of sums over tokens, so that one code serves an item, a cell and a bootstrap resample.

Shape letters: T tokens, I items, L sparse layers, M modalities (image, text), E experts, K selected experts, X any
leading axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.evaluation.routing.measures import (
    coefficient_of_variation,
    entropy,
    jaccard_of_shared,
    jensen_shannon,
    kappa,
    normalized,
    rank_margin,
    shared_experts,
    sparse_rows,
    total_variation,
)
from symphony_vlm.evaluation.routing.prompts import MODALITIES, RoutedPrompts

__all__ = ["COUNTS", "FIGURES", "drift_figures", "drift_sums", "misaligned", "token_changes"]

Array = NDArray[Any]

COUNTS = {
    "tokens": "tokens compared",
    "load_clean": "[E], slots of each expert on clean prompts",
    "load_corrupted": "[E], the same on corrupted ones",
    "shared": "[K + 1], tokens by how many of their experts are the same in both",
    "shared_plain": "[K + 1], the same of what the gate would have selected without the expert graph",
    "top1_changed": "tokens whose first expert differs",
    "top1_changed_plain": "the same without the graph",
    "flips_prevented": "tokens whose set changes without the graph and not with it",
    "flips_caused": "tokens whose set changes with the graph and not without it",
    "graph_moved_clean": "tokens of clean prompts whose set the graph changes",
    "graph_moved_corrupted": "the same of corrupted ones",
}
"""Integers of each item, layer and modality."""

FIGURES = {
    "js_load": "Jensen-Shannon divergence (bits) of the experts' load",
    "js_gate": "mean Jensen-Shannon divergence (bits) of a token's gate distributions",
    "fluctuation": "mean share of a token's experts that differ, 1 - |S and S'| / K",
    "jaccard": "mean |S and S'| / |S or S'|",
    "kappa": "overlap beyond chance",
    "top1_change": "share of tokens whose first expert differs",
    "tv_scores": "mean total variation of a token's gate distributions",
    "tv_weights": "mean half L1 distance of a token's combination weights",
    "entropy_clean": "mean entropy (nats) of a token's gate distribution, clean",
    "entropy_change": "the same, corrupted minus clean",
    "margin_clean": "mean gate share of rank K minus that of rank K + 1, clean",
    "margin_change": "the same, corrupted minus clean",
    "load_cv_clean": "coefficient of variation of the load, clean",
    "load_cv_change": "the same, corrupted minus clean",
    "dead_clean": "experts that no token selects, clean",
    "dead_corrupted": "the same, corrupted",
    "js_gate_plain": "js_gate before the expert graph",
    "fluctuation_plain": "fluctuation of the selection without the graph",
    "top1_change_plain": "top1_change without the graph",
    "flips_prevented": "share of tokens whose set changes without the graph and not with it",
    "flips_caused": "share of tokens whose set changes with the graph and not without it",
    "graph_moved": "share of tokens of clean prompts whose set the graph changes",
}
"""What `drift_figures` gives."""


def misaligned(clean: RoutedPrompts, corrupted: RoutedPrompts) -> list[str | None]:
    """For each item why its prompts cannot be compared token by token; None if they can."""
    reasons: list[str | None] = [
        None if before == after else f"{before} tokens clean, {after} corrupted"
        for before, after in zip(clean.lengths.tolist(), corrupted.lengths.tolist(), strict=True)
    ]
    rows = [row for row, reason in enumerate(reasons) if reason is None]
    moved_T = clean.take(rows).is_image_T != corrupted.take(rows).is_image_T
    item_T = np.repeat(rows, clean.lengths[rows])
    for row in np.unique(item_T[moved_T]).tolist():
        reasons[row] = "the pictures stand at other positions"
    return reasons


def drift_sums(clean: RoutedPrompts, corrupted: RoutedPrompts) -> dict[str, Array]:
    """Sums over the tokens of each item, layer and modality.

    Args:
        clean: prompts of I items.
        corrupted: of the same items, aligned (`misaligned`).

    Returns:
        The counts of `COUNTS`, int32 ``[I, L, M]`` or ``[I, L, M, n]``, and float32 sums of the measures of a token.
    """
    assert (clean.lengths == corrupted.lengths).all() and (clean.is_image_T == corrupted.is_image_T).all()
    size = _Sizes(clean)
    same_TL = shared_experts(clean.selected_TLK, corrupted.selected_TLK)
    same_plain_TL = shared_experts(clean.plain_TLK, corrupted.plain_TLK)
    kept_TL, kept_plain_TL = same_TL == size.K, same_plain_TL == size.K
    sums = {
        "tokens": size.sums(np.ones_like(kept_TL)),
        "load_clean": size.histogram(clean.selected_TLK, size.E),
        "load_corrupted": size.histogram(corrupted.selected_TLK, size.E),
        "shared": size.histogram(same_TL[..., None], size.K + 1),
        "shared_plain": size.histogram(same_plain_TL[..., None], size.K + 1),
        "top1_changed": size.sums(clean.selected_TLK[..., 0] != corrupted.selected_TLK[..., 0]),
        "top1_changed_plain": size.sums(clean.plain_TLK[..., 0] != corrupted.plain_TLK[..., 0]),
        "flips_prevented": size.sums(kept_TL & ~kept_plain_TL),
        "flips_caused": size.sums(~kept_TL & kept_plain_TL),
        "graph_moved_clean": size.sums(shared_experts(clean.selected_TLK, clean.plain_TLK) < size.K),
        "graph_moved_corrupted": size.sums(shared_experts(corrupted.selected_TLK, corrupted.plain_TLK) < size.K),
    }
    assert sums.keys() == COUNTS.keys()
    counts = {name: array.astype(np.int32) for name, array in sums.items()}
    measures = {name: size.sums(values).astype(np.float32) for name, values in _measures(clean, corrupted, size)}
    return counts | measures


def token_changes(clean: RoutedPrompts, corrupted: RoutedPrompts) -> Array:
    """``[T]`` uint16: of the K experts in each of L layers, how many differ; L K would be all of them."""
    shared_TL = shared_experts(clean.selected_TLK, corrupted.selected_TLK)
    changes_T: Array = (clean.num_layers * clean.num_selected - shared_TL.sum(1)).astype(np.uint16)
    return changes_T


def drift_figures(sums: Mapping[str, Array]) -> dict[str, Array]:
    """The figures of `FIGURES` from sums of `drift_sums`, ``[..., L, M]``; NaN where there was no token.

    Args:
        sums: ``[..., L, M]`` and ``[..., L, M, n]``; of items, or added up over items in any way.
    """
    tokens_X = sums["tokens"]
    num_selected = sums["shared"].shape[-1] - 1
    shared_K = np.arange(num_selected + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = {name: array / tokens_X for name, array in sums.items() if array.ndim == tokens_X.ndim}
        overlap_X = sums["shared"] @ shared_K / num_selected / tokens_X
        overlap_plain_X = sums["shared_plain"] @ shared_K / num_selected / tokens_X
        clean_XE, corrupted_XE = (sums[f"load_{kind}"] / tokens_X[..., None] for kind in ("clean", "corrupted"))
        jaccard_X = sums["shared"] @ jaccard_of_shared(shared_K, num_selected) / tokens_X
        cv_clean_X, cv_corrupted_X = coefficient_of_variation(clean_XE), coefficient_of_variation(corrupted_XE)
    figures = {
        "js_load": jensen_shannon(clean_XE / num_selected, corrupted_XE / num_selected),
        "js_gate": share["js_gate"],
        "fluctuation": 1 - overlap_X,
        "jaccard": jaccard_X,
        "kappa": kappa(overlap_X, clean_XE, corrupted_XE, num_selected),
        "top1_change": share["top1_changed"],
        "tv_scores": share["tv_scores"],
        "tv_weights": share["tv_weights"],
        "entropy_clean": share["entropy_clean"],
        "entropy_change": share["entropy_corrupted"] - share["entropy_clean"],
        "margin_clean": share["margin_clean"],
        "margin_change": share["margin_corrupted"] - share["margin_clean"],
        "load_cv_clean": cv_clean_X,
        "load_cv_change": cv_corrupted_X - cv_clean_X,
        "dead_clean": np.where(tokens_X > 0, (clean_XE == 0).sum(-1), np.nan),
        "dead_corrupted": np.where(tokens_X > 0, (corrupted_XE == 0).sum(-1), np.nan),
        "js_gate_plain": share["js_gate_plain"],
        "fluctuation_plain": 1 - overlap_plain_X,
        "top1_change_plain": share["top1_changed_plain"],
        "flips_prevented": share["flips_prevented"],
        "flips_caused": share["flips_caused"],
        "graph_moved": share["graph_moved_clean"],
    }
    assert figures.keys() == FIGURES.keys()
    return figures


class _Sizes:
    """Sums values of tokens by item, layer and modality."""

    def __init__(self, prompts: RoutedPrompts) -> None:
        num_items, num_layers = len(prompts.lengths), prompts.num_layers
        self.E, self.K = prompts.num_experts, prompts.num_selected
        item_T = np.repeat(np.arange(num_items), prompts.lengths)
        kind_T = np.where(prompts.is_image_T, 0, 1)
        self._place_TL = (item_T[:, None] * num_layers + np.arange(num_layers)) * len(MODALITIES) + kind_T[:, None]
        self._shape = (num_items, num_layers, len(MODALITIES))

    def sums(self, values_TL: Array) -> Array:
        """``[T, L] -> [I, L, M]``, in float64, token after token."""
        size = int(np.prod(self._shape))
        return np.bincount(self._place_TL.ravel(), values_TL.ravel(), minlength=size).reshape(self._shape)

    def histogram(self, values_TLn: Array, bins: int) -> Array:
        """``[T, L, n]`` integers below ``bins`` to ``[I, L, M, bins]``."""
        place_TLn = self._place_TL[..., None] * bins + values_TLn
        size = int(np.prod(self._shape)) * bins
        return np.bincount(place_TLn.ravel(), minlength=size).reshape(*self._shape, bins)


def _measures(clean: RoutedPrompts, corrupted: RoutedPrompts, size: _Sizes) -> list[tuple[str, Array]]:
    """Measures of every token, ``[T, L]`` float32; both sides come rounded to 16 bits, so equal ones are exactly 0."""
    p_TLE, q_TLE = (normalized(side.scores_TLE.astype(np.float32)) for side in (clean, corrupted))
    plain_p_TLE, plain_q_TLE = p_TLE, q_TLE
    if not np.array_equal(clean.plain_TLE, clean.scores_TLE):
        plain_p_TLE, plain_q_TLE = (normalized(side.plain_TLE.astype(np.float32)) for side in (clean, corrupted))
    weights = (
        sparse_rows(side.weights_TLK.astype(np.float32), side.selected_TLK, size.E) for side in (clean, corrupted)
    )
    gate_TL = jensen_shannon(p_TLE, q_TLE)
    return [
        ("js_gate", gate_TL),
        ("js_gate_plain", gate_TL if plain_p_TLE is p_TLE else jensen_shannon(plain_p_TLE, plain_q_TLE)),
        ("tv_scores", total_variation(p_TLE, q_TLE)),
        ("tv_weights", total_variation(*weights)),
        ("entropy_clean", entropy(p_TLE)),
        ("entropy_corrupted", entropy(q_TLE)),
        ("margin_clean", rank_margin(p_TLE, size.K)),
        ("margin_corrupted", rank_margin(q_TLE, size.K)),
    ]
