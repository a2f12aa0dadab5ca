"""Robustness figures against hand values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from symphony_vlm.corruptions.catalogue import COMMON
from symphony_vlm.evaluation.comparison import compare_models, mean_corruption_error, robustness_summary
from symphony_vlm.evaluation.quantities import Quantity, log_ratio, ratio, weighted_sum
from symphony_vlm.evaluation.robustness import (
    CLEAN,
    Cell,
    CellRecords,
    ModelScores,
    Resampling,
    model_robustness,
    severity_auc,
)
from symphony_vlm.evaluation.statistics import (
    bca_interval,
    difference_in_differences,
    left_out_means,
    mcnemar,
    paired_difference,
    resampled_means,
)

FAST = Resampling(seed=3, n_resamples=400, n_draws=2000)
N_IMAGES, PER_IMAGE = 25, 4


def _records(scores: np.ndarray, *, answers: list[str] | None = None, pixels: str = "p") -> CellRecords:
    items = tuple(f"{i // PER_IMAGE:03d}-{i % PER_IMAGE}" for i in range(len(scores)))
    given = answers or ["yes" if score == 1 else "no" for score in scores]
    return CellRecords(
        item_ids=items,
        images=tuple(item[:3] for item in items),
        scores=np.asarray(scores, dtype=float),
        answers=tuple(given),
        pixels=(pixels,) * len(scores),
    )


def _model(cells: Mapping[Cell, np.ndarray], *, label: str = "a", chance: float | None = None) -> ModelScores:
    values = {cell: float(np.nanmean(scores)) for cell, scores in cells.items()}
    records = {cell: _records(scores) for cell, scores in cells.items()}
    return ModelScores(
        label=label,
        model=f"runs/{label}",
        router=label,
        task="scenes",
        metric="accuracy",
        values=values,
        records=records,
        chance=chance,
    )


def _draw(seed: int, share: float) -> np.ndarray:
    return (np.random.default_rng(seed).random(N_IMAGES * PER_IMAGE) < share).astype(float)


def _grid(seed: int, *, loss: float = 0.08) -> dict[Cell, np.ndarray]:
    cells = {CLEAN: _draw(seed, 0.9)}
    for index, name in enumerate(("fog", "snow", "spatter")):
        cells |= {(name, s): _draw(seed + 10 * index + s, 0.9 - loss * s) for s in range(1, 6)}
    return cells


def _points(values: Mapping[Cell, float | None], label: str = "a") -> ModelScores:
    return ModelScores(label=label, model=label, router=label, task="t", metric="accuracy", values=values)


def test_means_retention_and_drop() -> None:
    cells = _grid(1)
    out: Any = model_robustness(_model(cells), FAST)
    corrupted = np.mean([scores.mean() for (name, _), scores in cells.items() if name in ("fog", "snow")])
    clean = cells[CLEAN].mean()
    assert out["corruptions"] == ["snow", "fog"]
    assert out["extra_corruptions"] == ["spatter"]
    assert not out["complete"]
    assert out["mean_corrupted"]["value"] == pytest.approx(corrupted)
    assert out["retention"]["value"] == pytest.approx(corrupted / clean)
    assert out["relative_drop"]["value"] == pytest.approx(1 - corrupted / clean)
    assert out["relative_drop"]["ci_low"] == pytest.approx(1 - out["retention"]["ci_high"])
    assert out["drop"]["value"] == pytest.approx(clean - corrupted)
    for key in ("clean", "mean_corrupted", "retention", "drop"):
        assert out[key]["ci_low"] < out[key]["value"] < out[key]["ci_high"]
    weather = [scores.mean() for (name, _), scores in cells.items() if name in ("fog", "snow")]
    assert out["families"]["weather"]["value"] == pytest.approx(np.mean(weather))


def test_retention_above_the_constant_answer() -> None:
    scores = {CLEAN: _draw(0, 0.9), ("fog", 1): _draw(1, 0.6)}
    out: Any = model_robustness(_model(scores, chance=0.5), FAST)
    clean, bad = scores[CLEAN].mean(), scores["fog", 1].mean()
    assert out["retention_above_chance"]["value"] == pytest.approx((bad - 0.5) / (clean - 0.5))
    low: Any = model_robustness(_model(scores, chance=0.99), FAST)
    assert low["retention_above_chance"]["value"] is None
    assert "not above" in low["retention_above_chance"]["reason"]


def test_severity_auc_by_hand() -> None:
    scores = dict(enumerate([0.9, 0.8, 0.7, 0.6, 0.4, 0.2]))
    expected = sum((scores[s - 1] + scores[s]) / 2 for s in range(1, 6)) / 5
    got = severity_auc({s: Quantity(value=v) for s, v in scores.items()})
    assert got.value == pytest.approx(expected)
    some = severity_auc({s: Quantity(value=scores[s]) for s in (0, 1, 3, 5)})
    assert some.value == pytest.approx(((0.9 + 0.8) / 2 + (0.8 + 0.6) + (0.6 + 0.2)) / 5)
    assert severity_auc({1: Quantity(value=0.5)}).value is None


def test_flips_by_hand() -> None:
    clean = np.array([1, 1, 1, 0, 0, 1, 1, 0], dtype=float)
    bad = np.array([0, 0, 1, 1, 0, 1, 0, 0], dtype=float)
    scores = _model({CLEAN: clean, ("fog", 2): bad})
    records = dict(scores.records)
    records[CLEAN] = _records(clean, answers=list("abcdefgh"))
    records["fog", 2] = _records(bad, answers=list("xbcdefgy"))
    values: Any = {**scores.__dict__, "records": records}
    out: Any = model_robustness(ModelScores(**values), FAST)
    cell = out["cells"][0]
    assert (cell["right_to_wrong"], cell["wrong_to_right"], cell["n_paired"]) == (3, 1, 8)
    assert cell["mcnemar_p"] == mcnemar(3, 1)
    flips = out["flips"]
    assert flips["flip_rate"]["value"] == pytest.approx(4 / 8)
    assert flips["right_to_wrong"]["value"] == pytest.approx(3 / 8)
    assert flips["lost_of_clean_right"]["value"] == pytest.approx(3 / 5)
    assert flips["answer_change_rate"]["value"] == pytest.approx(2 / 8)


def test_no_net_drop_with_many_flips_is_seen() -> None:
    clean, bad = np.tile([1.0, 0.0], 20), np.tile([0.0, 1.0], 20)
    out: Any = model_robustness(_model({CLEAN: clean, ("fog", 1): bad}), FAST)
    assert out["drop"]["value"] == pytest.approx(0)
    assert out["flips"]["flip_rate"]["value"] == pytest.approx(1)


def test_clean_score_of_zero_gives_null_with_a_reason() -> None:
    out: Any = model_robustness(_model({CLEAN: np.zeros(8), ("fog", 1): np.ones(8)}), FAST)
    assert out["retention"]["value"] is None
    assert out["retention"]["reason"] == "clean score is 0"
    assert out["flips"]["lost_of_clean_right"]["value"] is None


def test_without_predictions_there_are_values_and_reasons() -> None:
    out: Any = model_robustness(_points({CLEAN: 0.8, ("fog", 1): 0.6}), FAST)
    assert out["retention"]["value"] == pytest.approx(0.75)
    assert out["retention"]["ci_low"] is None
    assert "predictions" in out["retention"]["reason"]
    assert out["flips"]["value"] is None


def test_a_cell_without_a_score_makes_the_means_null() -> None:
    out: Any = model_robustness(_points({CLEAN: 0.8, ("fog", 1): None}), FAST)
    assert out["mean_corrupted"]["value"] is None
    assert "errors" in out["mean_corrupted"]["reason"]


def test_errors_are_left_out_or_wrong_as_the_results_say() -> None:
    scores = np.array([1.0, np.nan, 0.0, 1.0])
    for value in (2 / 3, 0.5):
        model = _model({CLEAN: np.ones(4), ("fog", 1): scores})
        changed: Any = {**model.__dict__, "values": {CLEAN: 1.0, ("fog", 1): value}}
        out: Any = model_robustness(ModelScores(**changed), FAST)
        assert out["mean_corrupted"]["value"] == pytest.approx(value)
        assert out["mean_corrupted"]["ci_low"] is not None
    changed = {**model.__dict__, "values": {CLEAN: 1.0, ("fog", 1): 0.9}}
    out = model_robustness(ModelScores(**changed), FAST)
    assert out["mean_corrupted"]["ci_low"] is None
    assert "not the mean" in out["mean_corrupted"]["reason"]


def test_corrupted_cells_of_fewer_items_use_the_clean_score_of_those_items() -> None:
    clean = np.concatenate([np.ones(20), np.zeros(20)])
    model = _model({CLEAN: clean, ("fog", 1): np.tile([1.0, 1.0, 1.0, 0.0], 5)})
    out: Any = model_robustness(model, FAST)
    assert (out["n_items"], out["n_clean_items"]) == (20, 40)
    assert out["clean"]["value"] == pytest.approx(1.0)
    assert out["retention"]["value"] == pytest.approx(0.75)
    other = _model({CLEAN: clean, ("fog", 1): np.ones(20)}, label="b")
    pair: Any = compare_models(model, other, FAST)
    assert pair["primary"]["value"] == pytest.approx(0.25)
    assert pair["n_items"] == 20
    assert pair["clean_difference"]["n_items"] == 40


def test_comparison_equals_the_plain_statistics() -> None:
    first, second = _grid(1), _grid(100, loss=0.04)
    a, b = _model(first), _model(second, label="b")
    out: Any = compare_models(a, b, FAST)
    images = list(a.records[CLEAN].images)
    options: Any = {"seed": FAST.seed, "n_resamples": FAST.n_resamples}
    clean = paired_difference(first[CLEAN], second[CLEAN], images, **options)
    got = out["clean_difference"]
    assert (got["value"], got["ci_low"], got["ci_high"]) == pytest.approx((clean.value, clean.low, clean.high))
    for cell in out["cells"]:
        key = (cell["corruption"], cell["severity"])
        did = difference_in_differences(first[CLEAN], first[key], second[CLEAN], second[key], images, **options)
        values = tuple(cell["did"][name] for name in ("value", "ci_low", "ci_high"))
        assert values == pytest.approx((did.value, did.low, did.high))
        assert cell["p"] <= cell["p_bh"] <= cell["p_holm"] + 1e-12
    common = [cell["did"]["value"] for cell in out["cells"] if cell["corruption"] in COMMON]
    assert out["primary"]["value"] == pytest.approx(np.mean(common))
    assert out["primary"]["name"].endswith("2 corruptions x 5 severities")
    means = [np.mean([s.mean() for (n, _), s in g.items() if n in COMMON]) for g in (first, second)]
    logs = math.log(means[1] / second[CLEAN].mean()) - math.log(means[0] / first[CLEAN].mean())
    assert out["primary"]["log_scale"]["value"] == pytest.approx(logs)


def test_equal_models_do_not_differ() -> None:
    out: Any = compare_models(_model(_grid(1)), _model(_grid(1), label="b"), FAST)
    assert out["primary"]["value"] == pytest.approx(0)
    assert out["primary"]["p"] == 1.0
    assert all(cell["p_holm"] == 1.0 for cell in out["cells"])
    assert out["mean_corruption_error"]["value"] == pytest.approx(100)


def test_only_items_in_common_are_compared() -> None:
    cells = {CLEAN: _draw(0, 0.8), ("fog", 1): _draw(1, 0.5)}
    fewer = {cell: scores[:40] for cell, scores in cells.items()}
    out: Any = compare_models(_model(cells), _model(fewer, label="b"), FAST)
    assert out["n_items"] == 40
    assert out["primary"]["value"] == pytest.approx(0)


def test_no_items_in_common() -> None:
    out: Any = compare_models(
        _model({CLEAN: np.ones(4), ("fog", 1): np.ones(4)}), _points({CLEAN: 0.5, ("fog", 1): 0.5}, "b"), FAST
    )
    assert out["n_items"] == 0
    assert out["primary"]["ci_low"] is None
    assert out["primary"]["p"] is None


def test_different_pixels_are_counted() -> None:
    a, b = _model({CLEAN: np.ones(4)}), _model({CLEAN: np.ones(4)}, label="b")
    other: Any = {**b.__dict__, "records": {CLEAN: _records(np.ones(4), pixels="q")}}
    assert compare_models(a, ModelScores(**other), FAST)["n_different_pixels"] == 4


def test_mean_corruption_error_by_hand() -> None:
    a = {CLEAN: 0.9, ("fog", 1): 0.8, ("fog", 2): 0.6, ("snow", 1): 0.7, ("snow", 2): 0.5}
    b = {CLEAN: 0.9, ("fog", 1): 0.85, ("fog", 2): 0.7, ("snow", 1): 0.7, ("snow", 2): 0.6}
    sides = [{cell: Quantity(value=value) for cell, value in side.items()} for side in (a, b)]
    out: Any = mean_corruption_error(*sides, baseline="a")
    assert out["value"] == pytest.approx(100 * (0.45 / 0.6 + 0.7 / 0.8) / 2)
    assert out["by_corruption"]["fog"]["value"] == pytest.approx(75)
    assert out["corruptions"] == ["snow", "fog"]
    assert "mCE" not in out["name"]
    assert "2 of the 15" in out["name"]
    relative: Any = mean_corruption_error(*sides, baseline="a", relative=True)
    assert relative["value"] == pytest.approx(100 * (0.25 / 0.4 + 0.5 / 0.6) / 2)


def test_mce_is_named_so_only_for_the_whole_grid() -> None:
    full = {cell: Quantity(value=0.5) for cell in itertools.product(COMMON, range(1, 6))} | {CLEAN: Quantity(value=0.8)}
    out: Any = mean_corruption_error(full, full, baseline="a")
    assert out["name"].startswith("mCE (15 corruptions")
    del full["fog", 3]
    assert "mCE" not in str(mean_corruption_error(full, full, baseline="a")["name"])


def test_undefined_corruption_errors_are_listed() -> None:
    a = {CLEAN: Quantity(value=0.9), ("fog", 1): Quantity(value=1.0), ("snow", 1): Quantity(value=0.5)}
    b = {cell: Quantity(value=0.5) for cell in a}
    out: Any = mean_corruption_error(a, b, baseline="a")
    assert out["value"] == pytest.approx(100)
    assert out["undefined"] == {"fog": "error of a under fog is 0"}
    relative: Any = mean_corruption_error(a, b, baseline="a", relative=True)
    assert "below 0.005" in relative["undefined"]["fog"]


def test_scores_beyond_one_have_no_corruption_error() -> None:
    sides = {CLEAN: Quantity(value=1500.0), ("fog", 1): Quantity(value=1200.0)}
    out: Any = mean_corruption_error(sides, sides, baseline="a")
    assert out["value"] is None
    assert "scale" in out["reason"]


def test_summary_names_the_baseline() -> None:
    out: Any = robustness_summary([_model(_grid(1)), _model(_grid(50), label="b")], FAST)
    assert [m["mean_corruption_error"]["baseline"] for m in out["models"]] == ["a", "a"]
    assert out["models"][0]["mean_corruption_error"]["value"] == 100
    assert [(c["baseline"], c["model"]) for c in out["comparisons"]] == [("a", "b")]


def test_ratios_and_their_reasons() -> None:
    near_zero = Quantity(value=0.1, replicates=np.linspace(-0.1, 0.3, 100))
    over = ratio(Quantity(value=0.2, replicates=np.ones(100)), near_zero, name="clean score")
    assert over.value == pytest.approx(2)
    assert over.replicates is None
    assert "contains 0" in (over.reason or "")
    assert log_ratio(Quantity(value=0.0), Quantity(value=1.0), name="x").value is None
    assert weighted_sum([], []).to_json()["reason"] == "nothing to average"


def test_bca_on_request_goes_through_ratios_and_differences() -> None:
    """Every figure, a ratio among them, has the interval that its own replicates and left-out values give."""
    model = _model(_grid(1))
    asked = Resampling(seed=3, n_resamples=400, n_draws=200, interval="bca")
    percentile: Any = model_robustness(model, FAST)
    bca: Any = model_robustness(model, asked)
    for key in ("clean", "mean_corrupted", "drop", "retention"):
        assert bca[key]["value"] == percentile[key]["value"]
        assert bca[key]["ci_low"] < bca[key]["value"] < bca[key]["ci_high"]
    cells = [CLEAN, ("fog", 5)]
    scores = np.stack([model.records[cell].scores for cell in cells], axis=1)
    images = list(model.records[CLEAN].images)
    _, drawn = resampled_means(scores, images, seed=3, n_resamples=400)
    left = left_out_means(scores, images)
    by_hand = bca_interval(
        scores[:, 1].mean() / scores[:, 0].mean(), drawn[:, 1] / drawn[:, 0], left[:, 1] / left[:, 0]
    )
    assert by_hand is not None
    got = next(cell["retention"] for cell in bca["cells"] if (cell["corruption"], cell["severity"]) == ("fog", 5))
    assert (got["ci_low"], got["ci_high"]) == pytest.approx((by_hand.low, by_hand.high))
    pair: Any = compare_models(model, _model(_grid(100), label="b"), asked)
    assert pair["primary"]["ci_low"] < pair["primary"]["value"] < pair["primary"]["ci_high"]
    assert pair["primary"]["log_scale"]["ci_low"] is not None


def test_log_scale_of_every_cell_by_hand() -> None:
    first, second = _grid(1), _grid(100, loss=0.04)
    out: Any = compare_models(_model(first), _model(second, label="b"), FAST)
    for cell in out["cells"]:
        key = (cell["corruption"], cell["severity"])
        expected = math.log(second[key].mean() / second[CLEAN].mean()) - math.log(
            first[key].mean() / first[CLEAN].mean()
        )
        assert cell["did_log"]["value"] == pytest.approx(expected)


def test_single_runs_have_no_interval_over_seeds() -> None:
    out: Any = robustness_summary([_model(_grid(1)), _model(_grid(50), label="b")], FAST)
    assert out["seeds"] == []


def test_records_without_status_or_lenient_score_say_so() -> None:
    out: Any = model_robustness(_model(_grid(1)), FAST)
    assert out["format"]["unparsed_rate"]["value"] is None
    assert "do not say" in out["format"]["unparsed_rate"]["reason"]
    assert "no lenient rule" in out["format"]["format_loss"]["reason"]


def test_partial_credit_has_no_mcnemar() -> None:
    half = np.array([0.3, 1.0, 0.6, 0.0] * 5)
    out: Any = model_robustness(_model({CLEAN: half, ("fog", 1): half[::-1].copy()}), FAST)
    assert out["cells"][0]["mcnemar_p"] is None
    assert out["cells"][0]["mcnemar_p_holm"] is None
    assert out["cells"][0]["sign_flip_p"] is not None
