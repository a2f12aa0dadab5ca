"""A run's folder, what a second start does, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import symphony_vlm
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.training.run import train

STAGES = ["encoder", "language", "pretrain", "instruct"]


def _fingerprint(folder: Path) -> dict[str, str]:
    """Every file below the folder with its content's hash and its time of change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in files
    }


def test_every_stage_runs_in_under_a_minute(tiny_run: Any) -> None:
    assert tiny_run.seconds < 60
    state = json.loads((tiny_run.folder / "state.json").read_text())
    assert {name: values["status"] for name, values in state["stages"].items()} == dict.fromkeys(STAGES, "done")


def test_the_folder_is_laid_out_as_documented(tiny_run: Any) -> None:
    run = tiny_run.folder
    for name in ("recipe.resolved.yaml", "provenance.json", "log.jsonl", "state.json"):
        assert (run / name).is_file(), name
    for stage in STAGES:
        assert list((run / "tensorboard" / stage).glob("events.*"))
        assert (run / stage / "model").is_dir()
        checkpoints = list((run / stage).glob("checkpoint-*"))
        assert checkpoints
        for checkpoint in checkpoints:
            assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"} <= {
                path.name for path in checkpoint.iterdir()
            }
    assert (run / "model").resolve() == (run / "instruct" / "model").resolve()


def test_every_stage_leaves_a_card_of_its_model_without_absolute_paths(tiny_run: Any) -> None:
    for number, stage in enumerate(STAGES, start=1):
        card = (tiny_run.folder / stage / "model" / "README.md").read_text()
        assert f"# tiny, stage {stage}\n" in card
        told = [line.split(" ")[1] for line in card.splitlines() if line.startswith(tuple(f"| {s} |" for s in STAGES))]
        assert told == list(STAGES[:number])
        assert str(tiny_run.folder.parent) not in card


def test_no_temporary_file_is_left(tiny_run: Any) -> None:
    assert [path for path in tiny_run.folder.rglob("*") if ".tmp" in path.name] == []


def test_the_resolved_recipe_is_complete_and_reads_back_as_the_same_recipe(tiny_run: Any) -> None:
    text = (tiny_run.folder / "recipe.resolved.yaml").read_text()
    assert Recipe.model_validate(yaml.safe_load(text)) == load_recipe("tiny")
    assert "max_grad_norm" in text, "defaults are written out"


def test_the_provenance_names_versions_seed_data_and_counts(tiny_run: Any) -> None:
    found = json.loads((tiny_run.folder / "provenance.json").read_text())
    state = json.loads((tiny_run.folder / "state.json").read_text())
    assert (found["recipe"], found["seed"]) == ("tiny", 0)
    assert found["recipe_sha256"] == state["recipe_sha256"]
    assert found["versions"]["torch"] == torch.__version__
    for name, digest in found["data_sha256"].items():
        assert hashlib.sha256((tiny_run.folder / "scenes" / name).read_bytes()).hexdigest() == digest
    counts = found["counts"]["train: train.json"]
    assert counts["records"] == counts["train"] + counts["validation"]
    assert counts["faults"] == 0
    assert counts["validation"] > 0


def test_the_result_is_the_last_stages(tiny_run: Any) -> None:
    steps = load_recipe("tiny").stages[-1].max_steps
    assert (tiny_run.result.stage, tiny_run.result.step) == ("instruct", steps)
    losses = [entry["loss"] for entry in tiny_run.log("instruct") if "loss" in entry]
    assert tiny_run.result.loss == losses[-1]
    assert set(tiny_run.result.to_dict()) == {"run", "stage", "step", "loss"}


def test_running_again_does_nothing_and_gives_the_same_result(tiny_run: Any) -> None:
    before = _fingerprint(tiny_run.folder)
    said = io.StringIO()
    assert train(load_recipe("tiny"), tiny_run.folder, console=Console(file=said, width=300)) == tiny_run.result
    assert _fingerprint(tiny_run.folder) == before
    assert "every stage is done" in said.getvalue()


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", r"seed \(0 before, 1 now\)"),
        ("stages.instruct.batch_size=4", r"stages.3.batch_size \(8 before, 4 now\)"),
        ("model.moe.router=smoe", r"model.moe.router \('symphony_smoe' before, 'smoe' now\)"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_naming_what_differs(
    tiny_run: Any, quiet: Console, override: str, difference: str
) -> None:
    before = _fingerprint(tiny_run.folder)
    with pytest.raises(InputError, match=difference) as error:
        train(load_recipe("tiny", [override]), tiny_run.folder, console=quiet)
    assert error.value.where == str(tiny_run.folder)
    assert error.value.remedy is not None and "--output" in error.value.remedy
    assert _fingerprint(tiny_run.folder) == before


def test_a_first_attempt_that_failed_on_its_data_can_be_corrected_in_the_same_folder(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    wrong = only_stage("pretrain", start="language", data={"captions": "no_such_file.json"}, max_steps=1)
    run = tmp_path / "run"
    with pytest.raises(InputError, match="does not exist"):
        train(wrong.model_copy(update={"model": load_recipe("tiny").model}), run, console=quiet)
    result = train(only_stage("pretrain", max_steps=1), run, console=quiet)
    assert result.step == 1
    resolved = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    assert resolved["data"]["captions"][0]["path"].endswith("captions_train.json")


def test_the_saved_model_opens_from_a_folder_of_any_name_with_the_same_bits(tiny_run: Any, tmp_path: Path) -> None:
    renamed = tmp_path / "zebra"
    shutil.copytree(tiny_run.folder / "instruct" / "model", renamed)
    first = symphony_vlm.load(tiny_run.folder)
    second = symphony_vlm.load(renamed)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    picture = next((tiny_run.folder / "scenes" / "images" / "test").glob("*.png"))
    assert first.chat("What color?", images=picture) == second.chat("What color?", images=picture)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_trained_models_keep_keys_and_values_when_they_generate(tiny_run: Any, stage: str) -> None:
    """The Trainer switches that off in the settings; saved, it would make every new token read the prompt again."""
    checkpoints = list((tiny_run.folder / stage).glob("checkpoint-*"))
    assert checkpoints
    for folder in (tiny_run.folder / stage / "model", *checkpoints):
        settings = [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]
        settings += [settings[0].get("text_config") or {}]
        assert all(found.get("use_cache") is not False for found in settings), folder


def test_a_stage_that_starts_from_a_model_saved_without_a_cache_saves_one_with_it(
    tiny_run: Any, only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """As earlier versions saved it, and as transformers' Trainer leaves models of the hub."""
    start = tmp_path / "start"
    shutil.copytree(tiny_run.folder / "pretrain" / "model", start)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((start / name).read_text())
        settings["use_cache"] = False
        if "text_config" in settings:
            settings["text_config"]["use_cache"] = False
        (start / name).write_text(json.dumps(settings))
    recipe = only_stage("instruct", max_steps=1)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"start": str(start)})})
    train(recipe, tmp_path / "run", console=quiet)
    saved = json.loads((tmp_path / "run" / "instruct" / "model" / "config.json").read_text())
    assert saved["use_cache"] is True and saved["text_config"]["use_cache"] is True


def test_a_trained_model_reads_its_prompt_once(tiny_run: Any) -> None:
    model = symphony_vlm.load(tiny_run.folder)
    lengths: list[int] = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.config.use_cache = model.generation_config.use_cache = False  # as earlier versions saved it
    model.chat("What color?", max_new_tokens=4, min_new_tokens=4)
    assert lengths[0] > 1 and lengths[1:] == [1, 1, 1]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_saved_configuration_names_no_folder_of_this_machine(tiny_run: Any, stage: str) -> None:
    text = (tiny_run.folder / stage / "model" / "config.json").read_text()
    assert str(tiny_run.folder) not in text and '"/' not in text


def test_the_model_carries_the_record_of_its_training(tiny_run: Any) -> None:
    record = json.loads((tiny_run.folder / "instruct" / "model" / "training.json").read_text())
    assert record["log"] == tiny_run.log()
    assert {entry["stage"] for entry in record["routing"]} == {"instruct"}
    assert record["provenance"] == json.loads((tiny_run.folder / "provenance.json").read_text())


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        (["language", "architecture"], "num_hiden_layers", "num_hidden_layers"),
        (["vision", "architecture"], "embed_dims", "embed_dim"),
        (["vision", "architecture", "vision_cfg"], "layer", "layers"),
        (["vision", "architecture", "text_cfg"], "contxt_length", "context_length"),
    ],
)
def test_an_unknown_key_of_a_new_architecture_is_refused_before_anything_is_drawn_or_trained(
    tmp_path: Path, quiet: Console, section: list[str], key: str, nearest: str
) -> None:
    """Hugging Face's configs take any key in silence, so a misspelt size would keep its default."""
    values = load_recipe("tiny").model_dump(mode="json")
    target = values["model"]
    for part in section:
        target = target[part]
    target[key] = 3
    with pytest.raises(InputError, match=f"unknown key '{key}'; did you mean '{nearest}'") as error:
        train(Recipe.model_validate(values), tmp_path / "run", console=quiet)
    assert error.value.where == ".".join(["model", *section])
    assert not (tmp_path / "run" / "scenes").exists()


def test_an_unknown_model_type_names_the_nearest(tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(InputError, match="'qwen33' is unknown to transformers; did you mean 'qwen3"):
        train(load_recipe("tiny", ["model.language.architecture.model_type=qwen33"]), tmp_path / "run", console=quiet)
