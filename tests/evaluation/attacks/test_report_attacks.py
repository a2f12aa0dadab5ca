"""Attacked cells in a report: in a table of their own, paired with the cell without the attack, and nowhere else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from symphony_vlm.evaluation.report import write_report
from symphony_vlm.evaluation.robustness import Resampling
from symphony_vlm.evaluation.statistics import paired_difference

QUICK = Resampling(seed=0, n_resamples=500, n_draws=1000)
ATTACK = "pgd:4/255:10"


def _fixture() -> Any:
    """The folders of made-up routers that the report's own tests use; tests are no package."""
    path = Path(__file__).resolve().parents[1] / "report_fixture.py"
    spec = importlib.util.spec_from_file_location("report_fixture", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions" / name).read_text().splitlines()]


def _add_attack(folder: Path, corruption: str = "none", severity: int = 0, attack: str = ATTACK) -> None:
    """Turns a third of the right answers wrong and a twentieth of the wrong right; three items are missing."""
    rng = np.random.default_rng(5)
    attacked = []
    for record in _records(folder, f"scenes.{corruption}.{severity}.jsonl")[3:]:
        flips = rng.random() < (1 / 3 if record["score"] else 1 / 20)
        attacked.append({**record, "score": 1 - record["score"] if flips else record["score"], "attack": attack})
    name = f"scenes.{corruption}.{severity}.{attack.replace('/', '-').replace(':', '_')}.jsonl"
    (folder / "predictions" / name).write_text("".join(json.dumps(record) + "\n" for record in attacked))
    document = json.loads((folder / "results.json").read_text())
    first = document["results"][0]
    value = float(np.mean([record["score"] for record in attacked]))
    cell = {"corruption": corruption, "severity": severity, "attack": attack}
    for metric in ("accuracy", "score_8bit"):
        numbers = {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n_items": len(attacked)}
        document["results"].append({**first, **cell, "metric": metric, **numbers})
    (folder / "results.json").write_text(json.dumps(document))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    fixture = _fixture()
    made = []
    for router, sturdiness in (("smoe", 0.2), ("symphony_smoe", 0.6)):
        folder = fixture.write_evaluation(tmp_path / router, router=router, sturdiness=sturdiness, corruptions=("fog",))
        made.append(folder)
    return made[0], made[1]


def test_attacked_cells_change_nothing_but_their_own_tables(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_report(folders, tmp_path / "plain", resampling=QUICK)
    for folder in folders:
        _add_attack(folder)
        _add_attack(folder, "fog", 3)
    write_report(folders, tmp_path / "attacked", resampling=QUICK)
    plain, attacked = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "attacked"))
    figures = attacked["robustness"].pop("attacks")
    assert attacked["robustness"] == plain["robustness"]
    assert [row for row in attacked["results"] if row.get("attack") != ATTACK] == plain["results"]
    assert len(attacked["results"]) == len(plain["results"]) + 8
    assert (tmp_path / "attacked/cells.csv").read_bytes() == (tmp_path / "plain/cells.csv").read_bytes()
    assert len(figures) == 4
    before, after = ((tmp_path / name / "tables.md").read_text() for name in ("plain", "attacked"))
    assert after.startswith(before.rstrip("\n"))
    assert "## Attacks: scenes" in after
    assert "## Figures under attack: scenes" in after
    page = (tmp_path / "attacked/report.html").read_text()
    assert 'id="attacks"' in page
    assert f"{ATTACK} on fog 3, symphony_smoe" in page
    assert 'id="attacks"' not in (tmp_path / "plain/report.html").read_text()


def test_figures_are_paired_over_the_items_that_both_cells_hold(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = folders[0]
    _add_attack(folder, "fog", 3)
    _add_attack(folder)
    write_report([folder], tmp_path / "out", resampling=QUICK)
    figures = json.loads((tmp_path / "out/results.json").read_text())["robustness"]["attacks"]
    found = next(figure for figure in figures if figure["corruption"] == "fog")
    without = {r["item_id"]: r for r in _records(folder, "scenes.fog.3.jsonl")}
    attacked = _records(folder, "scenes.fog.3.pgd_4-255_10.jsonl")
    before = np.array([without[r["item_id"]]["score"] for r in attacked])
    after = np.array([r["score"] for r in attacked])
    lost, gained = int((before > after).sum()), int((after > before).sum())
    assert lost > 5
    assert gained > 0
    assert found["n_items"] == len(attacked) == len(without) - 3
    assert found["without"]["value"] == pytest.approx(before.mean())
    assert found["attacked"]["value"] == pytest.approx(after.mean())
    expected = paired_difference(before, after, [r["image_key"] for r in attacked], seed=0, n_resamples=500)
    for name, value in (("value", expected.value), ("ci_low", expected.low), ("ci_high", expected.high)):
        assert found["difference"][name] == pytest.approx(value)
    assert found["right_to_wrong"]["value"] == pytest.approx(lost / len(attacked))
    assert found["lost_of_right"]["value"] == pytest.approx(lost / before.sum())
    assert found["mcnemar_p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert found["sign_flip_p"] < 0.05
    ordered = sorted(figure["sign_flip_p"] for figure in figures)
    assert min(f["sign_flip_p_holm"] for f in figures) == pytest.approx(min(1.0, 2 * ordered[0]))


def test_writing_the_report_into_the_folder_keeps_attacked_rows_and_is_stable(folders: tuple[Path, Path]) -> None:
    folder = folders[0]
    _add_attack(folder)
    write_report([folder], folder, resampling=QUICK)
    first = (folder / "results.json").read_bytes()
    rows = json.loads(first)["results"]
    assert sum(row.get("attack") == ATTACK for row in rows) == 2
    write_report([folder], folder, resampling=QUICK)
    assert (folder / "results.json").read_bytes() == first


def test_items_that_failed_under_attack_are_warned_of(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = folders[0]
    _add_attack(folder)
    document = json.loads((folder / "results.json").read_text())
    document["results"][-1]["n_errors"] = 4
    (folder / "results.json").write_text(json.dumps(document))
    write_report([folder], tmp_path / "out", resampling=QUICK)
    warnings = json.loads((tmp_path / "out/results.json").read_text())["robustness"]["warnings"]
    assert f"scenes under {ATTACK}: up to 4 items of a cell ended in an error and are in no figure." in warnings


def test_an_attacked_cell_without_its_clean_one_has_no_difference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = folders[0]
    _add_attack(folder, "fog", 3)
    (folder / "predictions/scenes.fog.3.jsonl").unlink()
    write_report([folder], tmp_path / "out", resampling=QUICK)
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["robustness"]["attacks"]
    assert found["difference"]["value"] is None
    assert "no item has a score" in found["difference"]["reason"]
