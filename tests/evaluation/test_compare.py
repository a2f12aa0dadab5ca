"""compare: the paired page of two evaluations, what it refuses, and the pictures of flipped answers."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from symphony_vlm.cli import app
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.compare_report import write_comparison
from symphony_vlm.evaluation.flip_pictures import find_pictures
from symphony_vlm.evaluation.item_finder import ItemFinder
from symphony_vlm.evaluation.pictures import open_picture
from symphony_vlm.evaluation.quantities import Resampling
from symphony_vlm.evaluation.report import write_report
from symphony_vlm.evaluation.report_data import load_evaluation
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.statistics import holm, mcnemar
from symphony_vlm.evaluation.task import get_task

FAST = Resampling(n_resamples=300, n_draws=1000)
FILES = ("comparison.html", "comparison.json", "cells.csv", "tables.md", "tables.tex")


def _fixture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scenes_fixture", Path(__file__).with_name("scenes_fixture.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenes_fixture"] = module
    spec.loader.exec_module(module)
    return module


fixture = _fixture()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    return Path(fixture.make_scenes(root / "data", pictures=12))


@pytest.fixture(scope="module")
def pair(root: Path, data: Path) -> list[Path]:
    return [
        fixture.write_scene_evaluation(root / "smoe", data, router="smoe", cost=0.09),
        fixture.write_scene_evaluation(root / "symphony", data, router="symphony_smoe", cost=0.04),
    ]


@pytest.fixture(scope="module")
def output(root: Path, pair: list[Path]) -> Path:
    return write_comparison(*pair, root / "out", resampling=FAST).html.parent


@pytest.fixture(scope="module")
def found(output: Path) -> Any:
    return json.loads((output / "comparison.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(output: Path) -> str:
    return (output / "comparison.html").read_text(encoding="utf-8")


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def _records(folder: Path, cell: str) -> dict[str, dict[str, Any]]:
    lines = (folder / f"predictions/scenes.{cell}.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["item_id"]: record for record in map(json.loads, lines)}


def _rewrite(folder: Path, cell: str, change: Any) -> None:
    records = _records(folder, cell)
    for record in records.values():
        change(record)
    path = folder / f"predictions/scenes.{cell}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records.values()), encoding="utf-8")


def test_files_and_equal_bytes(pair: list[Path], output: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    again = write_comparison(*pair, tmp_path / "again", resampling=FAST).html.parent
    for name in FILES:
        assert (again / name).read_bytes() == (output / name).read_bytes(), name


def test_sections(page: str) -> None:
    found = [name for name in re.findall(r'<section id="(\w+)"', page) if name != "warnings"]
    assert found == ["verdict", "clean", "severity", "robustness", "retention", "difference", "samples", "methods"]
    assert "<script" not in page
    assert all(url.startswith("data:image/webp;base64,") for url in re.findall(r' src="([^"]*)"', page))


def test_provenance_of_both_side_by_side(page: str, found: Any) -> None:
    assert (found["a"]["label"], found["b"]["label"]) == ("smoe", "symphony_smoe")
    assert found["a"]["provenance"]["corruption_canary"] == found["b"]["provenance"]["corruption_canary"]
    assert found["a"]["manifest_sha256"] != found["b"]["manifest_sha256"]
    header = page[page.index('class="provenance"') :]
    assert header.index(">smoe</th>") < header.index(">symphony_smoe</th>")


def test_cells_equal_a_loop_over_the_records(pair: list[Path], output: Path, found: Any) -> None:
    a, b = pair
    cells = found["comparisons"][0]["cells"]
    assert len(cells) == len(fixture.GRID)
    exact = []
    for cell in cells:
        name = f"{cell['corruption']}.{cell['severity']}"
        first, second = _records(a, name), _records(b, name)
        only = [sum(x[i]["score"] > y[i]["score"] for i in x) for x, y in ((first, second), (second, first))]
        assert [cell["only_baseline_right"], cell["only_model_right"], cell["n_paired"]] == [*only, len(first)]
        assert cell["mcnemar_p"] == mcnemar(*only)
        assert cell["mcnemar_p"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1)
        difference = np.mean([second[i]["score"] - first[i]["score"] for i in first])
        assert cell["difference"]["value"] == pytest.approx(difference)
        exact.append(cell["mcnemar_p"])
    assert [cell["mcnemar_p_holm"] for cell in cells] == holm(exact)
    assert [cell["difference_p_holm"] for cell in cells] == holm([cell["difference_p"] for cell in cells])
    with (output / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["mcnemar_p"]]
    assert [float(row["mcnemar_p"]) for row in rows] == pytest.approx(
        [cell["mcnemar_p"] for cell in sorted(cells, key=lambda cell: (cell["corruption"], cell["severity"]))]
    )


def test_marks_are_those_of_holm(page: str, found: Any) -> None:
    comparison = found["comparisons"][0]
    for table, field in (("did", "p_holm"), ("differences", "difference_p_holm")):
        start = page.index(f'<table class="{table}">')
        body = page[start : page.index("</table>", start)]
        marked = len(re.findall(r"<td[^>]*>[^<]*\*", body))
        assert marked == sum(cell[field] < 0.05 for cell in comparison["cells"])


def test_format_loss_and_unparsed_equal_a_loop(pair: list[Path], found: Any) -> None:
    for folder, model in zip(pair, found["models"], strict=True):
        clean = _records(folder, "none.0")
        for cell in model["cells"]:
            bad = _records(folder, f"{cell['corruption']}.{cell['severity']}")
            loss = np.mean(
                [(clean[i]["score"] - bad[i]["score"]) - (clean[i]["lenient"] - bad[i]["lenient"]) for i in bad]
            )
            assert cell["format_loss"]["value"] == pytest.approx(loss)
            unparsed = np.mean(
                [record["parse_status"] in ("unparsed", "empty", "ambiguous") for record in bad.values()]
            )
            assert cell["unparsed_rate"]["value"] == pytest.approx(unparsed)
        mean = np.mean([cell["format_loss"]["value"] for cell in model["cells"]])
        assert model["format"]["format_loss"]["value"] == pytest.approx(mean)
        assert mean > 0


def _images(page: str) -> list[Image.Image]:
    urls = re.findall(r'src="data:image/webp;base64,([^"]*)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(url))).convert("RGB") for url in urls]


def test_gallery_shows_the_very_pixels(page: str, data: Path) -> None:
    """Scenes are stored without loss: clean and corrupted, in pairs, as the model has seen them."""
    task = get_task("scenes")
    items = {item.id: item for item in task.load(data, None, data.parent, 0)}
    cards = page.split('<article class="sample">')[1:]
    assert len(cards) > 4  # four of the baseline's flips, and at least one of the other's
    for card in cards:
        words = re.search(r"<p class=\"sub\">([\w ]+), severity (\d) · ([\w-]+)</p>", card)
        assert words is not None
        name, severity, item = words[1].replace(" ", "_"), int(words[2]), items[words[3]]
        clean, bad = _images(card)
        for image, (corruption, level) in ((clean, ("none", 0)), (bad, (name, severity))):
            cell = Cell(task=task, corruption=corruption, severity=level, seed=0)
            np.testing.assert_array_equal(np.asarray(image), open_picture(item.images[0], cell).pixels)


def test_report_has_the_same_gallery(pair: list[Path], page: str, tmp_path: Path) -> None:
    report = write_report(pair, tmp_path / "report", resampling=FAST).read_text(encoding="utf-8")
    assert [image.tobytes() for image in _images(report)] == [image.tobytes() for image in _images(page)]


def test_moved_data_is_found_again(root: Path, data: Path, pair: list[Path], page: str, tmp_path: Path) -> None:
    moved = _copy(data.parent, tmp_path / "moved")
    folders = [_copy(folder, tmp_path / folder.name) for folder in pair]
    for folder in folders:
        text = (folder / "results.json").read_text().replace(str(data), str(tmp_path / "gone" / "test.json"))
        (folder / "results.json").write_text(text)
    bare = write_comparison(*folders, tmp_path / "bare", resampling=FAST).html.read_text()
    assert not _images(bare)
    assert "test.json is not on this machine (say where it is: --data)" in bare
    finder = ItemFinder(data=moved / "test.json")
    shown = write_comparison(*folders, tmp_path / "out", resampling=FAST, finder=finder).html.read_text()
    assert [image.tobytes() for image in _images(shown)] == [image.tobytes() for image in _images(page)]


def _finder_case(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    clean, bad = _records(folder, "none.0"), _records(folder, "fog.3")
    item = next(iter(clean))
    return load_evaluation(folder), clean[item], bad[item]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pixels_sha256": "0" * 64}, "other pixels than the evaluation showed"),
        ({"image_sha256": "0" * 64}, "the picture file has changed"),
        ({"attack": "pgd"}, "an attack has changed the pixels"),
        ({"corruption": "no_such"}, "no_such"),
    ],
)
def test_what_does_not_match_is_not_shown(pair: list[Path], change: dict[str, Any], reason: str) -> None:
    evaluation, clean, bad = _finder_case(pair[0])
    with ItemFinder() as finder:
        found = find_pictures(finder, [evaluation], clean, {**bad, **change})
    assert isinstance(found, str)
    assert reason in found


def test_a_record_cannot_make_a_file_run(pair: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "task.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    evaluation, clean, bad = _finder_case(pair[0])
    with ItemFinder() as finder:
        found = find_pictures(finder, [evaluation], {**clean, "task": str(script)}, bad)
    assert "task of your own" in str(found)
    assert not (tmp_path / "ran").exists()


def test_generated_scenes_are_drawn_again(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation without --data had its scenes in its own folder; gone, they come from the seed."""
    from symphony_vlm.evaluation.tasks import scenes

    monkeypatch.setattr(scenes, "TEST_PICTURES", 12)
    folder = _copy(pair[0], tmp_path / "own")
    text = (folder / "results.json").read_text()
    document = json.loads(text)
    del document["provenance"]["data"]
    (folder / "results.json").write_text(json.dumps(document))
    evaluation, clean, bad = _finder_case(folder)
    with ItemFinder() as finder:
        found = find_pictures(finder, [evaluation], clean, bad)
    assert not isinstance(found, str)
    assert not (folder / "data").exists()


def test_large_pictures_become_small(tmp_path: Path) -> None:
    from symphony_vlm.evaluation.flip_pictures import _data_url

    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    url = _data_url(noise)
    [image] = _images(f' src="{url}"')
    assert image.size == (256, 171)
    assert len(url) < 80_000


def _same_pixels_gone(folder: Path) -> None:
    shutil.rmtree(folder / "predictions")


def _other_seed(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "seed": 7}))


def _other_place(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "corrupt_at": "model"}))


def _other_scheme(folder: Path) -> None:
    text = (folder / "results.json").read_text()
    (folder / "results.json").write_text(re.sub(r'"corruption_canary": "\w+"', '"corruption_canary": "1"', text))


def _several_models(folder: Path) -> None:
    document = json.loads((folder / "results.json").read_text())
    document["results"].append({**document["results"][0], "model": "runs/other/model"})
    (folder / "results.json").write_text(json.dumps(document))


def _other_task(folder: Path) -> None:
    for path in (folder / "predictions").iterdir():
        path.write_text(path.read_text().replace('"task": "scenes"', '"task": "pope"'))


def _other_cells(folder: Path) -> None:
    for path in (folder / "predictions").iterdir():
        text = path.read_text().replace('"corruption": "fog"', '"corruption": "snow"')
        text = text.replace('"corruption": "gaussian_noise"', '"corruption": "contrast"')
        path.write_text(text.replace('"corruption": "none", "severity": 0', '"corruption": "spatter", "severity": 1'))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_same_pixels_gone, "no predictions here"),
        (_other_seed, r"manifest\.json: 'seed' is 7, and 0 in"),
        (_other_place, r"'corrupt_at' is 'model', and 'native' in"),
        (_other_scheme, "its corruptions draw other pixels"),
        (_several_models, "it holds 2 models"),
        (_other_task, r"it holds pope, and .* holds scenes: no task in common"),
        (_other_cells, "no cell of scenes in common"),
        (
            lambda f: _rewrite(f, "fog.3", lambda r: r.update(pixels_sha256="0" * 64)),
            r"96 of 96 items of scenes, fog 3 were shown with other pixels",
        ),
        (
            lambda f: _rewrite(f, "none.0", lambda r: r.update(item_id=f"x{r['item_id']}")),
            "no question of scenes, clean in common",
        ),
        (
            lambda f: _rewrite(f, "fog.1", lambda r: r.update(question="Why?")),
            r"item '.*' of scenes asks \('Why\?'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(pair: list[Path], tmp_path: Path, fault: Any, message: str) -> None:
    other = _copy(pair[1], tmp_path / "other")
    fault(other)
    with pytest.raises(InputError, match=message):
        write_comparison(pair[0], other, tmp_path / "out", resampling=FAST)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_with_itself_or_into_itself(pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compared with itself"):
        write_comparison(pair[0], pair[0], tmp_path / "out")
    with pytest.raises(InputError, match="the output is one of the inputs"):
        write_comparison(*pair, pair[1])


def test_one_model_evaluated_twice(pair: list[Path], tmp_path: Path) -> None:
    again = _copy(pair[0], tmp_path / "again")
    written = write_comparison(pair[0], again, tmp_path / "out", resampling=FAST)
    [text] = written.verdicts
    assert "no difference in robustness shown between smoe (B) and smoe (A)" in text
    assert "+0.0 [" in text or "0.0 [0.0, 0.0]" in text
    assert "every value in the brackets fits these answers" in written.html.read_text()


def test_command(pair: list[Path], tmp_path: Path) -> None:
    arguments = ["compare", *map(str, pair), "--output", str(tmp_path / "out"), "--json", "--interval", "bca"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    document = json.loads(Path(summary["comparison"]).read_text())
    assert summary["verdicts"] == document["verdicts"]
    assert summary["primary"]["scenes"] == document["comparisons"][0]["primary"]
    assert summary["primary"]["scenes"]["ci_low"] > 0
    assert document["parameters"]["interval"] == "bias-corrected and accelerated (BCa) bootstrap over images"
    assert Path(summary["html"]).is_file()


def test_command_names_the_intervals(pair: list[Path], tmp_path: Path) -> None:
    arguments = ["compare", *map(str, pair), "--output", str(tmp_path / "out"), "--interval", "student"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert "'student' is none of percentile, bca" in str(done.exception)


def test_several_training_runs(data: Path, pair: list[Path], tmp_path: Path) -> None:
    """Student's t over the runs, never pooled with the intervals over images."""
    runs = [*pair]
    for luck in (1, 2):
        for router, cost in (("smoe", 0.09), ("symphony_smoe", 0.04)):
            folder = tmp_path / f"{router}{luck}"
            runs.append(fixture.write_scene_evaluation(folder, data, router=router, cost=cost, luck=luck))
    page = write_report(runs, tmp_path / "out", resampling=FAST)
    robustness = json.loads((page.parent / "results.json").read_text())["robustness"]
    blocks = {block["router"]: block for block in robustness["seeds"]}
    assert {len(block["runs"]) for block in blocks.values()} == {3}
    drops = {
        router: [m["drop"]["value"] for m in robustness["models"] if m["router"] == router]
        for router in ("smoe", "symphony_smoe")
    }
    for router, values in drops.items():
        low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        got = blocks[router]["drop"]
        assert (got["value"], got["ci_low"], got["ci_high"]) == pytest.approx((np.mean(values), low, high))
    welch = stats.ttest_ind(drops["smoe"], drops["symphony_smoe"], equal_var=False).confidence_interval(0.95)
    did: Any = blocks["symphony_smoe"]["difference_in_differences"]
    assert (did["ci_low"], did["ci_high"]) == pytest.approx((welch.low, welch.high))
    assert did["value"] == pytest.approx(np.mean(drops["smoe"]) - np.mean(drops["symphony_smoe"]))
    text = page.read_text()
    assert 'id="seeds"' in text
    assert "smoe (3 runs)" in text
    assert f"over 3 training runs symphony_smoe loses {100 * did['value']:.1f} points less than smoe" in text
    (runs[2] / "predictions/scenes.fog.5.jsonl").unlink()
    document = json.loads((runs[2] / "results.json").read_text())
    document["results"] = [row for row in document["results"] if (row["corruption"], row["severity"]) != ("fog", 5)]
    (runs[2] / "results.json").write_text(json.dumps(document))
    page = write_report(runs, tmp_path / "unlike", resampling=FAST)
    blocks = json.loads((page.parent / "results.json").read_text())["robustness"]["seeds"]
    assert [block["drop"]["value"] is None for block in blocks] == [True, False]
    assert all("other cells" in block["difference_in_differences"]["reason"] for block in blocks[1:])


def test_records_of_the_runner_lead_back_to_their_pictures(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """What a real evaluation writes is enough: no folder is named again."""
    plan = EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("scenes",),
        data=data,
        corruptions=("fog",),
        severities=(3,),
        limit=8,
        max_new_tokens=2,
    )
    evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    evaluation, clean, bad = _finder_case(tmp_path / "out")
    with ItemFinder() as finder:
        found = find_pictures(finder, [evaluation], clean, bad)
    assert not isinstance(found, str), found
    assert found.small
    assert found.clean != found.corrupted
