"""A study cuts texts, runs cells that continue, and says with intervals what came of it."""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import PRESETS
from symphony_vlm.study.cells import StudyCell, study_cells
from symphony_vlm.study.configuration import Study, load_study
from symphony_vlm.study.runner import run_cells
from symphony_vlm.study.statistics import compare_arms, mean_nats
from symphony_vlm.study.tables import write_results
from symphony_vlm.study.text_parts import split_lines, write_parts

STUDY = Path(__file__).parents[2] / "studies" / "wikitext2_tiny.yaml"
TEXTS = ["texts.wikitext2.path=a.txt", "texts.movie_reviews.path=b.txt"]


def small_study(**values: Any) -> Study:
    given = {
        "name": "small", "recipe": "wikitext2_tiny", "seeds": [0, 1], "texts": {"wiki": {"path": "a.txt"}},
        "arms": {"smoe": [], "symphony": {"settings": ["model.moe.router=symphony_smoe"], "baseline": "smoe"}},
        "perplexity": {"rates": [0.1], "context": 32, "stride": 16},
    }  # fmt: skip
    return Study.model_validate(given | values)


# The file.


def test_the_packaged_study_has_every_preset_five_seeds_and_baselines() -> None:
    study = load_study(str(STUDY), TEXTS)
    routers = {}
    for name, arm in study.arms.items():
        recipe = load_recipe(study.recipe, [*study.settings, *arm.settings])
        assert recipe.model.moe is not None
        routers[name] = recipe.model.moe["router"]
        assert arm.baseline in (None, "smoe", "xmoe", "glam")
    assert routers == {name: name for name in PRESETS} and len(study.seeds) == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seedz=[1]", "did you mean 'seeds'"),
        ("seeds=[1,1]", "seeds must differ"),
        ("arms.symphony_smoe.baseline=smo", "did you mean 'smoe'"),
        ("perplexity.rates=[2]", "less than or equal to 1"),
        ("texts.wikitext2.path=null", "texts.wikitext2: the text has no path"),
    ],
)
def test_a_wrong_study_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_study(str(STUDY), [*TEXTS, override])


# Texts.


def test_articles_are_kept_whole_and_parts_share_nothing() -> None:
    lines = [line for number in range(20) for line in (f" = T{number} = ", f"text {number}", "")]
    parts = split_lines(lines, "article")
    assert sorted(chain.from_iterable(parts.values())) == sorted(lines)
    numbers = {name: {line.split()[-1] for line in part if line.startswith("text")} for name, part in parts.items()}
    assert {name: len(found) for name, found in numbers.items()} == {"train": 14, "validation": 2, "test": 4}
    for number in range(20):
        assert sum(f" = T{number} = " in part and f"text {number}" in part for part in parts.values()) == 1


def test_stretches_of_lines_and_texts_too_short(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(1000)]
    parts = split_lines(lines, "lines")
    assert {name: len(part) for name, part in parts.items()} == {"train": 700, "validation": 100, "test": 200}
    with pytest.raises(InputError, match="1 articles, 10 are needed"):
        split_lines(lines, "article")
    file = tmp_path / "a.txt"
    file.write_text("\n".join(lines))
    text = small_study(texts={"a": {"path": str(file), "by": "lines", "test_lines": 30}}).texts["a"]
    paths = write_parts(text, tmp_path / "parts")
    assert len(paths["test"].read_text().splitlines()) == 30
    assert write_parts(text, tmp_path / "parts") == paths
    file.write_text("\n".join(reversed(lines)))
    with pytest.raises(InputError, match="holds another text"):
        write_parts(text, tmp_path / "parts")


# Cells.


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def cell(folder: Path, name: str, train: str, measure: str = "pass") -> StudyCell:
    return StudyCell(
        arm=name, seed=0, text="wiki", folder=folder / name, train=command(train), measure=command(measure)
    )


def test_cells_run_once_failures_do_not_stop_the_others_and_are_tried_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    note = f"open({str(count)!r}, 'a').write('x'); import os; assert os.environ['OMP_NUM_THREADS'] == '1'"
    good = cell(tmp_path, "good", note)
    fails = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(tmp_path / 'mended')!r}).exists() else 'no luck')"
    bad = cell(tmp_path, "bad", fails)
    quiet = Console(quiet=True)
    assert run_cells([bad, good], jobs=2, threads=1, console=quiet) == {"wiki/bad/seed0": "no luck"}
    assert good.is_done() and not bad.is_done() and count.read_text() == "x"
    (tmp_path / "mended").touch()
    assert run_cells([bad, good], jobs=1, threads=1, console=quiet) == {}
    assert bad.is_done() and count.read_text() == "x"


def test_a_signal_ends_the_cells_and_they_are_not_done(tmp_path: Path) -> None:
    # The cell asks its parent to stop, as a job scheduler would, and then takes its time.
    asks = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    slow = cell(tmp_path, "slow", asks)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cells([slow], jobs=1, threads=1, console=Console(quiet=True))
    assert time.monotonic() - start < 50 and not slow.is_done()


def test_a_cell_with_other_settings_begins_anew(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    first = cell(tmp_path, "a", "pass")
    run_cells([first], jobs=1, threads=1, console=quiet)
    (first.folder / "run" / "language" / "checkpoint-5").mkdir(parents=True)
    second = cell(tmp_path, "a", "pass # other")
    assert first.is_done() and not second.is_done()
    run_cells([second], jobs=1, threads=1, console=quiet)
    assert second.is_done() and not (first.folder / "run").exists()


def test_cells_cover_arms_seeds_and_texts_with_whole_comparisons_first(tmp_path: Path) -> None:
    parts = {"wiki": {name: tmp_path / f"{name}.txt" for name in ("train", "validation", "test")}}
    cells = study_cells(small_study(), tmp_path, parts)
    assert [(c.arm, c.seed) for c in cells] == [("smoe", 0), ("symphony", 0), ("smoe", 1), ("symphony", 1)]
    assert "model.moe.router=symphony_smoe" in cells[1].train and "seed=0" in cells[1].train
    assert cells[1].measure[cells[1].measure.index("--rate") + 1] == "0.1"


# Statistics and tables.


def test_means_and_differences_are_of_sums_and_intervals_cover_them() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 50, 40).astype(float)
    base = words * 5 + rng.normal(0, 3, (5, 40))
    arm = base - 0.1 * words + rng.normal(0, 0.5, (5, 40))
    found = mean_nats(base, words)
    assert found.value == pytest.approx(base.sum() / 5 / words.sum()) and found.low < found.value < found.high
    compared = compare_arms(base, arm, words)
    assert compared.interval.high < 0 and compared.p_seeds is not None and compared.p_seeds < 0.001
    assert compared.interval.value == pytest.approx((arm - base).sum() / 5 / words.sum())
    same = compare_arms(base, base, words)
    assert (same.interval.value, same.p_seeds, same.p_text) == (0, 1.0, 1.0)
    assert compare_arms(base[:1], arm[:1], words).p_seeds is None


def test_intervals_of_the_mean_over_seeds_and_text_hold_their_level() -> None:
    """Both seeds and text vary; 95 % intervals of 200 draws cover the truth in about 95 %, three deviations: 4.6 %.

    A bootstrap of few seeds is a little short (a factor of sqrt(7/8) with 8), so the lower bound is wider.
    """
    rng = np.random.default_rng(1)
    words = np.full(60, 10.0)
    covered = 0
    for _ in range(200):
        nats = 50 + rng.normal(0, 5, (1, 60)) + rng.normal(0, 2, (8, 1)) + rng.normal(0, 3, (8, 60))
        found = mean_nats(nats, words, seed=int(rng.integers(1 << 30)))
        covered += found.low <= 5.0 <= found.high
    assert 0.86 <= covered / 200 <= 0.99


def fake_cell(study: Study, output: Path, arm: str, seed: int, nats: float) -> StudyCell:
    """A finished cell with known costs."""
    made = StudyCell(arm=arm, seed=seed, text="wiki", folder=output / arm / str(seed), train=("x",), measure=("y",))
    records = [
        {"cell": name, "line": line, "cluster": f"line {line}", "n_words": 10, "log_probability": -10 * (nats + more)}
        for name, more in (("clean", 0.0), ("word_swap@0.1", 0.5))
        for line in range(12)
    ]
    made.measured.mkdir(parents=True)
    (made.measured / "lines.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    routing = made.folder / "run" / "language" / "routing.jsonl"
    routing.parent.mkdir(parents=True)
    routing.write_text(json.dumps({"step": 1, "layers": {"0": {"load": [0.5, 0.5, 0.0, 0.0]}}}) + "\n")
    (made.folder / "seconds.txt").write_text("90.0\n")
    made.finish()
    return made


def test_the_tables_say_what_the_cells_hold(tmp_path: Path) -> None:
    study = small_study()
    cells = [fake_cell(study, tmp_path, "smoe", 0, 5.0), fake_cell(study, tmp_path, "smoe", 1, 5.2)]
    cells += [fake_cell(study, tmp_path, "symphony", 0, 4.9), fake_cell(study, tmp_path, "symphony", 1, 5.05)]
    page = write_results(study, cells, tmp_path, {"git": None}).read_text()
    document = json.loads((tmp_path / "results.json").read_text())
    smoe = document["arms"][0]
    assert smoe["values"]["clean"]["value"] == pytest.approx(np.exp(5.1))
    assert smoe["values"]["clean"]["per_seed"] == pytest.approx([np.exp(5.0), np.exp(5.2)])
    assert smoe["dead_experts"] == 2 and smoe["experts"] == 4
    rows = {row["condition"]: row for row in document["comparisons"]}
    assert rows["clean"]["nats_per_word"]["value"] == pytest.approx(-0.125)
    # Both lose 0.5 nats by the attack.
    assert rows["loss by word_swap@0.1"]["nats_per_word"]["value"] == pytest.approx(0, abs=1e-12)
    assert rows["clean"]["p_holm"] >= rows["clean"]["p_seeds"]
    assert "| symphony | smoe | clean | -0.1250 [" in page and "| smoe | 2 | 164.02 [" in page


def test_an_unfinished_seed_is_left_out_of_the_comparison(tmp_path: Path) -> None:
    study = small_study()
    cells = [fake_cell(study, tmp_path, "smoe", seed, 5.0) for seed in (0, 1)]
    cells += [fake_cell(study, tmp_path, "symphony", 0, 4.9), cell(tmp_path, "symphony-1", "pass")]
    write_results(study, cells, tmp_path, {})
    document = json.loads((tmp_path / "results.json").read_text())
    assert {row["n_seeds"] for row in document["comparisons"]} == {1} and document["n_cells_done"] == 3
    with pytest.raises(InputError, match="no cell is finished"):
        write_results(study, cells[3:], tmp_path, {})
