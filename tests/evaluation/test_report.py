"""The report of two made-up routers: self-contained, deterministic, honest, and safe against what models say."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.report import write_report
from symphony_vlm.evaluation.report_entries import figure_of, p_text
from symphony_vlm.evaluation.report_verdict import verdicts
from symphony_vlm.evaluation.robustness import Resampling

FAST = Resampling(n_resamples=300, n_draws=1000)
OUTPUTS = ("report.html", "results.json", "cells.csv", "tables.md", "tables.tex")
SECTIONS = (
    "verdict",
    "clean",
    "types",
    "severity",
    "robustness",
    "retention",
    "difference",
    "loss",
    "load",
    "graph",
    "samples",
    "methods",
)


def _fixture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_fixture", Path(__file__).with_name("report_fixture.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["report_fixture"] = module
    spec.loader.exec_module(module)
    return module


fixture = _fixture()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("evaluations")
    return [
        fixture.write_evaluation(root / "smoe", router="smoe", sturdiness=0.1),
        fixture.write_evaluation(root / "symphony_smoe", router="symphony_smoe", sturdiness=0.6),
    ]


@pytest.fixture(scope="module")
def report(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(folders, tmp_path_factory.mktemp("out") / "report", resampling=FAST)


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def merged(report: Path) -> Any:
    return json.loads((report.parent / "results.json").read_text(encoding="utf-8"))


class _Outline(HTMLParser):
    """Collects tags, attributes and ids, and checks that tags close in order."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _outline(page: str) -> _Outline:
    outline = _Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_all_files_are_written(report: Path) -> None:
    assert report.name == "report.html"
    assert sorted(path.name for path in report.parent.iterdir()) == sorted(OUTPUTS)


def test_page_is_self_contained(page: str) -> None:
    outline = _outline(page)
    for tag, attributes in outline.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name) or ""
            if value and not value.startswith(("#", "data:")):
                assert (tag, name) == ("a", "href")
                assert value.startswith("https://arxiv.org/abs/")
    assert "script" not in {tag for tag, _ in outline.tags}
    assert len(re.findall(r"https?://", page)) == page.count('href="https://arxiv.org/')
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    outline = _outline(page)
    ids = [attributes["id"] for _, attributes in outline.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = [a["href"] or "" for _, a in outline.tags if (a.get("href") or "").startswith("#")]
    assert {target[1:] for target in targets} <= set(ids)


def test_sections_in_order(page: str) -> None:
    found = re.findall(r'<section id="(\w+)"', page)
    assert [name for name in found if name != "warnings"] == list(SECTIONS)


def test_pictures_have_alternative_texts(page: str) -> None:
    pictures = [attributes for tag, attributes in _outline(page).tags if tag == "svg"]
    assert len(pictures) >= 3 + 4 + 4 + 4
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for a in pictures)
    assert "Expert graph of layer 0: 4 experts" in page


def test_what_a_model_says_is_escaped(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp;" in page


def test_markdown_and_latex_are_escaped(report: Path) -> None:
    latex = (report.parent / "tables.tex").read_text(encoding="utf-8")
    assert "symphony\\_smoe" in latex
    assert not re.search(r"(?<!\\)[%_&](?!.*\\\\)", "\n".join(x for x in latex.splitlines() if "caption" in x))
    lines = (report.parent / "tables.md").read_text(encoding="utf-8").splitlines()
    for first, second in itertools.pairwise(lines):
        if first.startswith("|") and second.startswith("|"):
            assert first.count("|") == second.count("|")


def test_equal_inputs_give_equal_bytes(folders: list[Path], report: Path, tmp_path: Path) -> None:
    again = write_report(folders, tmp_path / "again", resampling=FAST)
    for name in OUTPUTS:
        assert (again.parent / name).read_bytes() == (report.parent / name).read_bytes(), name


def test_results_are_merged_and_sorted(folders: list[Path], merged: Any) -> None:
    inputs = [row for f in folders for row in json.loads((f / "results.json").read_text())["results"]]
    key = lambda row: (row["model"], row["corruption"], row["severity"], row["metric"])  # noqa: E731
    assert merged["results"] == sorted(inputs, key=key)
    assert len(merged["provenance"]["evaluations"]) == 2
    assert len(merged["baselines"]) == 6


def test_numbers_of_the_tables_are_those_of_the_results(report: Path, page: str, merged: Any) -> None:
    text = re.sub(r"<[^>]*>", "", page)
    markdown = (report.parent / "tables.md").read_text(encoding="utf-8")

    def shown(number: Any, **options: Any) -> str:
        ends = (figure_of(number[key], **options) for key in ("ci_low", "ci_high"))
        return f"{figure_of(number['value'], **options)} [{', '.join(ends)}]"

    for row in merged["results"]:
        if row["corruption"] == "none":
            assert shown(row) in text
            assert shown(row) in markdown
    for model in merged["robustness"]["models"]:
        for key in ("clean", "mean_corrupted", "drop", "retention", "retention_above_chance"):
            assert shown(model[key]) in text
        assert all(shown(number) in text for number in model["flips"].values())
    other = merged["robustness"]["models"][1]["mean_corruption_error"]
    assert shown(other, scale=1.0) in text
    comparison = merged["robustness"]["comparisons"][0]
    assert shown(comparison["primary"], signed=True) in text
    assert f">{p_text(comparison['primary']['p']).replace('<', '&lt;')} " in page
    for cell in comparison["cells"]:
        assert figure_of(cell["did"]["value"], signed=True) in text
    for baseline in merged["baselines"]:
        assert shown(baseline) in text


def test_csv_holds_full_precision(report: Path, merged: Any) -> None:
    with (report.parent / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [row["value"] for row in merged["results"]]
    cell = merged["robustness"]["comparisons"][0]["cells"][0]
    same = {"router": "symphony_smoe", "corruption": cell["corruption"], "severity": str(cell["severity"])}
    row = next(row for row in rows if all(row[name] == value for name, value in same.items()))
    assert float(row["did"]) == cell["did"]["value"]
    assert float(row["p_holm"]) == cell["p_holm"]
    assert row["baseline"] == "smoe"


def test_verdict_of_a_clear_difference(merged: Any) -> None:
    [text] = verdicts(merged["robustness"])
    primary = merged["robustness"]["comparisons"][0]["primary"]
    assert primary["ci_low"] > 0
    assert "symphony_smoe loses" in text
    assert "less than smoe" in text
    assert figure_of(primary["ci_low"], signed=True) in text


def test_verdict_says_so_when_there_is_no_difference(tmp_path: Path) -> None:
    pair = [fixture.write_evaluation(tmp_path / r, router=r, sturdiness=0.3) for r in ("smoe", "xmoe")]
    page = write_report(pair, tmp_path / "out", resampling=FAST)
    merged = json.loads((page.parent / "results.json").read_text())
    assert "no difference in robustness shown" in verdicts(merged["robustness"])[0]
    assert "no difference in robustness shown" in page.read_text()


def test_mce_is_not_called_so_for_three_corruptions(page: str, merged: Any) -> None:
    assert "Mean corruption error, 3 of 15 corruptions (smoe = 100)" in page
    assert "mCE" not in re.sub(r"<[^>]*>", "", page)
    assert merged["robustness"]["models"][1]["mean_corruption_error"]["baseline"] == "smoe"


def test_baseline_can_be_named(folders: list[Path], tmp_path: Path) -> None:
    page = write_report(folders, tmp_path / "out", baseline="symphony_smoe", resampling=FAST)
    merged = json.loads((page.parent / "results.json").read_text())
    assert merged["robustness"]["comparisons"][0]["baseline"] == "symphony_smoe"
    with pytest.raises(InputError, match="no model with router 'other'"):
        write_report(folders, tmp_path / "out", baseline="other", resampling=FAST)


def test_output_may_be_the_only_input(folders: list[Path], tmp_path: Path) -> None:
    folder = _copy(folders[1], tmp_path / "one")
    before = json.loads((folder / "results.json").read_text())
    predictions = {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()}
    page = write_report([folder], folder, resampling=FAST)
    after = json.loads((folder / "results.json").read_text())
    assert {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()} == predictions
    assert after["provenance"] == before["provenance"]
    assert after["baselines"] == before["baselines"]
    assert len(after["results"]) == len(before["results"])
    assert after["robustness"]["models"][0]["retention"]["value"] > 0
    assert "of it under corruption" in page.read_text()
    first = {name: (folder / name).read_bytes() for name in OUTPUTS}
    write_report([folder / "results.json"], folder, resampling=FAST)
    assert {name: (folder / name).read_bytes() for name in OUTPUTS} == first


def test_output_may_be_one_of_several_inputs(folders: list[Path], tmp_path: Path) -> None:
    pair = [_copy(folder, tmp_path / folder.name) for folder in folders]
    before = (pair[0] / "results.json").read_bytes()
    write_report(pair, pair[0], resampling=FAST)
    assert (pair[0] / "results.json").read_bytes() == before
    assert len(json.loads((pair[0] / "report.results.json").read_text())["robustness"]["models"]) == 2


def test_clean_only_without_training_or_predictions(folders: list[Path], tmp_path: Path) -> None:
    folder = _copy(folders[0], tmp_path / "bare")
    document = json.loads((folder / "results.json").read_text())
    document["results"] = [row for row in document["results"] if row["corruption"] == "none"]
    del document["baselines"]
    (folder / "results.json").write_text(json.dumps(document))
    for name in ("training.json", "manifest.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "predictions")
    page = write_report([folder], tmp_path / "out", resampling=FAST).read_text()
    assert re.findall(r'<section id="(\w+)"', page) == ["verdict", "warnings", "clean", "types", "methods"]
    for text in ("no manifest.json", "no predictions", "no training.json"):
        assert text in page


def test_warnings_name_errors_and_unparsed_answers(folders: list[Path], tmp_path: Path) -> None:
    folder = _copy(folders[0], tmp_path / "faulty")
    document = json.loads((folder / "results.json").read_text())
    document["results"][0] |= {"n_errors": 3, "n_unparsed": 5}
    document["baselines"][0]["value"] = 0.9
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "manifest.json").write_text('{"limit": 160, "corrupted_limit": null}')
    page = write_report([folder], tmp_path / "out", resampling=FAST).read_text()
    warnings = page[page.index('id="warnings"') : page.index('id="clean"')]
    for text in ("3 of ", "5 of ", "limited to about 160", "not clearly above the baseline"):
        assert text in warnings


def _break_row(folder: Path) -> None:
    document = json.loads((folder / "results.json").read_text())
    del document["results"][1]["metric"]
    (folder / "results.json").write_text(json.dumps(document))


def _break_line(folder: Path) -> None:
    file = folder / "predictions" / "scenes.fog.1.jsonl"
    file.write_text(file.read_text()[:-20])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "results.json").unlink(), "no results.json"),
        (lambda f: (f / "results.json").write_text("{"), r"results\.json: not valid JSON"),
        (lambda f: (f / "results.json").write_text('{"results": []}'), "at least one entry"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json: expected a JSON object"),
        (_break_row, r"results\[1\]: field 'metric' is missing"),
        (_break_line, r"scenes\.fog\.1\.jsonl: line 160: not valid JSON"),
    ],
)
def test_bad_input_names_the_file(folders: list[Path], tmp_path: Path, fault: Any, message: str) -> None:
    folder = _copy(folders[0], tmp_path / "broken")
    fault(folder)
    with pytest.raises(InputError, match=message):
        write_report([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_results_twice_are_refused(folders: list[Path], tmp_path: Path) -> None:
    copy = _copy(folders[0], tmp_path / "copy")
    with pytest.raises(InputError, match="there twice"):
        write_report([folders[0], copy], tmp_path / "out")
    with pytest.raises(InputError, match="no evaluation folder"):
        write_report([], tmp_path / "out")


def test_two_models_with_one_router_are_told_apart(folders: list[Path], tmp_path: Path) -> None:
    copy = _copy(folders[0], tmp_path / "seed1")
    text = (copy / "results.json").read_text().replace("runs/quickstart/", "runs/seed1/")
    (copy / "results.json").write_text(text)
    page = write_report([folders[0], copy], tmp_path / "out", resampling=FAST).read_text()
    assert "smoe (quickstart)" in page
    assert "smoe (seed1)" in page


def test_deep_models_show_a_selection_of_layers(folders: list[Path], tmp_path: Path) -> None:
    folder = _copy(folders[1], tmp_path / "deep")
    training = fixture.make_training("symphony_smoe", n_layers=24, n_experts=20)
    (folder / "training.json").write_text(json.dumps(training))
    page = write_report([folder], tmp_path / "out", resampling=FAST).read_text()
    assert "8 of 24 layers, evenly chosen" in page
    assert page.count("Heat map of the 20 x 20 adjacency") == 8
    assert len(page) < 3_000_000
