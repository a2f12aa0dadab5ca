"""From a stage's settings to its engine's: which are refused, and what each engine is told."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from symphony_vlm.config.engines import ENGINES
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.reading import config_folder
from symphony_vlm.config.recipe import StageConfig
from symphony_vlm.errors import InputError
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.training.deepspeed_settings import LEAF_MODULE, deepspeed_settings, is_deepspeed
from symphony_vlm.training.engine import check_engines, engine_arguments, opening_accelerate, with_accumulation
from symphony_vlm.training.gathering import gather_, refuse_empty_tensors
from symphony_vlm.training.run import train

PACKAGED = [name for name in ENGINES if is_deepspeed(name)]


def stage(**settings: Any) -> StageConfig:
    return StageConfig.model_validate({"name": "s", "kind": "text", "batch_size": 4, **settings})


def test_an_unknown_engine_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="'engine': 'zero4' is none of auto, ddp, .* did you mean 'zero"):
        load_recipe("tiny", ["stages.instruct.engine=zero4"])


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in ("auto", "ddp")])
def test_a_contrastive_stage_cannot_be_sharded(engine: str) -> None:
    with pytest.raises(InputError, match=f"'engine: {engine}' cannot share out a contrastive stage, only auto and ddp"):
        load_recipe("tiny", [f"stages.encoder.engine={engine}"])


def test_the_accumulation_follows_from_the_global_batch() -> None:
    for processes, accumulation in ((1, 12), (2, 6), (12, 1)):
        resolved = with_accumulation(stage(global_batch_size=48), processes)
        assert (resolved.gradient_accumulation_steps, resolved.global_batch_size) == (accumulation, None)
    unset = stage(gradient_accumulation_steps=3)
    assert with_accumulation(unset, 2) is unset
    with pytest.raises(InputError, match=r"48 samples .* micro-batches of 4 on 5 processes \(20 at a time\)"):
        with_accumulation(stage(global_batch_size=48), 5)
    with pytest.raises(InputError, match="leave out 'gradient_accumulation_steps'"):
        load_recipe("tiny", ["stages.0.global_batch_size=32", "stages.0.gradient_accumulation_steps=2"])


def test_an_engine_without_a_launcher_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"stages\.instruct\.engine: engine fsdp2 works in processes that a launcher"):
        check_engines(load_recipe("tiny", ["stages.instruct.engine=fsdp2"]))
    with pytest.raises(InputError, match=r"stages\.language\.global_batch_size: 6 samples"):
        check_engines(load_recipe("tiny", ["stages.language.global_batch_size=6"]))


def test_a_missing_deepspeed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        "symphony_vlm.training.engine.find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    with pytest.raises(InputError, match=r"needs DeepSpeed, which is not installed\. pip install symphony-vlm\[deep"):
        check_engines(load_recipe("tiny", ["stages.instruct.engine=zero2"]))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_files_hold_the_engine_and_nothing_of_the_recipe(name: str) -> None:
    text = (config_folder() / "deepspeed" / f"{name}.json").read_text()
    assert list(json.loads(text)) == ["zero_optimization"]
    settings = deepspeed_settings(stage(engine=name, bf16=True, gradient_accumulation_steps=3, max_grad_norm=0.5), 2)
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in settings["zero_optimization"]) == name.endswith("offload")
    filled = {key: value for key, value in settings.items() if key != "zero_optimization"}
    assert filled == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def write(path: Path, values: Any) -> str:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_a_users_file_keeps_what_is_the_engines(tmp_path: Path) -> None:
    values = {
        "zero_optimization": {"stage": 3, "sub_group_size": 1e8, "leaf_module": {"classes": ["a.B"]}},
        "bf16": {"enabled": "auto", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": "auto",
        "wall_clock_breakdown": True,
    }
    settings = deepspeed_settings(stage(engine=write(tmp_path / "own.json", values)), 1)
    leaves = {"classes": ["a.B", LEAF_MODULE]}
    assert settings["zero_optimization"] == {"stage": 3, "sub_group_size": 1e8, "leaf_module": leaves}
    assert settings["bf16"] == {"enabled": False, "check_grad_overflow": True}
    assert "fp16" not in settings and settings["wall_clock_breakdown"] is True
    assert settings["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train_batch_size": 7},
            r"train_batch_size is 7, .* \(batch_size, grad.* and global_batch_size\), .* makes it 8",
        ),
        ({"train_micro_batch_size_per_gpu": 1}, r"per_gpu is 1, but .* \(batch_size\), which makes it 4"),
        ({"gradient_accumulation_steps": 4}, r"steps is 4, .* \(gradient_accumulation_steps\), which makes it 1"),
        ({"gradient_clipping": 0.3}, r"gradient_clipping is 0.3, but .* \(max_grad_norm\), which makes it 1.0"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled is true, but .* \(bf16\), which makes it false"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled is true, but .* \(bf16\)"),
        (
            {"optimizer": {}},
            r"'optimizer' is set, but that is for the recipe to say \(train, weight_decay, adam_beta2\)",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, r"'scheduler' is set, .* \(schedule, warmup_ratio\)\. Leave it out"),
        ("{", "own.json: not valid JSON"),
        ([], "own.json: a DeepSpeed configuration is an object"),
    ],
)
def test_a_users_file_that_contradicts_the_recipe_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        deepspeed_settings(stage(engine=write(tmp_path / "own.json", values)), 2)


def test_a_missing_file_is_named_with_the_stage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stages\.s\.engine: .*none\.json: no such file"):
        deepspeed_settings(stage(engine=str(tmp_path / "none.json")), 1)


def test_the_leaf_module_exists_under_its_name() -> None:
    assert f"{SparseMoE.__module__}.{SparseMoE.__qualname__}" == LEAF_MODULE


def test_fsdp_shards_decoder_layers_and_blocks_of_the_tower(tiny_moe_model: Any) -> None:
    arguments = engine_arguments(stage(engine="fsdp2"), tiny_moe_model)
    layers = tiny_moe_model.language_model.model.layers
    blocks = {type(layers[0]).__name__, "ResidualAttentionBlock"}
    assert set(arguments["fsdp_config"]["transformer_layer_cls_to_wrap"]) == blocks
    assert arguments["fsdp"] is True and arguments["fsdp_config"]["version"] == 2
    assert engine_arguments(stage(engine="ddp"), tiny_moe_model) == {}


def test_gathering_keeps_ties_and_puts_back_what_was_frozen() -> None:
    assert PartialState().is_main_process
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False), "c": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    exact = torch.full((2, 2), 1 / 3)
    before = model["a"].weight.detach().clone()
    gather_(model, {"c.weight": exact})
    assert model["a"].weight is model["b"].weight and torch.equal(model["a"].weight, before)
    assert torch.equal(model["c"].weight, exact) and not model["c"].weight.requires_grad
    assert [name for name, _ in model.named_parameters()] == ["a.weight", "c.weight", "c.bias"]


def test_an_empty_tensor_is_never_saved(tmp_path: Path) -> None:
    save_file({"whole": torch.ones(2)}, tmp_path / "model-1.safetensors")
    refuse_empty_tensors(tmp_path)
    save_file({"gone": torch.empty(0), "whole": torch.ones(())}, tmp_path / "model-2.safetensors")
    with pytest.raises(InputError, match=r"model-2\.safetensors: 1 tensors would be saved empty \(gone\)"):
        refuse_empty_tensors(tmp_path)


def test_a_stage_goes_on_with_as_many_processes_as_it_was_begun_with(
    tiny_run: Any, tmp_path: Path, quiet: Console
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run.folder, run, symlinks=True)
    state = json.loads((run / "state.json").read_text())
    assert {stage["processes"] for stage in state["stages"].values()} == {1}
    state["stages"]["instruct"] |= {"status": "running", "processes": 2}
    (run / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"instruct: the stage was begun by 2 processes and cannot go on with 1: each"):
        train(load_recipe("tiny"), run, console=quiet)


def test_one_process_uses_one_of_several_gpus() -> None:
    arguments = SimpleNamespace(n_gpu=4, fsdp_plugin_args=None)
    with opening_accelerate(arguments):  # type: ignore[arg-type]
        assert arguments._n_gpu == 1
