"""The Trainer with every router: continuing from a checkpoint, and evaluating on the way, change no bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, TrainingArguments

import symphony_vlm as sv
from symphony_vlm.moe.configuration import PRESETS
from symphony_vlm.moe.expert_graph import expert_graphs, set_expert_graph_
from symphony_vlm.training.callbacks import ExpertGraphUpdate
from symphony_vlm.training.trainer import StageTrainer

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"router": name} for name in PRESETS},
    "learnable": {"router": "smoe", "expert_graph": "learnable"},
    "fixed": {"router": "smoe", "expert_graph": "fixed"},
    "soft": {"counts": "soft"},
    "native": {"router": "symphony_smoe"},
}
STEPS, HALF = 4, 2

MakeModel = Callable[..., PreTrainedModel]


def make_model(language_model: MakeModel, variant: str) -> PreTrainedModel:
    settings = {"num_experts": 4, "momentum": 0.5, "strength": 0.9, **VARIANTS[variant]}
    if variant == "native":
        sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4}
        torch.manual_seed(0)
        model: PreTrainedModel = MixtralForCausalLM(MixtralConfig(**sizes, **heads, pad_token_id=0))
        sv.symphonize_(model, sv.MoEConfig(**settings))
        return model
    model = language_model()
    sv.upcycle_(model, sv.MoEConfig(expert_init_noise=0.5, **settings))
    if variant == "fixed":
        rows_EE = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
        set_expert_graph_(model, rows_EE / rows_EE.sum(1, keepdim=True))
    return model


def make_rows(token_ids: Callable[..., Tensor], count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences of the same size, of which the odd ones end in padding."""
    rows = []
    for i, ids in enumerate(token_ids(count, 8, seed=seed)):
        mask = torch.ones(8, dtype=torch.long)
        mask[5:] = 1 - i % 2
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def run(
    model: PreTrainedModel,
    folder: Path,
    token_ids: Callable[..., Tensor],
    *,
    start: Path | None = None,
    evaluate: bool = False,
) -> dict[str, Tensor]:
    """The model's tensors after `STEPS` steps of two micro-batches each, the last in a second epoch."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        save_steps=HALF,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=make_rows(token_ids, 12, seed=1),
        eval_dataset=make_rows(token_ids, 4, seed=2) if evaluate else None,
        rates={"": 0.01},
        callbacks=[ExpertGraphUpdate()],
    )
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    assert trainer.state.global_step == STEPS
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(
    language_model: MakeModel, token_ids: Callable[..., Tensor], tmp_path: Path, variant: str
) -> None:
    model = make_model(language_model, variant)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = run(model, tmp_path, token_ids)
    resumed = make_model(language_model, variant)
    assert differing(resumed.state_dict(), start) == []
    assert differing(run(resumed, tmp_path, token_ids, start=tmp_path / f"checkpoint-{HALF}"), whole) == []
    # All that is trained or counted has moved on the way, so that none of it can be what the model began with.
    still = [name for name in whole if torch.equal(whole[name], start[name])]
    may_stay = {"learnable": ("num_updates",), "fixed": ("num_updates", "adjacency_EE")}.get(variant, ())
    assert [name for name in still if not name.endswith(may_stay)] == []
    assert all(int(graph.num_updates) in (0, STEPS) for _, graph in expert_graphs(resumed))


@pytest.mark.parametrize("variant", ["symphony_smoe", "attention_smoe", "learnable"])
def test_evaluation_inside_training_changes_no_bit(
    language_model: MakeModel, token_ids: Callable[..., Tensor], tmp_path: Path, variant: str
) -> None:
    quiet, evaluated = make_model(language_model, variant), make_model(language_model, variant)
    expected = run(quiet, tmp_path / "quiet", token_ids)
    assert differing(run(evaluated, tmp_path / "evaluated", token_ids, evaluate=True), expected) == []
