"""The file that says where a run stands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.run_state import RunState


def test_facts_about_a_stage_are_on_disk_at_once_and_added_up(tmp_path: Path) -> None:
    state = RunState(tmp_path / "run", load_recipe("tiny"))
    state.set("language", status="running", step=0)
    state.set("language", step=4)
    again = RunState(tmp_path / "run", load_recipe("tiny"))
    assert again.get("language") == {"status": "running", "step": 4}
    assert not again.is_done("language")
    assert again.get("instruct") == {}
    again.set("language", status="done")
    assert RunState(tmp_path / "run", load_recipe("tiny")).is_done("language")


def test_a_kill_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState(tmp_path, load_recipe("tiny"))
    state.set("language", step=4)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        state.set("language", step=5)
    assert json.loads((tmp_path / "state.json").read_text())["stages"]["language"]["step"] == 4


def test_another_recipe_is_refused_once_a_stage_has_begun_and_the_files_stay(tmp_path: Path) -> None:
    RunState(tmp_path, load_recipe("tiny")).set("encoder", status="running", step=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"seed \(0 before, 9 now\)"):
        RunState(tmp_path, load_recipe("tiny", ["seed=9"]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_recipe_that_never_began_a_stage_may_be_replaced_with_all_that_was_made_for_it(tmp_path: Path) -> None:
    RunState(tmp_path, load_recipe("tiny"))
    (tmp_path / "tokenizer").mkdir()
    RunState(tmp_path, load_recipe("tiny", ["seed=9"]))
    assert not (tmp_path / "tokenizer").exists()
    assert "seed: 9" in (tmp_path / "recipe.resolved.yaml").read_text()


def test_a_stage_more_or_less_is_a_difference(tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    RunState(tmp_path, recipe).set("encoder", status="running")
    with pytest.raises(InputError, match="it differs in stages"):
        RunState(tmp_path, recipe.model_copy(update={"stages": recipe.stages[:-1]}))
