"""The whole path in one call, with the recipe ``tiny``: shared stages, one run per router, evaluation, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import symphony_vlm
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.quickstart import quickstart

ROUTERS = ["smoe", "symphony_smoe"]
CELLS = ["scenes/none/0", "scenes/fog/1", "scenes/fog/5"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Small, with two corrupted cells."""
    settings = ["evaluation.corruptions=[fog]", "evaluation.severities=[1, 5]", "evaluation.limit=16"]
    return load_recipe("tiny", [*settings, "evaluation.corrupted_limit=8", "evaluation.max_new_tokens=3"])


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the summary."""
    output = tmp_path_factory.mktemp("quickstart") / "out"
    return output, quickstart(recipe, output, ROUTERS, console=Console(quiet=True))


def test_each_router_has_a_model_and_the_page_and_the_results_are_written(made: tuple[Path, dict[str, Any]]) -> None:
    output, summary = made
    for router in ROUTERS:
        model = symphony_vlm.load(output / router / "model", device="cpu")
        assert model.config.moe["router"] == router
    assert summary["results"] == str(output / "results.json")
    assert summary["report"] == str(output / "report.html")
    assert (output / "report.html").is_file()
    results = json.loads((output / "results.json").read_text())["results"]
    assert {row["router"] for row in results} == set(ROUTERS)
    assert {router: list(cells) for router, cells in summary["headline"].items()} == dict.fromkeys(ROUTERS, CELLS)


def test_the_models_cards_tell_the_results(made: tuple[Path, dict[str, Any]]) -> None:
    output, _ = made
    entries = json.loads((output / "results.json").read_text())["robustness"]["models"]
    assert len(entries) == len(ROUTERS)
    for entry in entries:
        (router,) = [name for name in ROUTERS if Path(entry["model"]) == output / name / "model"]
        card = (output / router / "model" / "README.md").read_text()
        assert f"| scenes | accuracy | {entry['clean']['value']:.4f} [" in card
        assert f"- {router}\n" in card.partition("---\n\n")[0]


def test_the_routers_start_from_the_same_weights_and_see_the_same_data(made: tuple[Path, dict[str, Any]]) -> None:
    """Their first losses are equal: upcycling changes no output, and a new graph is the identity."""
    output, _ = made
    first = []
    for router in ROUTERS:
        entries = map(json.loads, (output / router / "log.jsonl").read_text().splitlines())
        entry = next(entry for entry in entries if "loss" in entry)
        assert (entry["stage"], entry["step"]) == ("instruct", 1)
        first.append((entry["cross_entropy"], entry["balance"], entry["z"]))
    assert first[0] == first[1]
    hashes = [json.loads((output / router / "provenance.json").read_text())["data_sha256"] for router in ROUTERS]
    assert hashes[0] == hashes[1]


def test_the_routers_are_compared_on_the_same_pixels(made: tuple[Path, dict[str, Any]]) -> None:
    output, _ = made
    seen = []
    for router in ROUTERS:
        lines = (output / "evaluation" / router / "predictions" / "scenes.fog.5.jsonl").read_text().splitlines()
        seen.append([(record["item_id"], record["pixels_sha256"]) for record in map(json.loads, lines)])
    assert seen[0] == seen[1]


def test_what_the_words_alone_score_is_a_baseline_of_both(made: tuple[Path, dict[str, Any]]) -> None:
    output, summary = made
    for router in ROUTERS:
        document = json.loads((output / "evaluation" / router / "results.json").read_text())
        values = [row["value"] for row in document["baselines"] if row["name"].startswith("text only")]
        assert len(values) == 2
        assert max(values) == summary["text_only"]


def test_running_again_trains_and_answers_nothing_and_says_the_same(
    recipe: Recipe, made: tuple[Path, dict[str, Any]]
) -> None:
    output, summary = made
    patterns = ("**/model/*.safetensors", "**/log.jsonl", "**/predictions/*.jsonl")

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for pattern in patterns for path in output.glob(pattern)}

    before = written()
    again = quickstart(recipe, output, ROUTERS, console=Console(quiet=True))
    assert {**again, "seconds": None} == {**summary, "seconds": None}
    assert len(before) > 8 and written() == before


def test_with_one_core_the_routers_are_evaluated_together_and_find_the_same(
    recipe: Recipe, made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, summary = made
    (output / "evaluation").rename(tmp_path / "apart")
    monkeypatch.setattr("symphony_vlm.quickstart.os.cpu_count", lambda: 1)
    together = quickstart(recipe, output, ROUTERS, console=Console(quiet=True))
    assert together["headline"] == summary["headline"]
    names = sorted(path.relative_to(tmp_path / "apart") for path in (tmp_path / "apart").glob("*/predictions/*.jsonl"))
    assert len(names) == 2 * len(CELLS)
    for name in names:
        found, expected = ((folder / name).read_text() for folder in (output / "evaluation", tmp_path / "apart"))
        assert [json.loads(line) | {"seconds": 0} for line in found.splitlines()] == [
            json.loads(line) | {"seconds": 0} for line in expected.splitlines()
        ]


def test_a_fault_in_a_routers_process_reaches_the_caller(recipe: Recipe, made: tuple[Path, dict[str, Any]]) -> None:
    output, _ = made
    manifest = output / "evaluation" / "symphony_smoe" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"limit": 8}))
    try:
        with pytest.raises(InputError, match="holds another evaluation; it differs in limit") as caught:
            quickstart(recipe, output, ROUTERS, console=Console(quiet=True))
    finally:
        manifest.write_text(text)
    assert caught.value.where == str(manifest.parent) and caught.value.remedy == "Give another --output."


def test_a_recipe_with_nothing_before_the_upcycling_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    only = recipe.model_copy(update={"stages": recipe.stages[-1:]})
    with pytest.raises(InputError, match="needs stages before the one that upcycles"):
        quickstart(only, tmp_path, ROUTERS, console=Console(quiet=True))
