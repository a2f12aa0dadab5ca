"""Sums and figures of drift against loops over single tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from symphony_vlm.evaluation.routing.aggregate import figures_json, resampled_figures
from symphony_vlm.evaluation.routing.drift import COUNTS, drift_figures, drift_sums, misaligned, token_changes
from symphony_vlm.evaluation.routing.prompts import RoutedPrompts
from symphony_vlm.evaluation.statistics import bootstrap_weights

LENGTHS = (7, 4, 9)
L, E, K = 3, 5, 2


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS, near: RoutedPrompts | None = None) -> RoutedPrompts:
    """Random routing; ``near``: a noisy version of that."""
    rng = np.random.default_rng(seed)
    size = sum(lengths)
    noise = rng.standard_normal((size, L, E))
    base = noise if near is None else np.log(near.plain_TLE.astype(float)) + 0.5 * noise
    plain = np.exp(base) / np.exp(base).sum(-1, keepdims=True)
    mixing = 0.6 * np.eye(E) + 0.4 * np.random.default_rng(9).dirichlet(np.ones(E), size=E)
    scores = plain @ mixing.T
    selected, chosen = (np.argsort(-values, axis=-1, kind="stable")[..., :K] for values in (scores, plain))
    weights = np.take_along_axis(scores, selected, -1)
    first = np.concatenate([np.arange(length) < 3 for length in lengths])
    return RoutedPrompts(
        lengths=np.array(lengths),
        is_image_T=first,
        selected_TLK=selected.astype(np.uint8),
        plain_TLK=chosen.astype(np.uint8),
        weights_TLK=(weights / weights.sum(-1, keepdims=True)).astype(np.float16),
        scores_TLE=scores.astype(np.float16),
        plain_TLE=plain.astype(np.float16),
    )


@pytest.fixture(scope="module")
def clean() -> RoutedPrompts:
    return prompts(0)


@pytest.fixture(scope="module")
def corrupted(clean: RoutedPrompts) -> RoutedPrompts:
    return prompts(1, near=clean)


def _distribution(scores: Any) -> Any:
    return scores.astype(np.float64) / scores.astype(np.float64).sum()


def _loop(clean: RoutedPrompts, corrupted: RoutedPrompts, item: int, layer: int, image: bool) -> dict[str, Any]:
    """The sums of one item, layer and modality, token by token."""
    start = sum(LENGTHS[:item])
    sums: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {
        "load_clean": [0] * E,
        "load_corrupted": [0] * E,
        "shared": [0] * (K + 1),
        "shared_plain": [0] * (K + 1),
    }
    sums |= dict.fromkeys(("js_gate", "js_gate_plain", "tv_scores", "tv_weights"), 0.0)
    for t in range(start, start + LENGTHS[item]):
        if bool(clean.is_image_T[t]) != image:
            continue
        a, b = clean.selected_TLK[t, layer].tolist(), corrupted.selected_TLK[t, layer].tolist()
        pa, pb = clean.plain_TLK[t, layer].tolist(), corrupted.plain_TLK[t, layer].tolist()
        sums["tokens"] += 1
        for e in a:
            sums["load_clean"][e] += 1
        for e in b:
            sums["load_corrupted"][e] += 1
        sums["shared"][len(set(a) & set(b))] += 1
        sums["shared_plain"][len(set(pa) & set(pb))] += 1
        sums["top1_changed"] += a[0] != b[0]
        sums["top1_changed_plain"] += pa[0] != pb[0]
        sums["flips_prevented"] += set(a) == set(b) and set(pa) != set(pb)
        sums["flips_caused"] += set(a) != set(b) and set(pa) == set(pb)
        sums["graph_moved_clean"] += set(a) != set(pa)
        sums["graph_moved_corrupted"] += set(b) != set(pb)
        p, q = _distribution(clean.scores_TLE[t, layer]), _distribution(corrupted.scores_TLE[t, layer])
        plain_p, plain_q = _distribution(clean.plain_TLE[t, layer]), _distribution(corrupted.plain_TLE[t, layer])
        sums["js_gate"] += jensenshannon(p, q, base=2) ** 2
        sums["js_gate_plain"] += jensenshannon(plain_p, plain_q, base=2) ** 2
        sums["tv_scores"] += abs(p - q).sum() / 2
        weights = np.zeros((2, E))
        weights[0, a], weights[1, b] = clean.weights_TLK[t, layer], corrupted.weights_TLK[t, layer]
        sums["tv_weights"] += abs(weights[0] - weights[1]).sum() / 2
    return sums


def test_sums_are_those_of_a_loop_over_tokens(clean: RoutedPrompts, corrupted: RoutedPrompts) -> None:
    sums = drift_sums(clean, corrupted)
    for item in range(len(LENGTHS)):
        for layer in range(L):
            for m, image in enumerate((True, False)):
                for name, expected in _loop(clean, corrupted, item, layer, image).items():
                    found = sums[name][item, layer, m].tolist()
                    if name in COUNTS:
                        assert found == expected, name
                    else:
                        # Of fp32 logarithms: 1e-7 a term, at most nine tokens of five experts.
                        assert found == pytest.approx(expected, abs=5e-6), name
    assert sums["flips_prevented"].sum() > 0 and sums["flips_caused"].sum() > 0


def test_figures_follow_their_formulae(clean: RoutedPrompts, corrupted: RoutedPrompts) -> None:
    sums = drift_sums(clean, corrupted)
    figures = drift_figures({name: array.sum(0) for name, array in sums.items()})
    for layer in range(L):
        chosen = clean.is_image_T
        one, other = clean.selected_TLK[chosen, layer].tolist(), corrupted.selected_TLK[chosen, layer].tolist()
        overlap = np.mean([len(set(a) & set(b)) / K for a, b in zip(one, other, strict=True)])
        shares = [np.bincount(np.ravel(side), minlength=E) / len(side) for side in (one, other)]
        chance = (shares[0] * shares[1]).sum() / K
        expected = {
            "fluctuation": 1 - overlap,
            "jaccard": np.mean([len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(one, other, strict=True)]),
            "kappa": (overlap - chance) / (1 - chance),
            "js_load": jensenshannon(*shares, base=2) ** 2,
            "top1_change": np.mean([a[0] != b[0] for a, b in zip(one, other, strict=True)]),
            "load_cv_clean": shares[0].std() / shares[0].mean(),
            "dead_clean": (shares[0] == 0).sum(),
        }
        for name, value in expected.items():
            assert figures[name][layer, 0] == pytest.approx(value, abs=1e-12), name


def test_a_prompt_has_no_drift_from_itself(clean: RoutedPrompts) -> None:
    figures = drift_figures(drift_sums(clean, clean))
    for name in ("js_load", "js_gate", "js_gate_plain", "fluctuation", "top1_change", "tv_scores", "tv_weights"):
        assert (figures[name] == 0).all(), name
    for name in ("entropy_change", "margin_change", "load_cv_change", "flips_prevented", "flips_caused"):
        assert (figures[name] == 0).all(), name
    assert (figures["jaccard"] == 1).all()
    assert (token_changes(clean, clean) == 0).all()


def test_token_changes_count_experts_over_all_layers(clean: RoutedPrompts, corrupted: RoutedPrompts) -> None:
    changes = token_changes(clean, corrupted)
    for t, found in enumerate(changes.tolist()):
        pairs = zip(clean.selected_TLK[t].tolist(), corrupted.selected_TLK[t].tolist(), strict=True)
        assert found == sum(K - len(set(a) & set(b)) for a, b in pairs)


def test_figures_of_no_token_are_not_defined(clean: RoutedPrompts) -> None:
    text_only = RoutedPrompts(**{**clean.arrays(), "is_image_T": np.zeros_like(clean.is_image_T)})
    figures = drift_figures(drift_sums(text_only, text_only))
    for name, values in figures.items():
        assert np.isnan(values[..., 0]).all(), name
        assert not np.isnan(values[..., 1]).any(), name


def test_prompts_of_other_length_or_with_the_picture_elsewhere_are_not_compared(clean: RoutedPrompts) -> None:
    other = prompts(3, (7, 5, 9))
    moved = other.is_image_T.copy()
    moved[-9:] = np.roll(moved[-9:], 1)
    other = RoutedPrompts(**{**other.arrays(), "is_image_T": moved})
    assert misaligned(clean, other) == [
        None,
        "4 tokens clean, 5 corrupted",
        "the pictures stand at other positions",
    ]


def test_taking_items_takes_their_tokens(clean: RoutedPrompts) -> None:
    taken = clean.take([2, 0])
    assert taken.lengths.tolist() == [9, 7]
    for name, array in clean.arrays().items():
        if name != "lengths":
            expected = np.concatenate([array[sum(LENGTHS[:2]) :], array[: LENGTHS[0]]])
            np.testing.assert_array_equal(taken.arrays()[name], expected)
            assert taken.arrays()[name].dtype == array.dtype


def test_intervals_are_those_of_resampled_images(clean: RoutedPrompts, corrupted: RoutedPrompts) -> None:
    """Against resamples put together by hand: items of an image stand together or not at all."""
    sums = drift_sums(clean, corrupted)
    images, universe = ["b", "a", "b"], ["a", "b", "c"]
    found = resampled_figures(sums, images, universe, seed=3, n_resamples=40)
    weights_RG = np.concatenate(list(bootstrap_weights(3, seed=3, n_resamples=40)))
    for r, weights in enumerate(weights_RG):
        times = np.array([weights[universe.index(image)] for image in images])
        total = {name: np.tensordot(times, array.astype(float), axes=1) for name, array in sums.items()}
        for name, expected in drift_figures(total).items():
            # Kept in fp32.
            np.testing.assert_allclose(found.replicates[name][r, 1:], expected, rtol=1e-5, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(
                found.replicates[name][r, 0], expected.mean(0), rtol=1e-5, atol=1e-6, err_msg=name
            )
    written = figures_json(found, ["0", "1", "2"])
    number = written["1"]["image"]["fluctuation"]
    total = drift_figures({name: array.sum(0) for name, array in sums.items()})
    assert number["value"] == pytest.approx(total["fluctuation"][1, 0])
    replicates = found.replicates["fluctuation"][:, 2, 0]
    defined = replicates[~np.isnan(replicates)]
    assert number["ci_low"] == pytest.approx(np.quantile(defined, 0.025), rel=1e-5)
    assert written["all"]["text"]["kappa"]["value"] == pytest.approx(total["kappa"][:, 1].mean())
