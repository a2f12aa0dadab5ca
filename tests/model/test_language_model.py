"""A language model with sparse layers by itself: saved by its own class or converted in place, trained, resumed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.training.callbacks import ExpertGraphUpdate

VOCAB_SIZE = 48
MOE = MoEConfig(num_experts=4, momentum=0.5)


def dense(family: str = "llama", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    config = AutoConfig.for_model(
        family, **sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=None, **settings
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(0.0, 0.3)
    return model.eval()


def upcycled(family: str = "llama", moe: MoEConfig = MOE, **settings: Any) -> PreTrainedModel:
    model = dense(family, **settings)
    sv.upcycle_(model, moe)
    # Graphs and gates as training leaves them: not what a fresh model would have anyway.
    generator = torch.Generator().manual_seed(3)
    for _, graph in expert_graphs(model):
        rows = torch.rand(graph.adjacency_EE.shape, generator=generator)
        graph.adjacency_EE.copy_(rows / rows.sum(1, keepdim=True))
    for _, layer in sparse_layers(model):
        for weight in layer.experts.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def token_ids(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_model_converted_in_place_is_saved_and_opened_under_any_name(tmp_path: Path, family: str, tied: bool) -> None:
    model = upcycled(family, tie_word_embeddings=tied)
    expected = logits_of(model, token_ids())
    model.save_pretrained(tmp_path / "saved")
    # Saving is reading: it must not disturb the model.
    assert torch.equal(logits_of(model, token_ids()), expected)
    (tmp_path / "saved").rename(tmp_path / "xq7")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "xq7")
    assert isinstance(opened, sv.SymphonyForCausalLM)
    assert torch.equal(logits_of(opened, token_ids()), expected)
    # And again by the class that it has become.
    opened.save_pretrained(tmp_path / "zw1")
    assert torch.equal(logits_of(sv.load_language_model(tmp_path / "zw1"), token_ids()), expected)


@pytest.mark.parametrize("settings", [{"shared_expert": True}, {"expert_split": 2}, {"router": "symphony_xmoe"}])
def test_every_form_of_sparse_layer_survives_saving(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = upcycled(moe=MoEConfig(**settings))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(sv.load_language_model(tmp_path), token_ids()), logits_of(model, token_ids()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself_and_not_the_original(
    tmp_path: Path, duplicate: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    model = upcycled()
    twin = duplicate(model)
    with torch.no_grad():
        twin.lm_head.weight += 1.0
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits_of(sv.load_language_model(tmp_path), token_ids()), logits_of(twin, token_ids()))
    assert not torch.equal(logits_of(twin, token_ids()), logits_of(model, token_ids()))


def test_sixteen_bits_leave_the_router_in_thirty_two(tmp_path: Path) -> None:
    upcycled(moe=MoEConfig(router="symphony_xmoe")).save_pretrained(tmp_path)
    model = sv.load_language_model(tmp_path, dtype="bfloat16")
    for _, layer in sparse_layers(model):
        assert layer.experts.down_proj.dtype == torch.bfloat16
        tensors = {name: t for name, t in layer.router.state_dict().items() if t.is_floating_point()}
        assert len(tensors) == 3 and {t.dtype for t in tensors.values()} == {torch.float32}
    assert logits_of(model, token_ids()).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_it_generates_with_a_cache_what_it_generates_without(tmp_path: Path, family: str) -> None:
    model = upcycled(family)
    model.save_pretrained(tmp_path)
    opened = sv.load_language_model(tmp_path)
    ids = token_ids(3, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # left padding
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    answer = opened.generate(ids, **arguments)
    assert answer.shape == (3, 13)
    assert torch.equal(answer, opened.generate(ids, use_cache=False, **arguments))
    assert torch.equal(answer, model.generate(ids, **arguments))
    beams = opened.generate(ids, num_beams=2, **arguments)
    assert torch.equal(beams, model.generate(ids, num_beams=2, **arguments))


def test_the_loss_is_cross_entropy_plus_the_weighted_router_losses_and_says_so(tmp_path: Path) -> None:
    model = upcycled()
    model.save_pretrained(tmp_path)
    opened = sv.load_language_model(tmp_path)
    ids = token_ids()
    out = opened(input_ids=ids, labels=ids)
    assert {"cross_entropy", "router", "balance", "z", "balance/0", "z/1"} <= set(out.loss_parts)
    torch.testing.assert_close(out.loss, out.loss_parts["cross_entropy"] + out.loss_parts["router"])
    expected = 0.01 * out.loss_parts["balance"] + 0.001 * out.loss_parts["z"]
    torch.testing.assert_close(out.loss_parts["router"], expected)
    # The model that was converted in place computes its loss itself; the sums are taken in another order.
    torch.testing.assert_close(out.loss, model(input_ids=ids, labels=ids).loss, atol=1e-5, rtol=1e-5)


class Stop(TrainerCallback):
    """Stops after a step, as a kill between two checkpoints would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def train(model: PreTrainedModel, folder: Path, *, stop: int | None = None, resume: bool = False) -> list[float]:
    rows = token_ids(16, 9, seed=1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    callbacks: list[TrainerCallback] = [ExpertGraphUpdate()]
    callbacks += [Stop(stop)] if stop else []
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("form", ["converted in place", "own class"])
def test_a_trainer_resumes_as_if_there_had_been_no_interruption(tmp_path: Path, form: str) -> None:
    upcycled().save_pretrained(tmp_path / "start")

    def start() -> PreTrainedModel:
        return upcycled() if form == "converted in place" else sv.load_language_model(tmp_path / "start")

    whole, first, second = start(), start(), start()
    losses = train(whole, tmp_path / "whole")
    assert losses[-1] < losses[0]
    train(first, tmp_path / "parts", stop=3)
    # A fresh model: whatever is not in the checkpoint would be missing from what follows.
    resumed = train(second, tmp_path / "parts", resume=True)
    assert resumed == losses
    for (name, one), (_, other) in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert {int(graph.num_updates) for _, graph in expert_graphs(second)} == {6}
    # The checkpoint of a step is a model like any other.
    opened = sv.load_language_model(tmp_path / "whole" / "checkpoint-6")
    assert torch.equal(logits_of(opened, token_ids()), logits_of(whole.eval(), token_ids()))


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_an_error_that_names_them(tmp_path: Path, change: str) -> None:
    upcycled().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        name = "model.layers.0.mlp.extra"
        weights[name] = torch.zeros(3)
    else:
        weights[name] = weights[name][:, :, :-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 {change}.*{name}"):
        sv.load_language_model(tmp_path)


def test_the_two_loaders_point_at_each_other(tmp_path: Path, tiny_model_folder: Path) -> None:
    upcycled().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="load_language_model"):
        sv.load(tmp_path)
    with pytest.raises(InputError, match=r"symphony_vlm\.load"):
        sv.load_language_model(tiny_model_folder)


def test_a_configuration_without_sparse_layers_is_refused(tmp_path: Path) -> None:
    upcycled().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe": None}))
    with pytest.raises(InputError, match="no settings for them"):
        sv.load_language_model(tmp_path)


def test_a_sparse_language_model_is_no_part_of_a_vision_language_model() -> None:
    config = sv.SymphonyLMConfig(text_config=dense().config, moe=MOE)
    with pytest.raises(InputError, match="has sparse layers already"):
        sv.SymphonyVLMConfig(text_config=config)


def test_an_incomplete_folder_is_not_sent_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.push_to_hub"):
        upcycled().save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_a_dense_language_model_of_hugging_face_opens_too(tmp_path: Path) -> None:
    model = dense()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(sv.load_language_model(tmp_path), token_ids()), logits_of(model, token_ids()))
    with pytest.raises(InputError, match="no such model folder"):
        sv.load_language_model(tmp_path / "nowhere")
