"""Settings of a stage that cannot work together are errors of the recipe, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from symphony_vlm.config.stage import StageConfig


def stage(**settings: Any) -> StageConfig:
    return StageConfig.model_validate(
        {"name": "instruct", "kind": "multimodal", "train": {"language_model": 1e-3}} | settings
    )


@pytest.mark.parametrize("engine", ["zero3", "zero3_offload", "fsdp2"])
@pytest.mark.parametrize("setting", [{"ema_decay": 0.99}, {"sample_generations": 2}])
def test_what_needs_whole_weights_is_refused_where_they_are_in_parts(engine: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"'{next(iter(setting))}' needs whole weights .*{engine}"):
        stage(engine=engine, **setting)
    assert stage(engine="zero2", **setting).engine == "zero2"


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp2", "mine.json"])
def test_expert_parallelism_works_beside_ddp_alone(engine: str) -> None:
    with pytest.raises(ValidationError, match=f"beside DDP alone, not beside 'engine: {engine}'"):
        stage(engine=engine, expert_parallel_size=2)
    assert stage(engine="ddp", expert_parallel_size=2).expert_parallel_size == 2


@pytest.mark.parametrize(
    "setting", [{"ema_decay": 0.9}, {"sample_generations": 1}, {"compile": True}, {"lora": {"rank": 4}}]
)
def test_what_needs_all_experts_in_a_process_excludes_expert_parallelism(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"'{next(iter(setting))}' and 'expert_parallel_size' exclude"):
        stage(expert_parallel_size=2, **setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"packing": True}, {"group_by": "length"}, {"independent_turns": True}, {"resize_mode": "crop"},
        {"lora": {"rank": 4}}, {"sample_generations": 1}, {"cache_features": True}, {"expert_parallel_size": 2},
    ],
)  # fmt: skip
def test_a_setting_of_multimodal_stages_elsewhere_is_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"'{next(iter(setting))}' belongs to multimodal stages"):
        StageConfig.model_validate({"name": "language", "kind": "text"} | setting)
