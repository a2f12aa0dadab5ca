"""Statistics over seeds and clusters, and that the tables say what the cells hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cells import (
    finish,
    picture_study,
    small_study,
    write_drift,
    write_lines,
    write_predictions,
    write_routing,
)

from symphony_vlm.errors import InputError
from symphony_vlm.study.configuration import Study
from symphony_vlm.study.figures import mean_over_logs
from symphony_vlm.study.language import LanguageSetting
from symphony_vlm.study.pictures import PictureSetting
from symphony_vlm.study.results import write_results
from symphony_vlm.study.routing_facts import concentration, final_routing, off_diagonal_mass
from symphony_vlm.study.selection import arms_to_test, choose
from symphony_vlm.study.setting import Part, Setting
from symphony_vlm.study.statistics import compare_arms, mean_over_seeds, ratio_over_seeds
from symphony_vlm.study.tables import scores_of


def test_means_and_differences_are_of_sums_and_intervals_cover_them() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 50, 40).astype(float)
    base = words * 5 + rng.normal(0, 3, (5, 40))
    arm = base - 0.1 * words + rng.normal(0, 0.5, (5, 40))
    found = mean_over_seeds(base, words)
    assert found.value == pytest.approx(base.sum() / 5 / words.sum()) and found.low < found.value < found.high
    compared = compare_arms(base, arm, words)
    assert compared.interval.high < 0 and compared.p_seeds is not None and compared.p_seeds < 0.001
    assert compared.interval.value == pytest.approx((arm - base).sum() / 5 / words.sum())
    same = compare_arms(base, base, words)
    assert (same.interval.value, same.p_seeds, same.p_data) == (0, 1.0, 1.0)
    assert compare_arms(base[:1], arm[:1], words).p_seeds is None
    # Two seeds that gain exactly the same are no proof: a spread of 0 would give p = 0.
    twice = np.stack([base[0], base[0]])
    assert compare_arms(twice, twice - 0.3, words).p_seeds is None


def test_intervals_of_the_mean_over_seeds_and_text_hold_their_level() -> None:
    """Both seeds and text vary; 95 % intervals of 200 draws cover the truth in about 95 %, three deviations: 4.6 %.

    A bootstrap of few seeds is a little short (a factor of sqrt(7/8) with 8), so the lower bound is wider.
    """
    rng = np.random.default_rng(1)
    words = np.full(60, 10.0)
    covered = 0
    for _ in range(200):
        nats = 50 + rng.normal(0, 5, (1, 60)) + rng.normal(0, 2, (8, 1)) + rng.normal(0, 3, (8, 60))
        found = mean_over_seeds(nats, words, seed=int(rng.integers(1 << 30)))
        covered += found.low <= 5.0 <= found.high
    assert 0.86 <= covered / 200 <= 0.99


def test_a_ratio_is_of_means_its_interval_is_paired_and_it_may_not_exist() -> None:
    rng = np.random.default_rng(0)
    asked = np.full(50, 8.0)
    clean = rng.integers(3, 9, (4, 50)).astype(float)
    found = ratio_over_seeds(0.5 * clean, asked, clean, asked)
    # Every resample halves the same number: nothing is left to vary but the last bits.
    assert found is not None and (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)
    assert ratio_over_seeds(clean, asked, 0 * clean, asked) is None


def test_graphs_facts() -> None:
    even = np.full((4, 4), 0.1)
    np.fill_diagonal(even, 0.7)
    assert off_diagonal_mass(even) == pytest.approx(0.3) and concentration(even) == pytest.approx(0)
    one = np.eye(4)
    one[0, 1] = 0.4
    assert off_diagonal_mass(one) == pytest.approx(0.1) and concentration(one) == pytest.approx(1)
    assert off_diagonal_mass(np.eye(4)) == concentration(np.eye(4)) == concentration(np.eye(1)) == 0


def test_a_step_that_one_seed_alone_recorded_bends_no_curve() -> None:
    logs = [[{"step": 10, "x": 1.0}, {"step": 20, "x": 2.0}], [{"step": 10, "x": 3.0}, {"step": 17, "x": 9.0}]]
    logs[1].append({"step": 20, "x": 6.0})
    assert mean_over_logs(logs, lambda entry: entry["x"]) == ([10, 20], [2.0, 4.0])


def test_facts_of_routing_are_those_of_the_last_record(tmp_path: Path) -> None:
    write_routing(tmp_path / "a", [[0.5, 0.5], [0.0, 1.0]])
    write_routing(tmp_path / "b")
    facts = final_routing([tmp_path / "a", tmp_path / "b", tmp_path / "dense"])
    assert (facts["experts"], facts["dead_experts"], facts["load_cv"], facts["off_diagonal_mass"]) == (4, 2, 1, 0.25)
    assert set(final_routing([tmp_path / "dense"]).values()) == {None}


# Tables of finished cells.


def finish_language(
    study: Study, output: Path, nats: dict[tuple[str, int], float], part: Part = "test"
) -> LanguageSetting:
    """Finished cells with known costs."""
    setting = LanguageSetting(study, output)
    for (arm, seed), value in nats.items():
        name = f"wiki/{arm}/seed{seed}"
        for job in setting.jobs(part, [arm]):
            if job.name in (name, f"{name}/test"):
                finish(job)
                write_lines(job.folder / ("perplexity" if part == "test" else "development"), value)
                write_routing(job.folder / "run")
    return setting


def results(setting: Setting, output: Path, **scores: Any) -> tuple[dict[str, Any], str]:
    found = scores or {"test": scores_of(setting, "test", list(setting.study.arms))}
    page = write_results(
        setting, found, scores.pop("chosen", []), output, command="study small", n_jobs=(3, 4), provenance={"git": None}
    )
    return json.loads((output / "results.json").read_text()), page.read_text()


def test_the_tables_say_what_language_cells_hold(tmp_path: Path) -> None:
    nats = {("smoe", 0): 5.0, ("smoe", 1): 5.2, ("symphony", 0): 4.9, ("symphony", 1): 5.05}
    document, page = results(finish_language(small_study(), tmp_path, nats), tmp_path)
    smoe = document["arms"][0]
    assert smoe["values"]["clean"]["value"] == pytest.approx(np.exp(5.1))
    assert smoe["values"]["clean"]["per_seed"] == pytest.approx([np.exp(5.0), np.exp(5.2)])
    assert smoe["routing"]["dead_experts"] == 2 and smoe["routing"]["experts"] == 4
    rows = {row["condition"]: row for row in document["comparisons"]}
    assert rows["clean"]["difference"]["value"] == pytest.approx(-0.125)
    # Both lose 0.5 nats by the attack.
    assert rows["change by word_swap@0.1"]["difference"]["value"] == pytest.approx(0, abs=1e-12)
    assert rows["clean"]["p_holm"] >= rows["clean"]["p_seeds"] > 0
    assert "| symphony | smoe | clean | -0.1250 [" in page and "| smoe | 2 | 164.02 [" in page
    assert "3 of 4 jobs are done" in page and "![wiki_curves](wiki_curves.png)" in page
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"wiki_curves.png", "wiki_differences.png", "wiki_routing.png"}


def test_an_unfinished_seed_is_left_out_of_the_comparison(tmp_path: Path) -> None:
    nats = {("smoe", 0): 5.0, ("smoe", 1): 5.0, ("symphony", 0): 4.9}
    document, _ = results(finish_language(small_study(), tmp_path, nats), tmp_path)
    assert {row["n_seeds"] for row in document["comparisons"]} == {1}
    with pytest.raises(InputError, match="no cell is finished"):
        results(LanguageSetting(small_study(), tmp_path / "empty"), tmp_path / "empty")


def test_seeds_that_were_asked_other_questions_are_refused(tmp_path: Path) -> None:
    setting = finish_language(small_study(), tmp_path, {("smoe", 0): 5.0, ("smoe", 1): 5.0})
    write_lines(tmp_path / "cells" / "wiki" / "smoe" / "seed1" / "perplexity", 5.0, lines=11)
    with pytest.raises(InputError, match="not asked the same questions"):
        scores_of(setting, "test", ["smoe"])


def test_hashes_of_predictions_tell_repetitions_from_others(tmp_path: Path) -> None:
    def digest(folder: str, nats: float) -> str:
        setting = finish_language(small_study(), tmp_path / folder, {("smoe", 0): nats})
        return scores_of(setting, "test", ["smoe"])["wiki"]["smoe"].predictions_sha256()

    assert digest("a", 5.0) == digest("b", 5.0) != digest("c", 5.01)


CELLS = [(name, severity) for name in ("fog", "contrast", "saturate") for severity in (1, 5)]


def finish_pictures(study: Study, output: Path, right: Mapping[str, Mapping[str, Any]]) -> PictureSetting:
    """Every seed the same: 8 questions about 4 pictures clean, the first 4 of them corrupted."""
    setting = PictureSetting(study, output)
    for job in setting.jobs("test", list(study.arms)):
        finish(job)
        if job.name.startswith("evaluation"):
            seed = job.name.rpartition("/")[2]
            for arm, scores in right.items():
                corrupted = [
                    (name, severity, scores.get(f"{name}/{severity}", scores["bad"])) for name, severity in CELLS
                ]
                folder = job.folder / "results" / f"{arm}-{seed}-run"
                write_predictions(folder / "predictions", [("none", 0, scores["clean"]), *corrupted])
                write_drift(folder, scores.get("changed", [0.2, 0.1]))
        if job.name.startswith("cells"):
            write_routing(job.folder / "run", [[0.5, 0.5], [0.3, 0.7]])
    return setting


def test_the_tables_say_what_cells_with_pictures_hold(tmp_path: Path) -> None:
    smoe = {"clean": [1, 1, 1, 0, 1, 1, 0, 0], "bad": [1, 0, 0, 0], "fog/1": [1, 1, 1, 0]}
    # The extra corruption is in no mean.
    symphony = {"clean": [1, 1, 1, 0, 1, 1, 1, 0], "bad": [1, 1, 0, 0], "saturate/1": [0, 0, 0, 0]}
    setting = finish_pictures(picture_study(), tmp_path, {"smoe": smoe, "symphony": symphony})
    document, page = results(setting, tmp_path)
    plain, graph = document["arms"]
    assert plain["values"]["clean"]["value"] == 5 / 8 and graph["values"]["clean"]["value"] == 6 / 8
    # Common cells: fog and contrast at 1 and 5.
    assert plain["values"]["corrupted"]["value"] == pytest.approx((3 + 1 + 1 + 1) / 16)
    assert graph["values"]["corrupted"]["value"] == pytest.approx(8 / 16)
    assert graph["cells"]["saturate/1"]["value"] == 0 and set(graph["cells"]) == {f"{n}/{s}" for n, s in CELLS}
    # On the corrupted pictures both answer 3 of 4 clean questions.
    assert plain["retention"]["corrupted"]["value"] == pytest.approx((6 / 16) / (3 / 4))
    rows = {row["condition"]: row for row in document["comparisons"]}
    assert rows["clean"]["difference"]["value"] == pytest.approx(1 / 8)
    assert rows["corrupted"]["difference"]["value"] == pytest.approx(2 / 16)
    assert rows["change by corrupted"]["difference"]["value"] == pytest.approx(2 / 16)
    assert plain["routing"]["off_diagonal_mass"] == pytest.approx(0.4)
    assert "| symphony | smoe | clean | +12.50 [" in page and "| smoe | 2 | 62.50 [" in page
    assert (tmp_path / "pictures_graphs.png").stat().st_size > 0
    curve = setting.curve(scores_of(setting, "test", ["smoe", "symphony"])["pictures"]["symphony"], [0])
    assert [(harm, sums.sum() / weights.sum()) for harm, sums, weights in curve] == [(0, 0.75), (1, 0.5), (5, 0.5)]


def test_the_drift_of_routing_is_compared_by_seed(tmp_path: Path) -> None:
    scores: dict[str, list[float]] = {"clean": [1, 1, 1, 0, 1, 1, 0, 0], "bad": [1, 0, 0, 0]}
    arms = {"smoe": scores, "symphony": scores | {"changed": [0.17, 0.1]}}
    setting = finish_pictures(picture_study(seeds=[0, 1, 2]), tmp_path, arms)
    write_drift(tmp_path / "evaluation" / "test" / "seed2" / "results" / "symphony-seed2-run", [0.14, 0.1])
    document, page = results(setting, tmp_path)
    rows = {(row["arm"], row["modality"]): row for row in document["drift"]}
    assert list(rows) == [(arm, kind) for arm in arms for kind in ("image", "text")]
    image, text = rows["symphony", "image"], rows["symphony", "text"]
    assert image["per_seed"] == [0.17, 0.17, 0.14] and image["figures"]["fluctuation"] == pytest.approx(0.16)
    # Of fog and contrast, 1 of 8 right answers is lost; saturate is not a common corruption.
    assert image["figures"]["answers_lost"] == pytest.approx(1 / 8) and image["figures"]["association"] == 0.75
    difference = image["difference"]
    assert difference["value"] == pytest.approx(-0.04) and difference["low"] < -0.04 < difference["high"]
    # Student's t of -0.03, -0.03, -0.06: a mean of 4 standard errors below 0, two degrees of freedom.
    assert image["p_seeds"] == pytest.approx(0.0572, abs=1e-4)
    # Text changes as much in both, which is p = 1; two rows are tested.
    assert (text["difference"]["value"], text["p_seeds"], image["p_holm"]) == (0, 1, 2 * image["p_seeds"])
    assert rows["smoe", "image"]["difference"] is None
    assert "| symphony | image | 16.0 | 16.0 | 0.50 | 16.0 | 16.0 | 0.160 | 12.5 | 75.0 | smoe | -4.00 [" in page
    assert "| smoe | text | 10.0 |" in page and (tmp_path / "pictures_drift.png").stat().st_size > 0


@pytest.mark.parametrize("changed", [None, [0.0, 0.0]])
def test_a_baseline_whose_tokens_have_no_choice_is_not_compared_with(
    changed: list[float] | None, tmp_path: Path
) -> None:
    """A dense model has no routers, and of two experts that are both always active none can change."""
    scores: dict[str, Any] = {"clean": [1, 1, 1, 0, 1, 1, 0, 0], "bad": [1, 0, 0, 0]}
    arms = {"smoe": scores | {"changed": changed}, "symphony": scores | {"changed": [0.17, 0.1]}}
    document, page = results(finish_pictures(picture_study(seeds=[0, 1, 2]), tmp_path, arms), tmp_path)
    rows = {(row["arm"], row["modality"]): row for row in document["drift"]}
    assert ("smoe", "image") in rows or changed is None
    assert rows["symphony", "image"]["difference"] is None and rows["symphony", "image"]["p_holm"] is None
    assert rows["symphony", "image"]["figures"]["fluctuation"] == pytest.approx(0.17)
    assert "| symphony | image | 17.0 |" in page


def test_without_routing_there_is_no_drift(tmp_path: Path) -> None:
    values = {"corruptions": ["fog", "contrast", "saturate"], "severities": [1, 5], "routing": False}
    scores: dict[str, list[float]] = {"clean": [1, 1, 1, 0, 1, 1, 0, 0], "bad": [1, 0, 0, 0]}
    setting = finish_pictures(picture_study(evaluation=values), tmp_path, {"smoe": scores, "symphony": scores})
    assert not any("--routing" in word for job in setting.jobs("test", ["smoe"]) for word in str(job.commands).split())
    document, page = results(setting, tmp_path)
    assert document["drift"] == [] and "experts changed" not in page and not (tmp_path / "pictures_drift.png").exists()


def test_controls_are_marked(tmp_path: Path) -> None:
    arms = {"smoe": [], "shuffled": {"settings": [], "baseline": "smoe", "control": True}}
    nats = {("smoe", 0): 5.0, ("shuffled", 0): 5.1}
    document, page = results(finish_language(small_study(arms=arms), tmp_path, nats), tmp_path)
    assert [row["control"] for row in document["arms"]] == [False, True]
    assert "| shuffled (control) | 1 |" in page and "| shuffled (control) | smoe | clean |" in page


def test_an_arm_is_compared_with_controls_in_a_table_of_its_own(tmp_path: Path) -> None:
    """With a correction of its own: the table against baselines stays what it was."""
    shuffled = {"settings": [], "baseline": "smoe", "control": True}
    symphony = {"settings": [], "baseline": "smoe", "controls": ["shuffled"]}
    arms = {"smoe": [], "shuffled": shuffled, "symphony": symphony}
    by_seed = {"smoe": (5.0, 5.2), "shuffled": (5.1, 5.2), "symphony": (4.9, 5.05)}
    nats = {(arm, seed): value for arm, values in by_seed.items() for seed, value in enumerate(values)}
    document, page = results(finish_language(small_study(arms=arms), tmp_path, nats), tmp_path)
    found = {row["condition"]: row for row in document["against_controls"]}
    assert {(row["arm"], row["baseline"]) for row in found.values()} == {("symphony", "shuffled")}
    assert found["clean"]["difference"]["value"] == pytest.approx(-0.175)
    assert "Nats per word against negative controls" in page and "| symphony | shuffled | clean | -0.1750 [" in page
    symphony["controls"] = []
    alone, page = results(finish_language(small_study(arms=arms), tmp_path / "b", nats), tmp_path / "b")
    assert alone["comparisons"] == document["comparisons"] and alone["against_controls"] == []
    assert "negative controls, paired" not in page


# Choices.


def test_the_best_on_the_development_data_is_chosen_and_it_alone_is_tested(tmp_path: Path) -> None:
    arms = {"smoe": [], **{f"s{n}": {"settings": [f"model.moe.strength=0.{n}"], "baseline": "smoe"} for n in (1, 2, 3)}}
    select = {"choices": {"best": {"among": ["s1", "s2", "s3"], "baseline": "smoe"}}}
    study = small_study(arms=arms, select=select)
    development = {("smoe", 5.0): 0, ("s1", 5.1): 0, ("s2", 4.8): 0, ("s3", 4.9): 0}
    nats = {(arm, seed): value for arm, value in development for seed in (0, 1)}
    setting = finish_language(study, tmp_path, nats, "development")
    on_development = scores_of(setting, "development", list(arms))
    assert study.select is not None
    chosen = choose(setting, study.select, on_development["wiki"])
    assert [(c.name, c.arm, dict(c.tried)) for c in chosen] == [
        ("best", "s2", {"s1": pytest.approx(5.1), "s2": pytest.approx(4.8), "s3": pytest.approx(4.9)})
    ]
    assert arms_to_test(list(arms), chosen) == ["smoe", "s2"]
    # On the test data it is no better, which the table says.
    finish_language(study, tmp_path, {(arm, seed): 6.0 for arm in ("smoe", "s2") for seed in (0, 1)}, "test")
    page = write_results(
        setting,
        {"development": on_development, "test": scores_of(setting, "test", ["smoe", "s2"])},
        chosen,
        tmp_path,
        command="",
        n_jobs=(1, 1),
        provenance={},
    ).read_text()
    rows = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    tested = {row["condition"]: row for row in rows if row["part"] == "test"}
    assert tested["clean"]["arm"] == "best" and tested["clean"]["difference"]["value"] == 0
    assert "| best | 3 | s2 |" in page and "| best | smoe | clean | +0.0000" in page


def test_a_choice_needs_every_seed_of_every_arm(tmp_path: Path) -> None:
    study = small_study(select={"choices": {"best": {"among": ["smoe", "symphony"]}}})
    nats = {("smoe", 0): 5.0, ("smoe", 1): 5.0, ("symphony", 0): 4.0}
    setting = finish_language(study, tmp_path, nats, "development")
    assert study.select is not None
    with pytest.raises(InputError, match="'symphony' has not finished every seed"):
        choose(setting, study.select, scores_of(setting, "development", ["smoe", "symphony"])["wiki"])
