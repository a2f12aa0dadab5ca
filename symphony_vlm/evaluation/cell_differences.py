"""Two models in the same cell: who answers what the other does not, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from symphony_vlm.evaluation.cell_records import Cell
from symphony_vlm.evaluation.quantities import Resampling
from symphony_vlm.evaluation.statistics import Floats, holm, mcnemar, sign_flip_tests

__all__ = ["difference_tests"]


def difference_tests(
    a_IM: Floats, b_IM: Floats, images: Sequence[str], cells: Sequence[Cell], resampling: Resampling
) -> dict[Cell, dict[str, object]]:
    """Tests of "B scores as A does" in every cell, with Holm's correction over the cells.

    Args:
        a_IM: ``[I, M]`` scores of model A, NaN where either model has none.
        b_IM: ``[I, M]`` of model B.
        images: I names, the units whose labels are swapped.
        cells: M cells, the family.
        resampling: Seed and number of draws.

    Returns:
        By cell: ``n_paired``, ``only_baseline_right``, ``only_model_right``, ``difference_p`` (labels of whole images
        swapped), ``mcnemar_p`` (null where scores are not 0 or 1) and both adjusted. Right means at least 0.5. Cells
        without a pair of scores are not among them.
    """
    paired_IM = ~np.isnan(a_IM) & ~np.isnan(b_IM)
    columns = [column for column in range(len(cells)) if paired_IM[:, column].any()] if len(images) else []
    if not columns:
        return {}
    a_IM, b_IM, paired_IM = a_IM[:, columns], b_IM[:, columns], paired_IM[:, columns]
    exact = set(np.unique(np.concatenate([a_IM[paired_IM], b_IM[paired_IM]]))) <= {0.0, 1.0}
    right_a, right_b = a_IM >= 0.5, b_IM >= 0.5
    only_a = (right_a & ~right_b & paired_IM).sum(0)
    only_b = (~right_a & right_b & paired_IM).sum(0)
    swapped = sign_flip_tests(b_IM - a_IM, images, seed=resampling.seed, n_draws=resampling.n_draws)
    counted = [mcnemar(int(b), int(c)) for b, c in zip(only_a, only_b, strict=True)]
    swapped_holm, counted_holm = holm(swapped), holm(counted)
    return {
        cells[column]: {
            "n_paired": int(paired_IM[:, k].sum()),
            "only_baseline_right": int(only_a[k]),
            "only_model_right": int(only_b[k]),
            "difference_p": swapped[k],
            "difference_p_holm": swapped_holm[k],
            "mcnemar_p": counted[k] if exact else None,
            "mcnemar_p_holm": counted_holm[k] if exact else None,
        }
        for k, column in enumerate(columns)
    }
