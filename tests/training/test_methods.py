"""Validation before the first step, samples, moving averages, compiled layers: what they add, and what they leave."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import symphony_vlm
from symphony_vlm.config.lora import LoRAConfig
from symphony_vlm.config.reading import numeric
from symphony_vlm.config.recipe import Recipe, StageConfig
from symphony_vlm.errors import InputError
from symphony_vlm.training import fitting
from symphony_vlm.training.averaging import WeightAverage, refuse_sharded
from symphony_vlm.training.callbacks import ExpertGraphUpdate, JsonLog
from symphony_vlm.training.compilation import compile_layers_
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import StageTrainer

RATES = {"projector": 1e-3, "language_model": 1e-2}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.2, "experts": True}
"""Its dropout makes losses depend on the random state."""


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in _lines(run / "log.jsonl") if "loss" in entry]


def _validation(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in _lines(run / "log.jsonl") if "eval_loss" in entry}


def _weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "instruct" / "model" / "model.safetensors")


def _differing(a: Path, b: Path) -> list[str]:
    found, expected = _weights(a), _weights(b)
    assert found.keys() == expected.keys()
    return [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.fixture(scope="module")
def validated(only_stage: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Path:
    """Six steps with everything that happens beside training, validated at 0, 2, 4 and 6."""
    run = tmp_path_factory.mktemp("validated") / "run"
    extras = {"sample_generations": 2, "ema_decay": 0.9}
    train(only_stage("instruct", train=RATES, lora=LORA, max_steps=6, **extras), run, console=quiet)
    return run


def test_validation_and_samples_leave_no_trace_in_training(
    validated: Path, only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """Losses, and the statistics of routers with the graphs' drift, are those of a run that never validates."""
    recipe = only_stage("instruct", train=RATES, lora=LORA, max_steps=6)
    for name, settings in (("plain", {"validate_at_start": False}), ("early", {})):
        stage = recipe.stages[0].model_copy(update=settings)
        train(recipe.model_copy(update={"stages": [stage]}), tmp_path / name, console=quiet)
    assert _losses(tmp_path / "plain") == _losses(tmp_path / "early") == _losses(validated)
    assert len(_losses(validated)) == 4
    assert _differing(tmp_path / "plain", tmp_path / "early") == []
    assert _lines(tmp_path / "plain/instruct/routing.jsonl") == _lines(validated / "instruct/routing.jsonl")
    assert sorted(_validation(tmp_path / "plain")) == [2, 4, 6]
    assert sorted(_validation(tmp_path / "early")) == sorted(_validation(validated)) == [0, 2, 4, 6]


def test_samples_are_held_out_questions_with_the_models_own_greedy_answers(validated: Path, tiny_run: Any) -> None:
    entries = _lines(validated / "instruct" / "samples.jsonl")
    assert [entry["step"] for entry in entries] == [0, 0, 2, 2, 4, 4, 6, 6]
    questions = [(entry["question"], entry["reference"], entry["image"]) for entry in entries]
    assert questions[:2] * 4 == questions
    assert questions[0] != questions[1]
    held_out = _lines(validated / "validation.jsonl")
    first = [(r["conversations"][0]["value"], r["conversations"][1]["value"]) for r in held_out]
    assert all((f"<image>\n{q}", a) in first for q, a, _ in questions)
    # The model that was saved is the one that answered last.
    model = symphony_vlm.load(validated, device="cpu")
    for entry in entries[-2:]:
        picture = tiny_run.folder / "scenes" / entry["image"][0]
        assert picture.is_file()
        answer = model.chat(entry["question"], images=picture, max_new_tokens=64)
        assert answer == entry["answer"].split(model.processor.answer_end)[0].strip()


def test_samples_are_texts_in_tensorboard(validated: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(validated / "tensorboard" / "instruct" / "samples"))
    events.Reload()
    shown = events.Tensors("samples/1/text_summary")
    assert [event.step for event in shown] == [0, 2, 4, 6]
    reference = _lines(validated / "instruct" / "samples.jsonl")[1]["reference"]
    assert reference.encode() in shown[0].tensor_proto.string_val[0]


class Interrupted(Exception):
    """Stands for a kill inside this process."""


def test_adapters_averages_and_samples_continue_exactly(
    validated: Path, only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before the first checkpoint, between two, and after the last step, before the model is saved."""
    run = tmp_path / "run"
    extras = {"sample_generations": 2, "ema_decay": 0.9}
    recipe = only_stage("instruct", train=RATES, lora=LORA, max_steps=6, **extras)
    original = JsonLog.on_log
    for step in (1, 4):

        def on_log(self: JsonLog, args: Any, state: Any, *rest: Any, last: int = step, **kwargs: Any) -> None:
            original(self, args, state, *rest, **kwargs)
            if state.global_step == last:
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(JsonLog, "on_log", on_log)
            train(recipe, run, console=quiet)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(WeightAverage, "apply_", lambda *_: (_ for _ in ()).throw(Interrupted))
        train(recipe, run, console=quiet)
    train(recipe, run, console=quiet)
    assert _losses(run) == _losses(validated)
    assert _validation(run) == _validation(validated)
    assert _differing(run, validated) == []
    for name in ("samples.jsonl", "routing.jsonl"):
        assert (run / "instruct" / name).read_bytes() == (validated / "instruct" / name).read_bytes()


# Moving averages.


def test_the_average_is_the_formula_and_is_what_is_validated_and_saved(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, Tensor]] = []
    original = ExpertGraphUpdate.on_optimizer_step

    def on_optimizer_step(self: ExpertGraphUpdate, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        original(self, *args, model=model, **kwargs)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        weights.append({name: parameter.detach().double() for name, parameter in trained.items()})

    started: list[dict[str, Tensor]] = []

    def on_train_begin(self: ExpertGraphUpdate, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        started.append({n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad})

    monkeypatch.setattr(ExpertGraphUpdate, "on_optimizer_step", on_optimizer_step)
    monkeypatch.setattr(ExpertGraphUpdate, "on_train_begin", on_train_begin)
    recipe = only_stage("instruct", train={"projector": 1e-2}, upcycle=False, max_steps=4, ema_decay=0.7)
    train(recipe, tmp_path / "run", console=quiet)
    expected = started[0]
    for step in weights:
        expected = {name: 0.7 * expected[name] + 0.3 * step[name] for name in expected}
    saved = _weights(tmp_path / "run")
    assert {name.partition(".")[0] for name in expected} == {"projector"}
    for name, average in expected.items():
        # Four roundings of fp32, against float64.
        torch.testing.assert_close(saved[name].double(), average, rtol=1e-6, atol=1e-8)
        assert not torch.equal(saved[name].double(), weights[-1][name])
    # The last validation, of the averages, is that of the saved model.
    again = only_stage("instruct", train={"projector": 1e-9}, upcycle=False, max_steps=1)
    again = again.model_copy(update={"model": again.model.model_copy(update={"start": str(tmp_path / "run")})})
    train(again, tmp_path / "again", console=quiet)
    assert _validation(tmp_path / "again")[0] == _validation(tmp_path / "run")[4]


def test_a_checkpoint_has_the_averages_in_fp32_of_what_trains_only(validated: Path) -> None:
    averages = load_file(validated / "instruct" / "checkpoint-6" / "average.safetensors")
    saved = _weights(validated)
    assert {value.dtype for value in averages.values()} == {torch.float32}
    assert averages.keys() == {name for name in saved if "expert_graph" not in name}
    assert [name for name in averages if not torch.equal(averages[name], saved[name])] == []


def test_sharded_parameters_are_refused_by_name_of_the_setting() -> None:
    model = nn.Linear(2, 2)
    refuse_sharded(model, "ema_decay")
    model.weight.ds_id = 0  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"stage.sample_generations: ZeRO-3 and FSDP"):
        refuse_sharded(model, "sample_generations")


# Compiled layers.


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_train_as_eager_ones_and_are_saved_alike(
    only_stage: Callable[..., Recipe],
    tmp_path: Path,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Fused kernels round otherwise, about 1e-7 relative a product; steps of Adam at 1e-3 amplify that to 1e-5.

    The backend ``eager`` takes the layers apart as any other and then computes what stands there, to the bit.
    """
    monkeypatch.setattr(fitting, "compile_layers_", partial(compile_layers_, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name, on in (("plain", False), ("compiled", True)):
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        recipe = only_stage("instruct", max_steps=2, log_steps=1, compile=on, gradient_checkpointing=True)
        train(recipe, tmp_path / name, console=quiet)
    # One graph is the trial of the compiler; the sparse layers make several.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3
    compiled, plain = ([loss for _, loss in _losses(tmp_path / name)] for name in ("compiled", "plain"))
    assert len(compiled) == 2
    assert compiled == (plain if backend == "eager" else pytest.approx(plain, rel=1e-5))
    found, expected = _weights(tmp_path / "compiled"), _weights(tmp_path / "plain")
    assert found.keys() == expected.keys()
    graphs = [name for name in found if ".expert_graph." in name]
    assert len(graphs) == 4
    for name in graphs:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0 if backend == "eager" else 1e-4)


def test_a_machine_that_cannot_compile_says_so_before_training(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(InputError, match=r"stage.compile: torch.compile does not work here: .*") as error:
        train(only_stage("instruct", compile=True), tmp_path / "run", console=quiet)
    assert "compile: false" in str(error.value)


def test_a_model_without_transformer_layers_is_not_compiled(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match="ContrastiveModel has no transformer layers"):
        train(only_stage("encoder", start=None, compile=True), tmp_path / "run", console=quiet)


def test_a_checkpoint_that_lacks_a_trained_weight_is_an_error_and_not_a_warning(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = StageTrainer(model=model, args=arguments, rates={"": 0.1})
    trainer._issue_warnings_after_load(model.load_state_dict({"weight": torch.ones(2, 2)}, strict=False))
    with pytest.raises(InputError, match=r"1 weights missing, 0 unexpected \(weight\)"):
        trainer._issue_warnings_after_load(model.load_state_dict({}, strict=False))


def test_the_stages_in_the_document_are_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 7
    settings = [StageConfig.model_validate(numeric(stage)) for block in blocks for stage in yaml.safe_load(block)]
    assert settings[1].lora == LoRAConfig(), "the defaults are said to be these"
