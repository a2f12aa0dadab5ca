"""Stages with adapters: what trains, what is saved, how it is opened, merged and continued."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import symphony_vlm
from symphony_vlm.cli import main
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.model.loading import adapter_record
from symphony_vlm.model.merged_checkpoint import merge_checkpoint
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.proof import MAX_LOGIT_DIFFERENCE, logits_of_probe
from symphony_vlm.training import stages
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import StageTrainer

RATES = {"projector": 1e-3, "language_model": 1e-2}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1, "experts": True}
STEPS = 6


@dataclass
class AdaptedRun:
    folder: Path
    logits: Tensor
    """Of the model that trained, adapters beside the weights."""

    @property
    def model(self) -> Path:
        return self.folder / "instruct" / "model"


@pytest.fixture(scope="module")
def adapted(only_stage: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> AdaptedRun:
    """A stage that upcycles, so that it must keep the model under its adapters, with adapted experts."""
    run = tmp_path_factory.mktemp("lora") / "run"
    trained: list[Any] = []
    original = stages.fit

    def fit(trainer: StageTrainer, *args: Any) -> None:
        original(trainer, *args)
        trained.append(logits_of_probe(trainer.model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "fit", fit)
        train(only_stage("instruct", train=RATES, lora=LORA, max_steps=STEPS), run, console=quiet)
    return AdaptedRun(run, trained[0])


def _logits(folder: Path) -> Tensor:
    return logits_of_probe(symphony_vlm.load(folder, device="cpu"))


def _unmerged(folder: Path) -> Any:
    record = adapter_record(folder)
    assert record is not None
    return SymphonyVLMForConditionalGeneration.with_adapters(folder, record).eval()


def test_the_saved_adapters_are_what_trained_and_nothing_else(adapted: AdaptedRun) -> None:
    saved, base = (load_file(adapted.folder / "instruct" / name / "model.safetensors") for name in ("model", "base"))
    kinds = {".lora_A.", ".lora_B.", ".router.gate.", ".router.expert_graph.", "projector."}
    assert {kind for name in saved for kind in kinds if kind in name} == kinds
    assert [name for name in saved if not any(kind in name for kind in kinds)] == []
    full = [name for name in saved if name.startswith("projector.") or ".router." in name]
    assert [name for name in full if torch.equal(saved[name], base[name])] == []
    assert [name for name, value in saved.items() if ".lora_B." in name and not value.any()] == []


def test_opened_unmerged_it_is_the_trained_model_to_the_bit_and_merged_but_for_rounding(adapted: AdaptedRun) -> None:
    assert torch.equal(logits_of_probe(_unmerged(adapted.model)), adapted.logits)
    merged = _logits(adapted.folder)
    allowed = MAX_LOGIT_DIFFERENCE * max(1.0, float(adapted.logits.abs().max()))
    assert 0 < (merged - adapted.logits).abs().max() < allowed
    base = _logits(adapted.folder / "instruct" / "base")
    assert (base - adapted.logits).abs().max() > 100 * allowed, "the adapters do something"


def test_merged_weights_are_the_formula(adapted: AdaptedRun) -> None:
    """W + alpha / rank * B A, one product per expert; to the rounding of fp32 sums of 4 products."""
    saved = load_file(adapted.model / "model.safetensors")
    base = load_file(adapted.folder / "instruct" / "base" / "model.safetensors")
    merged = dict(symphony_vlm.load(adapted.folder, device="cpu").named_parameters())
    scale = LORA["alpha"] / LORA["rank"]
    for layer in ("language_model.model.layers.0.", "language_model.model.layers.1."):
        query = f"{layer}self_attn.q_proj."
        product = saved[f"{query}lora_B.default.weight"] @ saved[f"{query}lora_A.default.weight"]
        expected = base[f"{query}weight"] + scale * product
        torch.testing.assert_close(merged[f"{query}weight"], expected, rtol=0, atol=1e-6)
        # The adapters of the first of the two weights are the inner ones.
        for name, inner in (("gate_up_proj", "base_layer."), ("down_proj", "")):
            experts = f"{layer}mlp.experts."
            low = saved[f"{experts}{inner}lora_A.default.weight"].unflatten(0, (4, LORA["rank"]))
            high = saved[f"{experts}{inner}lora_B.default.weight"].unflatten(1, (LORA["rank"], 4))
            for expert in range(4):
                expected = base[experts + name][expert] + scale * high[:, :, expert] @ low[expert]
                torch.testing.assert_close(merged[experts + name][expert], expected, rtol=0, atol=1e-6)
    untouched = [name for name in merged if "norm" in name or "embed_tokens" in name]
    assert untouched
    assert [name for name in untouched if not torch.equal(merged[name], base[name])] == []


def test_what_is_opened_is_a_plain_model_with_its_graphs(adapted: AdaptedRun) -> None:
    model = symphony_vlm.load(adapted.folder, device="cpu")
    assert (model.adapters, model.config.adapter) == (None, None)
    assert {type(module).__module__.partition(".")[0] for module in model.modules()}.isdisjoint({"peft"})
    assert [int(graph.num_updates) for _, graph in expert_graphs(model)] == [STEPS] * 2
    assert isinstance(model.chat("What?", max_new_tokens=2), str)


def test_the_auto_class_opens_it_too(adapted: AdaptedRun) -> None:
    from transformers import AutoModelForImageTextToText

    opened = AutoModelForImageTextToText.from_pretrained(adapted.model).eval()
    assert torch.equal(logits_of_probe(opened), _logits(adapted.model))


def test_a_renamed_folder_and_a_moved_run_open_alike(adapted: AdaptedRun, tmp_path: Path) -> None:
    expected = _logits(adapted.model)
    shutil.copytree(adapted.model, tmp_path / "qwzx")
    assert torch.equal(_logits(tmp_path / "qwzx"), expected)
    shutil.copytree(adapted.folder, tmp_path / "run", symlinks=True)
    config = tmp_path / "run" / "instruct" / "model" / "config.json"
    config.write_text(config.read_text().replace(str(adapted.folder), "/nowhere"))
    assert torch.equal(_logits(tmp_path / "run" / "instruct" / "model"), expected)


def test_a_base_that_is_gone_or_another_is_refused(adapted: AdaptedRun, tmp_path: Path) -> None:
    shutil.copytree(adapted.folder, tmp_path / "run", symlinks=True)
    model, base = (tmp_path / "run" / "instruct" / name for name in ("model", "base"))
    config = model / "config.json"
    config.write_text(config.read_text().replace(str(adapted.folder), "/nowhere"))
    weights = load_file(base / "model.safetensors")
    weights["projector.0.bias"] = weights["projector.0.bias"] + 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="trained on another model than is now at .*base"):
        symphony_vlm.load(model)
    shutil.rmtree(base)
    with pytest.raises(InputError, match=r"neither at .*/base nor at /nowhere/instruct/base.*adapter.base.name"):
        symphony_vlm.load(model)


def test_adapters_that_do_not_fit_name_the_weight(adapted: AdaptedRun, tmp_path: Path) -> None:
    shutil.copytree(adapted.model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    lost = weights.pop("language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    save_file({**weights, "language_model.new": lost}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing \(.*q_proj.lora_A.*1 unexpected \(language_model.new\)"):
        symphony_vlm.load(tmp_path / "model")


def test_another_nesting_of_the_experts_adapters_is_refused(adapted: AdaptedRun, tmp_path: Path) -> None:
    """Their names do not say which weight they belong to; where both have one shape, nothing else would notice."""
    shutil.copytree(adapted.model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    assert values["adapter"]["stacked"] == ["down_proj", "gate_up_proj"]
    values["adapter"]["stacked"].reverse()
    config.write_text(json.dumps(values))
    with pytest.raises(InputError, match="nests the adapters of experts as .*'down_proj', 'gate_up_proj'"):
        symphony_vlm.load(tmp_path / "model")


def test_the_merge_command_writes_a_whole_model_and_proves_it(
    adapted: AdaptedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--model", str(adapted.folder), "--output", str(output), "--json"])
    assert stop.value.code == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["output"] == str(output)
    assert 0 < summary["max_logit_difference"] < 1e-5
    assert adapter_record(output) is None
    assert torch.equal(_logits(output), _logits(adapted.folder))
    assert {path.name for path in output.iterdir()} == {path.name for path in adapted.model.iterdir()}
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--model", str(output), "--output", str(tmp_path / "again")])
    assert stop.value.code == 2
    assert "no adapters to merge" in capsys.readouterr().err


def test_a_base_in_16_bits_has_adapters_in_32_and_stays_in_16(
    tiny_run: Any, only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    model = symphony_vlm.load(tiny_run.folder, device="cpu", dtype="bfloat16")
    assert model.processor is not None
    for save in (model, model.processor):
        save.save_pretrained(tmp_path / "base")
    values = only_stage("instruct", start=None, upcycle=False, train=RATES, lora=LORA, max_steps=2).model_dump()
    values["model"]["start"] = str(tmp_path / "base")
    train(Recipe.model_validate(values), tmp_path / "run", console=quiet)
    saved = load_file(tmp_path / "run" / "instruct" / "model" / "model.safetensors")
    assert {value.dtype for name, value in saved.items() if ".lora_" in name} == {torch.float32}
    assert merge_checkpoint(tmp_path / "run", tmp_path / "merged") < 1e-5
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    kept = {name for name, value in merged.items() if value.dtype == torch.float32}
    assert kept and all(".router." in name for name in kept)


def test_upcycling_a_folder_of_adapters_names_the_merge_command(adapted: AdaptedRun, tmp_path: Path) -> None:
    from symphony_vlm.moe.configuration import MoEConfig
    from symphony_vlm.moe.convert import upcycle_checkpoint

    with pytest.raises(InputError, match="symphony-vlm merge --model"):
        upcycle_checkpoint(adapted.model, tmp_path / "out", MoEConfig())


def test_later_stages_start_from_the_merged_model(
    adapted: AdaptedRun, only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """One that trains the projector, and one with adapters again, whose base is the first one's folder."""
    start = {"start": None, "upcycle": False, "max_steps": 1, "warmup_ratio": 0.0}
    for name, settings in (("full", {"train": {"projector": 1e-3}}), ("lora", {"train": RATES, "lora": LORA})):
        values = only_stage("instruct", **start, **settings).model_dump(mode="json")
        values["model"]["start"] = str(adapted.folder)
        train(Recipe.model_validate(values), tmp_path / name, console=quiet)
    before = symphony_vlm.load(adapted.folder, device="cpu").state_dict()
    full = load_file(tmp_path / "full" / "instruct" / "model" / "model.safetensors")
    assert [n for n in full if n.startswith("language_model") and ".router." not in n and n not in before] == []
    assert all(torch.equal(full[n], before[n]) for n in full if ".self_attn." in n)
    record = adapter_record(tmp_path / "lora" / "instruct" / "model")
    assert record is not None and record["base"]["name"] == str(adapted.model.resolve())
    assert not (tmp_path / "lora" / "instruct" / "base").exists()
    again = symphony_vlm.load(tmp_path / "lora", device="cpu").state_dict()
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert 0 < (again[name] - before[name]).abs().max() < 1


def test_named_targets_and_experts_left_alone(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    lora = {"rank": 2, "target": ["q_proj", "self_attn.v_proj"]}
    train(only_stage("instruct", train=RATES, lora=lora, max_steps=1), tmp_path / "run", console=quiet)
    saved = load_file(tmp_path / "run" / "instruct" / "model" / "model.safetensors")
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in saved if ".lora_" in name}
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target": ["q_prj"]}, "'q_prj' is the end of no linear layer's name.*did you mean 'q_proj'"),
        ({"target": ["lm_head"]}, "'lm_head' is the end of no linear layer's name"),
        ({"experts": True}, "the language model has no experts to adapt"),
        ({"quantization": "8bit"}, r"lora.quantization: 8bit needs bitsandbytes .*symphony-vlm\[qlora\]"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    only_stage: Callable[..., Recipe],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    lora: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = only_stage("instruct", upcycle=False, train=RATES, lora=lora)
    with pytest.raises(InputError, match=message):
        train(recipe, tmp_path / "run", console=quiet)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_adapters_train_on_a_quantised_model(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    kinds: list[set[str]] = []
    original = stages.fit

    def fit(trainer: StageTrainer, *args: Any) -> None:
        original(trainer, *args)
        kinds.append({type(layer).__name__ for layer in trainer.model.language_model.modules()})

    monkeypatch.setattr(stages, "fit", fit)
    lora = {"rank": 4, "alpha": 8, "quantization": bits}
    recipe = only_stage("instruct", start=None, train=RATES, lora=lora, max_steps=4, upcycle=False)
    values = recipe.model_dump(mode="json")
    values["model"]["language"]["architecture"]["hidden_size"] = 64
    train(Recipe.model_validate(values), tmp_path / "run", console=quiet)
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits] in kinds[0]
    saved = load_file(tmp_path / "run" / "instruct" / "model" / "model.safetensors")
    trained = [name for name in saved if ".lora_B." in name]
    assert trained
    assert [name for name in trained if not saved[name].any()] == []  # they begin at zero
    model = symphony_vlm.load(tmp_path / "run" / "instruct" / "model", device="cpu")
    assert torch.isfinite(logits_of_probe(model)).all()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"train": {"projector": 1e-3}, "lora": {}}, "give it a learning rate in 'train'"),
        ({"kind": "text", "train": {}, "upcycle": False, "lora": {}}, "belongs to multimodal stages"),
        ({"lora": {"rang": 4}}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    only_stage: Callable[..., Recipe], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        only_stage("instruct", **stage)


@pytest.mark.parametrize("weight", [0.01, 0.0])
def test_the_gate_learns_from_the_router_losses_under_lora_bf16_and_checkpointing(
    only_stage: Callable[..., Recipe],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    weight: float,
) -> None:
    """In the first step all experts are equal, so that the router losses are all that a gate can learn from.

    Without them what is left is bf16's rounding of equal experts' outputs: a hundredth of the gradient with them.
    """
    norms: list[float] = []
    original = StageTrainer.training_step

    def training_step(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        gates = [p for name, p in self.model.named_parameters() if ".router.gate." in name]
        norms.extend(float(gate.grad.norm()) for gate in gates)
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    settings = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1}
    values = only_stage("instruct", train=RATES, lora=LORA, **settings).model_dump(mode="json")
    values["model"]["moe"] |= {"balance_loss_weight": weight, "z_loss_weight": 0.0}
    train(Recipe.model_validate(values), tmp_path / "run", console=quiet)
    assert len(norms) == 2
    if weight:
        assert min(norms) > 1e-5
    else:
        assert max(norms) < 1e-7
