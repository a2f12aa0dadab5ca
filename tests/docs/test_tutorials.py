"""What the tutorials show as YAML and Python is valid, and what they quote of files is what the files hold."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import typer

from symphony_vlm.cli import app
from symphony_vlm.config.loading import load_moe_settings, load_recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXAMPLES = DOCS / "examples"


def _blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_recipe_with_pretrained_parts_is_valid(tmp_path: Path) -> None:
    (block,) = _blocks("tutorials/own-data.md", "yaml")
    (tmp_path / "mine.yaml").write_text(block)
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert [stage.upcycle for stage in recipe.stages] == [False, True]
    assert recipe.model.language.name == "Qwen/Qwen3-0.6B"


def test_the_settings_of_experts_are_valid_and_can_be_exported(tmp_path: Path) -> None:
    settings, stage = _blocks("tutorials/dense-to-moe.md", "yaml")
    (tmp_path / "moe.yaml").write_text(settings)
    config = load_moe_settings(str(tmp_path / "moe.yaml"))
    assert (config.router, config.smooth) == ("symphony_smoe", "logits")
    recipe = (EXAMPLES / "colours.yaml").read_text()
    assert all(line in recipe for line in stage.splitlines())


def test_the_recipe_of_the_examples_is_valid() -> None:
    recipe = load_recipe(str(EXAMPLES / "colours.yaml"), ["model.moe.router=symphony_smoe", "model.moe.smooth=logits"])
    assert [stage.name for stage in recipe.stages] == ["dense", "sparse"]


@pytest.mark.parametrize(("page", "file"), [("router", "soft_cap_router.py"), ("task", "tasks/counting.py")])
def test_a_file_in_the_text_is_the_file(page: str, file: str) -> None:
    assert (EXAMPLES / file).read_text(encoding="utf-8") in _blocks(f"tutorials/{page}.md", "python")


def test_a_router_of_ones_own_is_upcycled_trained_and_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from symphony_vlm.moe import router
    from symphony_vlm.moe.configuration import PRESETS

    monkeypatch.setattr(router, "_CLASSES", dict(router._CLASSES))
    for name in list(PRESETS):
        monkeypatch.setitem(PRESETS, name, PRESETS[name])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "soft_cap_router", raising=False)
    _, program = _blocks("tutorials/router.md", "python")
    names: dict[str, object] = {}
    try:
        exec(program, names)
        printed = capsys.readouterr().out
        assert printed.startswith("SoftCapRouter")
        (largest,) = re.findall(r"tensor\((\d\.\d+)", printed)
        assert 0 < float(largest) < 5.0

        import symphony_vlm as sv
        from symphony_vlm.moe.recording import sparse_layers

        names["model"].save_pretrained(tmp_path)  # type: ignore[attr-defined]
        again = sv.load_language_model(tmp_path)
        assert [type(layer.router).__name__ for _, layer in sparse_layers(again)] == ["SoftCapRouter"] * 2
    finally:
        PRESETS.pop("soft_cap", None)
        sys.modules.pop("soft_cap_router", None)


def test_the_counting_questions_are_made_of_the_drawn_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from symphony_vlm.data.scenes import generate_scenes
    from symphony_vlm.evaluation.task import get_task

    monkeypatch.chdir(tmp_path)
    generate_scenes(tmp_path / "runs/scenes", train=1, test=12, seed=3)
    exec(_blocks("tutorials/task.md", "python")[0], {})
    rows = json.loads((tmp_path / "runs/scenes/counting.json").read_text())
    assert f"{len(rows)} questions" in capsys.readouterr().out
    task = get_task(str(EXAMPLES / "tasks/counting.py"))
    items = task.load(tmp_path / "runs/scenes/counting.json", None, tmp_path, 0)
    assert len(items) == len(rows) > 3
    assert task.score(f"I see {items[0].answers[0]}.", items[0]).score == 1.0


def test_the_reference_of_the_command_line_has_every_command() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    page = (DOCS / "reference/command-line.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(.*?)`", row)}
    for name, command in commands.items():
        for full in [f"{name} {inner}" for inner in getattr(command, "commands", {})] or [name]:
            assert full in listed, full
