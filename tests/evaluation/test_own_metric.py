"""MME's sums have intervals and tests of their own: against loops over images, and in a report of two models."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from symphony_vlm.evaluation.compare_report import write_comparison
from symphony_vlm.evaluation.item import Outcome
from symphony_vlm.evaluation.metrics import metric_values
from symphony_vlm.evaluation.own_metric import OwnMetric, own_quantities, swap_tests
from symphony_vlm.evaluation.quantities import Resampling
from symphony_vlm.evaluation.statistics import bootstrap_weights
from symphony_vlm.evaluation.task import get_task

SUBTASKS = ("count", "existence")
PER_SUBTASK = 6
CELLS = [("none", 0), ("fog", 3), ("snow", 5)]
COST = {"none": 0.0, "fog": 0.2, "snow": 0.4}
TASK = get_task("mme")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mme")
    for subtask in SUBTASKS:
        lines = [
            f"{number}.jpg\tIs it {word}? Please answer yes or no.\t{answer}\n"
            for number in range(PER_SUBTASK)
            for word, answer in (("dark", "Yes"), ("light", "No"))
        ]
        (folder / f"{subtask}.txt").write_text("".join(lines))
    return folder


def answers(data: Path, *, model: int, robust: float) -> dict[tuple[str, int], list[Outcome]]:
    rng = np.random.default_rng(model)
    found: dict[tuple[str, int], list[Outcome]] = {}
    for cell in CELLS:
        outcomes = []
        for item in TASK.load(data, None, data, 0):
            right = rng.random() < 0.85 - COST[cell[0]] * (1 - robust)
            text = item.answers[0] if right else {"yes": "No", "no": "Yes"}[item.answers[0].lower()]
            outcomes.append(Outcome(item=item, prediction=text, scored=TASK.score(text, item)))
        found[cell] = outcomes
    return found


def own(found: dict[tuple[str, int], list[Outcome]]) -> OwnMetric:
    by_item = {cell: {o.item.id: o for o in outcomes} for cell, outcomes in found.items()}
    return OwnMetric(name="perception", metrics=TASK.metrics, outcomes=by_item)


def images(outcomes: Sequence[Outcome]) -> list[str]:
    return sorted({outcome.item.image_key for outcome in outcomes})


def perception(outcomes: Sequence[Outcome], weights: dict[str, float]) -> float:
    """The sum of 100 accuracy + 100 accuracy+ of the subtasks, by a loop over weighted images; a share of 2,000."""
    total = 0.0
    for subtask in SUBTASKS:
        mine = [o for o in outcomes if o.item.group == subtask]
        keys = images(mine)
        n = sum(weights[key] for key in keys)
        if n == 0:
            return float("nan")
        right = {key: [o.scored.score for o in mine if o.item.image_key == key] for key in keys}
        total += 100 * sum(weights[k] * sum(right[k]) for k in keys) / (2 * n)
        total += 100 * sum(weights[k] * (min(right[k]) == 1) for k in keys) / n
    return total / 2000


def test_replicates_equal_a_loop(data: Path) -> None:
    a, b = answers(data, model=1, robust=0.0), answers(data, model=2, robust=0.8)
    drawn = own_quantities([own(a), own(b)], CELLS, Resampling(seed=4, n_resamples=60, interval="bca"))
    keys = images(a[CELLS[0]])
    [weights_RG] = list(bootstrap_weights(len(keys), seed=4, n_resamples=60))
    for found, quantities in zip((a, b), drawn, strict=True):
        for cell in CELLS:
            quantity = quantities[cell]
            assert quantity.value == pytest.approx(perception(found[cell], dict.fromkeys(keys, 1.0)))
            assert quantity.value == pytest.approx(
                metric_values(TASK.metrics(found[cell]), found[cell])["perception"] / 2000
            )  # type: ignore[operator]
            loop = [perception(found[cell], dict(zip(keys, row, strict=True))) for row in weights_RG]
            np.testing.assert_allclose(quantity.replicates, loop, rtol=1e-12)
            left = [perception(found[cell], {k: float(k != gone) for k in keys}) for gone in keys]
            np.testing.assert_allclose(quantity.left_out, left, rtol=1e-12)


def test_swaps_agree_with_all_of_them(data: Path) -> None:
    """2^12 label patterns, each figure recomputed; 4,000 random ones differ by at most four standard errors."""
    a, b = answers(data, model=1, robust=0.0), answers(data, model=2, robust=0.8)
    keys = images(a[CELLS[0]])
    found = swap_tests(own(a), own(b), CELLS, CELLS[1:], Resampling(seed=0, n_draws=4000))

    def sums(outcomes: Sequence[Outcome]) -> dict[str, Any]:
        model = OwnMetric(
            name="perception", metrics=TASK.metrics, outcomes={CELLS[0]: {o.item.id: o for o in outcomes}}
        )
        return model.image_sums([CELLS[0]])

    per_cell = [(sums(a[cell]), sums(b[cell])) for cell in CELLS]
    combine = own(a).metric().combine
    patterns = np.array(list(itertools.product((0.0, 1.0), repeat=len(keys))))
    differences = []
    for first, second in per_cell:
        one, two = (np.stack([side[key][0] for key in keys]) for side in (first, second))
        mixed_a = (1 - patterns) @ one + patterns @ two
        mixed_b = patterns @ one + (1 - patterns) @ two
        differences.append((combine(mixed_b) - combine(mixed_a)) / 2000)
    dids = [difference - differences[0] for difference in differences[1:]]
    statistics = {"clean": differences[0], "primary": np.mean(dids, axis=0), **dict(zip(CELLS[1:], dids, strict=True))}
    got = {"clean": found.clean, "primary": found.primary, **found.did}
    for name, values in statistics.items():
        exact = float((np.abs(values) >= abs(values[0]) - 1e-9).mean())
        p = got[name]  # type: ignore[index]
        assert p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5 + 1e-3), name


def test_swaps_of_equal_models(data: Path) -> None:
    same = own(answers(data, model=1, robust=0.5))
    found = swap_tests(same, same, CELLS, CELLS[1:], Resampling(n_draws=50))
    assert (found.clean, found.primary, *found.did.values()) == (1.0, 1.0, 1.0, 1.0)


def write_evaluation(folder: Path, data: Path, router: str, found: dict[tuple[str, int], list[Outcome]]) -> Path:
    (folder / "predictions").mkdir(parents=True)
    rows = []
    for (corruption, severity), outcomes in found.items():
        records = [
            {
                "item_id": o.item.id,
                "task": "mme",
                "split": "test",
                "image_key": o.item.image_key,
                "image_sha256": o.item.image_key,
                "pixels_sha256": f"{o.item.image_key}{corruption}{severity}",
                "corruption": corruption,
                "severity": severity,
                "question": o.item.question,
                "prediction": o.prediction,
                "answer": o.item.answers[0],
                "parsed": o.scored.parsed,
                "parse_status": o.scored.status,
                "score": o.scored.score,
                "error": None,
            }
            for o in outcomes
        ]
        path = folder / f"predictions/mme.{corruption}.{severity}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        value = metric_values(TASK.metrics(outcomes), outcomes)["perception"]
        assert value is not None
        rows.append(
            {"model": f"runs/{router}", "router": router, "task": "mme", "split": "test", "corruption": corruption}
            | {"severity": severity, "metric": "perception", "value": value, "ci_low": value - 20, "scale": 2000}
            | {"ci_high": value + 20, "higher_is_better": True, "n_items": len(outcomes), "n_images": 12}
        )
    document = {"results": rows, "provenance": {"data": str(data)}}
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "manifest.json").write_text(json.dumps({"seed": 0, "task": ["mme"]}))
    return folder


def test_a_comparison_of_sums_has_intervals_and_says_what_they_are(data: Path, tmp_path: Path) -> None:
    pair = [
        write_evaluation(tmp_path / name, data, name, answers(data, model=k, robust=robust))
        for k, (name, robust) in enumerate((("smoe", 0.0), ("symphony_smoe", 0.9)))
    ]
    options = Resampling(n_resamples=200, n_draws=500)
    written = write_comparison(*pair, tmp_path / "out", resampling=options)
    found = json.loads(written.json.read_text())
    [comparison] = found["comparisons"]
    assert comparison["n_items"] == 24
    for number in (comparison["clean_difference"], comparison["primary"], *(c["did"] for c in comparison["cells"])):
        assert number["ci_low"] <= number["value"] <= number["ci_high"]
    assert 0 < comparison["primary"]["p"] <= 1
    for cell in comparison["cells"]:
        assert cell["p"] <= cell["p_holm"]
        assert cell["n_paired"] == 24  # of items: what McNemar counts
    for model in found["models"]:
        assert model["retention"]["ci_low"] < model["retention"]["value"]
        assert model["flips"]["right_to_wrong"]["value"] > 0
    page = written.html.read_text()
    clean = found["models"][0]["clean"]["value"]
    assert f"{100 * clean:.1f}" in re.sub(r"<[^>]*>", "", page)
    assert "Clean perception, % of the best" in page
    # The curves keep the benchmark's own scale, also at severity 0.
    assert f"smoe: {2000 * clean:.3g}, " in page[page.index('id="severity"') :]


def test_without_the_data_there_is_no_interval_and_the_reason(data: Path, tmp_path: Path) -> None:
    pair = [
        write_evaluation(tmp_path / name, tmp_path / "gone", name, answers(data, model=k, robust=0.5))
        for k, name in enumerate(("smoe", "symphony_smoe"))
    ]
    written = write_comparison(*pair, tmp_path / "out", resampling=Resampling(n_resamples=50, n_draws=50))
    [comparison] = json.loads(written.json.read_text())["comparisons"]
    assert comparison["primary"]["ci_low"] is None
    assert "is not the mean of the item scores" in comparison["primary"]["reason"]
    assert "(see --data)" in written.html.read_text()
