"""Simulated studies with known truth: what intervals cover, and how often tests reject where there is nothing.

Worlds are the columns of one matrix, so that the library's own functions run on hundreds of them at a time. Each fast
test is a small version of the slow one below it, with bounds as wide as its number of worlds asks for.
`python -m pytest tests/evaluation/test_statistics_simulations.py -m slow -s` prints the figures of docs/statistics.md.

Shape letters: G images, Q questions of an image, W worlds, C cells (corruption x severity).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy import stats

from symphony_vlm.evaluation import statistics as st
from symphony_vlm.evaluation.quantities import Quantity, Resampling, column_means, difference, ratio

Floats = st.Floats
Drawn = tuple[Quantity, Quantity, Quantity, Quantity]
"""One world: clean and corrupted scores of model A, then of model B."""

CELLS = 75
BLOCK = 250
"""Worlds that share bootstrap weights."""
CLEAN, LOSS_A, LOSS_B = 0.7, 0.25, 0.15
"""Right on clean pictures (both models), what corruption costs A and B."""


def sigma(share: float, n: int) -> float:
    """Standard error of a share of n worlds."""
    return math.sqrt(share * (1 - share) / n)


def say(text: str) -> None:
    """A figure for docs/statistics.md; seen with -s."""
    sys.stdout.write(f"{text}\n")


def within(share: float, low: float, high: float, n: int) -> bool:
    """The bounds, widened by three standard errors of the simulation."""
    return low - 3 * sigma(low, n) <= share <= high + 3 * sigma(high, n)


def scores(rng: np.random.Generator, chance_GW: Floats, per_image: int) -> Floats:
    """0 or 1 for every question ``[G * Q, W]``; questions of an image share its chance."""
    drawn = rng.random((chance_GW.shape[0], per_image, chance_GW.shape[1])) < chance_GW[:, None]
    return drawn.reshape(-1, chance_GW.shape[1]).astype(np.float64)


def names(n_images: int, per_image: int) -> list[str]:
    return [f"{image:04d}" for image in range(n_images) for _ in range(per_image)]


def images(rng: np.random.Generator, n_images: int, n_worlds: int, share: float) -> Floats:
    """Chance of a right answer by image, beta distributed with that mean: an intra-image correlation of 0.2."""
    return rng.beta(4 * share, 4 * (1 - share), (n_images, n_worlds))


def study(rng: np.random.Generator, n_images: int, per_image: int, n_worlds: int) -> list[Floats]:
    """Scores of A clean, A corrupted, B clean, B corrupted, ``[G * Q, W]`` each; images are hard for both models."""
    hard_GW = images(rng, n_images, n_worlds, CLEAN)
    means = (CLEAN, CLEAN - LOSS_A, CLEAN, CLEAN - LOSS_B)
    return [scores(rng, hard_GW * mean / CLEAN, per_image) for mean in means]


def coverage(
    figure: Callable[[Drawn], Quantity],
    truth: float,
    *,
    n_worlds: int,
    n_images: int = 100,
    per_image: int = 4,
    n_resamples: int = 1000,
    kind: str = "percentile",
    seed: int = 0,
) -> float:
    """Share of worlds whose 95 % interval of ``figure`` holds the truth."""
    rng = np.random.default_rng(seed)
    covered = 0
    for block in range(n_worlds // BLOCK):
        options = Resampling(seed=1000 * seed + block, n_resamples=n_resamples, interval=kind)  # type: ignore[arg-type]
        parts = study(rng, n_images, per_image, BLOCK)
        columns = [column_means(part, names(n_images, per_image), options) for part in parts]
        for drawn in zip(*columns, strict=True):
            interval = figure(drawn).to_json()
            low, high = interval["ci_low"], interval["ci_high"]
            assert isinstance(low, float)
            assert isinstance(high, float)
            # A truth on the very edge of a discrete statistic is covered; sums differ in the last bits.
            covered += low - 1e-9 <= truth <= high + 1e-9
    return covered / (n_worlds // BLOCK * BLOCK)


def mean_score(drawn: Drawn) -> Quantity:
    return drawn[1]


def retention(drawn: Drawn) -> Quantity:
    return ratio(drawn[1], drawn[0], name="clean score")


def paired(drawn: Drawn) -> Quantity:
    return difference(drawn[1], drawn[3])


def did(drawn: Drawn) -> Quantity:
    return difference(difference(drawn[0], drawn[1]), difference(drawn[2], drawn[3]))


FIGURES: dict[str, tuple[Callable[[Drawn], Quantity], float]] = {
    "mean score": (mean_score, CLEAN - LOSS_A),
    "retention (ratio)": (retention, (CLEAN - LOSS_A) / CLEAN),
    "paired difference": (paired, LOSS_A - LOSS_B),
    "difference in differences": (did, LOSS_A - LOSS_B),
}


def wilson_coverage(n: int, chance: float) -> float:
    """Exact, not simulated: the probability of all numbers of right answers whose interval holds the truth."""
    right = np.arange(n + 1)
    intervals = [st.wilson_interval(int(k), n) for k in right]
    holds = np.array([interval.low <= chance <= interval.high for interval in intervals])
    return float(stats.binom.pmf(right, n, chance)[holds].sum())


def wilson_mean_coverage(n: int) -> float:
    """Averaged over chances of 5 to 95 %: for a single one it jumps with every possible number of right answers."""
    return float(np.mean([wilson_coverage(n, chance) for chance in np.linspace(0.05, 0.95, 181)]))


@cache
def mcnemar(b: int, c: int) -> float:
    return st.mcnemar(b, c)


def corrupted_cells(
    rng: np.random.Generator, n_images: int, per_image: int, *, correlated: float
) -> tuple[Floats, Floats]:
    """Scores of one world's clean cell ``[G * Q]`` and of cells in which nothing has changed ``[G * Q, C]``.

    Args:
        rng: Draws the world.
        n_images: G.
        per_image: Q.
        correlated: How far a cell moves all questions of an image together, in either direction alike; 0: questions
            change by themselves, and then every assumption of McNemar's test holds.
    """
    hard_G1 = images(rng, n_images, 1, CLEAN)
    clean = scores(rng, hard_G1, per_image)[:, 0]
    moved_GC = np.clip(hard_G1 + correlated * rng.standard_normal((n_images, CELLS)), 0, 1)
    if not correlated:
        return clean, scores(rng, moved_GC, per_image)
    # The clean cell moves like all others, or the cells would differ from it.
    moved_G1 = np.clip(hard_G1 + correlated * rng.standard_normal((n_images, 1)), 0, 1)
    return scores(rng, moved_G1, per_image)[:, 0], scores(rng, moved_GC, per_image)


def family_wise_errors(n_worlds: int, *, per_image: int, correlated: float, sign_flips: int = 0) -> dict[str, float]:
    """Share of worlds in which a test with Holm's correction rejects one of 75 true hypotheses."""
    rng = np.random.default_rng(11)
    n_images = 100
    rejected = {"McNemar + Holm": 0, "McNemar alone": 0, "sign flips + Holm": 0}
    for world in range(n_worlds):
        clean, bad = corrupted_cells(rng, n_images, per_image, correlated=correlated)
        lost = ((clean[:, None] == 1) & (bad == 0)).sum(0)
        gained = ((clean[:, None] == 0) & (bad == 1)).sum(0)
        p = [mcnemar(int(b), int(c)) for b, c in zip(lost, gained, strict=True)]
        rejected["McNemar + Holm"] += min(st.holm(p)) < 0.05
        rejected["McNemar alone"] += min(p) < 0.05
        if sign_flips:
            changes = bad - clean[:, None]
            p = st.sign_flip_tests(changes, names(n_images, per_image), seed=world, n_draws=sign_flips)
            rejected["sign flips + Holm"] += min(st.holm(p)) < 0.05
    return {name: count / n_worlds for name, count in rejected.items() if sign_flips or "flips" not in name}


def did_rejections(n_worlds: int, *, effect: float, n_draws: int) -> tuple[float, float]:
    """Mean estimate and share of p < 0.05 of the difference in differences of models that differ by ``effect``."""
    rng = np.random.default_rng(5)
    n_images, per_image = 100, 4
    hard_GW = images(rng, n_images, n_worlds, CLEAN)
    # As B loses less by `effect` from an equal clean score; of effect 0 the labels A and B mean nothing.
    means = (CLEAN, CLEAN - LOSS_A, CLEAN, CLEAN - LOSS_A + effect)
    a0, a1, b0, b1 = (scores(rng, hard_GW * mean / CLEAN, per_image) for mean in means)
    drops = (b1 - b0) - (a1 - a0)
    p = st.sign_flip_tests(drops, names(n_images, per_image), seed=3, n_draws=n_draws)
    return float(drops.mean()), float((np.array(p) < 0.05).mean())


def test_wilson_covers() -> None:
    assert 0.93 <= wilson_mean_coverage(50) <= 0.97


@pytest.mark.parametrize("figure", FIGURES)
def test_bootstrap_covers(figure: str) -> None:
    share = coverage(*FIGURES[figure], n_worlds=BLOCK, n_resamples=400)
    assert within(share, 0.93, 0.97, BLOCK)


def test_bca_covers() -> None:
    share = coverage(*FIGURES["retention (ratio)"], n_worlds=BLOCK, n_resamples=400, kind="bca")
    assert within(share, 0.93, 0.97, BLOCK)


def test_intervals_that_ignore_images_do_not_cover() -> None:
    """The simulation can fail: Wilson's interval takes the four questions of an image for independent."""
    rng = np.random.default_rng(0)
    right = study(rng, 100, 4, 1000)[1].sum(0).astype(int)
    intervals = [st.wilson_interval(int(k), 400) for k in right]
    assert np.mean([i.low <= CLEAN - LOSS_A <= i.high for i in intervals]) < 0.93


def test_family_wise_error() -> None:
    n_worlds = 150
    for name, share in family_wise_errors(n_worlds, per_image=1, correlated=0.0).items():
        if "Holm" in name:
            assert within(share, 0.0, 0.06, n_worlds)
        else:
            assert share > 0.2  # what the correction is for


def test_difference_in_differences_finds_what_was_planted() -> None:
    estimate, power = did_rejections(200, effect=0.1, n_draws=1000)
    assert estimate == pytest.approx(0.1, abs=0.01)
    assert power > 0.4
    estimate, errors = did_rejections(200, effect=0.0, n_draws=1000)
    assert estimate == pytest.approx(0, abs=0.01)
    assert within(errors, 0.0, 0.05, 200)


@pytest.mark.slow
def test_wilson_covers_at_all_sizes() -> None:
    for n in (20, 50, 200, 1000):
        share = wilson_mean_coverage(n)
        say(f"Wilson, n = {n}: {100 * share:.1f} %")
        assert 0.93 <= share <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["percentile", "bca"])
@pytest.mark.parametrize("figure", FIGURES)
def test_bootstrap_covers_in_many_worlds(figure: str, kind: str) -> None:
    for n_images in (50, 100, 400):
        share = coverage(*FIGURES[figure], n_worlds=2000, n_images=n_images, kind=kind)
        say(f"{figure}, {kind}, {n_images} images of 4 questions: {100 * share:.1f} %")
        assert 0.93 <= share <= 0.97


@pytest.mark.slow
def test_family_wise_error_in_2000_worlds() -> None:
    independent = family_wise_errors(2000, per_image=1, correlated=0.0, sign_flips=4000)
    clustered = family_wise_errors(2000, per_image=6, correlated=0.25, sign_flips=4000)
    for title, shares in (("1 question an image", independent), ("6 questions, correlated", clustered)):
        for name, share in shares.items():
            say(f"{title}, {name}: at least one false rejection in {100 * share:.1f} %")
    assert independent["McNemar + Holm"] <= 0.06
    assert independent["sign flips + Holm"] <= 0.06
    assert clustered["sign flips + Holm"] <= 0.06


@pytest.mark.slow
def test_difference_in_differences_in_2000_worlds() -> None:
    for effect in (0.0, 0.05, 0.1):
        estimate, share = did_rejections(2000, effect=effect, n_draws=4000)
        say(f"planted {effect:.2f}: found {estimate:.4f}, p < 0.05 in {100 * share:.1f} %")
        assert estimate == pytest.approx(effect, abs=0.003)
        assert effect or within(share, 0.04, 0.05, 2000)
