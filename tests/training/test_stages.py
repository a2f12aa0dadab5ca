"""What each stage changes, what it hands on, and what the logs say about it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import symphony_vlm
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.data.tokenizer import IMAGE_TOKEN
from symphony_vlm.errors import InputError
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.training.run import train
from symphony_vlm.training.trainer import StageTrainer


def _weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def _losses(run: Path, name: str = "loss") -> list[float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if "loss" in entry]


def _first_weights(run: Path) -> dict[str, Tensor]:
    """The assembled model before its first multimodal stage, from the folders of the stages before it."""
    encoder = load_file(run / "encoder" / "model" / "open_clip_model.safetensors")
    language = load_file(run / "language" / "model" / "model.safetensors")
    found = {f"language_model.{name}": value for name, value in language.items()}
    return found | {f"clip.{name}": value for name, value in encoder.items()}


# The stages of `tiny`.


def test_pretrain_changes_the_projector_and_nothing_else(tiny_run: Any) -> None:
    """The language model's bits are the language stage's, the tower's are the encoder stage's."""
    weights = _weights(tiny_run.folder / "pretrain" / "model")
    before = _first_weights(tiny_run.folder)
    language = {name: value for name, value in weights.items() if name.startswith("language_model.")}
    assert language
    assert [name for name, value in language.items() if not torch.equal(value, before[name])] == []
    trained = [value for name, value in before.items() if name.startswith("clip.visual.")]
    tower = {name: value for name, value in weights.items() if name.startswith("vision_tower.")}
    assert tower
    for name, value in tower.items():
        assert any(value.shape == other.shape and torch.equal(value, other) for other in trained), name


def test_a_frozen_module_keeps_its_bits_and_a_trained_one_loses_all_of_them(
    only_stage: Callable[..., Recipe], tmp_path: Path, tiny_run: Any, quiet: Console
) -> None:
    recipe = only_stage("pretrain", max_steps=2, warmup_ratio=0.0)
    train(recipe, tmp_path / "run", console=quiet)
    before = _weights(tiny_run.folder / "pretrain" / "model")
    after = _weights(tmp_path / "run" / "pretrain" / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("projector.")}


def test_instruct_changes_every_parameter_and_every_graph(tiny_run: Any) -> None:
    before, after = (_weights(tiny_run.folder / stage / "model") for stage in ("pretrain", "instruct"))
    model = symphony_vlm.load(tiny_run.folder / "instruct" / "model", device="cpu")
    parameters = {name for name, _ in model.named_parameters()}
    shared = parameters & before.keys()
    assert [name for name in shared if torch.equal(before[name], after[name])] == []
    assert {name.partition(".")[0] for name in shared} == {"vision_tower", "projector", "language_model"}


def test_experts_begin_equal_and_part(tiny_run: Any, only_stage: Callable[..., Recipe]) -> None:
    """Upcycling copies the dense layer into each expert; training must move the copies apart."""
    after = _weights(tiny_run.folder / "instruct" / "model")
    stacks = [value for name, value in after.items() if ".experts." in name]
    assert stacks
    for stack in stacks:
        assert stack.shape[0] == 4
        assert not any(torch.equal(stack[0], other) for other in stack[1:])


def test_upcycling_happens_in_its_stage_and_once(tiny_run: Any) -> None:
    configs = {
        stage: json.loads((tiny_run.folder / stage / "model" / "config.json").read_text())
        for stage in ("pretrain", "instruct")
    }
    assert configs["pretrain"].get("moe") is None
    assert configs["instruct"]["moe"]["router"] == "symphony_smoe"
    assert not any(".experts." in name for name in _weights(tiny_run.folder / "pretrain" / "model"))


def test_upcycling_a_model_that_is_sparse_already_is_refused(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match="already has sparse layers"):
        train(only_stage("instruct", start="instruct"), tmp_path / "run", console=quiet)


def test_a_stage_after_the_upcycling_goes_on_with_the_graphs(
    only_stage: Callable[..., Recipe], tmp_path: Path, tiny_run: Any, quiet: Console
) -> None:
    recipe = only_stage("instruct", start="instruct", upcycle=False, max_steps=3)
    train(recipe, tmp_path / "run", console=quiet)
    model = symphony_vlm.load(tmp_path / "run", device="cpu")
    assert [int(graph.num_updates) for _, graph in expert_graphs(model)] == [12 + 3] * 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_graphs_move_once_per_optimizer_step(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, accumulate: int
) -> None:
    recipe = only_stage("instruct", max_steps=3, batch_size=4, gradient_accumulation_steps=accumulate)
    train(recipe, tmp_path / "run", console=quiet)
    model = symphony_vlm.load(tmp_path / "run", device="cpu")
    assert [int(graph.num_updates) for _, graph in expert_graphs(model)] == [3, 3]


def test_two_runs_with_the_same_seed_are_equal_and_another_seed_differs(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = only_stage("instruct", max_steps=2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(recipe.model_copy(update={"seed": seed}), tmp_path / name, console=quiet)
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b") != _losses(tmp_path / "c")
    a, b = (_weights(tmp_path / name / "instruct" / "model") for name in "ab")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# Learning rates.


def test_learning_rates_by_module_reach_the_optimizer(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {
        "vision_tower": 1e-4,
        "projector": 2e-3,
        "language_model": 5e-4,
        "language_model.model.layers.1": 7e-4,
    }
    seen: list[tuple[Any, StageTrainer]] = []
    original = StageTrainer.create_optimizer

    def create_optimizer(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(self, *args, **kwargs)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        seen.extend(
            (names[id(parameter)], (group["lr"], group["weight_decay"]))
            for group in optimizer.param_groups
            for parameter in group["params"]
        )
        return optimizer

    monkeypatch.setattr(StageTrainer, "create_optimizer", create_optimizer)
    train(only_stage("instruct", train=rates, max_steps=1, weight_decay=0.1), tmp_path / "run", console=quiet)
    found = dict(seen)
    assert len(found) == len(seen)
    for name, (rate, decay) in found.items():
        longest = max((prefix for prefix in rates if name.startswith(prefix)), key=len)
        assert rate == rates[longest], name
        assert decay in (0.0, 0.1)
    assert {rate for rate, _ in found.values()} == set(rates.values())
    assert found["projector.0.weight"] == (2e-3, 0.1)
    assert found["projector.0.bias"] == (2e-3, 0.0)


def test_a_step_moves_each_module_by_its_own_rate(
    only_stage: Callable[..., Recipe], tmp_path: Path, tiny_run: Any, quiet: Console
) -> None:
    """Adam's first step is the learning rate times the gradient's sign, so weights move by at most the rate."""
    rates = {"vision_tower": 1e-5, "projector": 1e-3, "language_model": 1e-4}
    recipe = only_stage("instruct", train=rates, max_steps=1, schedule="constant", warmup_ratio=0.0)
    train(recipe, tmp_path / "run", console=quiet)
    before = _weights(tiny_run.folder / "pretrain" / "model")
    after = _weights(tmp_path / "run" / "instruct" / "model")
    for module, rate in rates.items():
        moved = max(
            float((after[name] - before[name]).abs().max())
            for name in before.keys() & after.keys()
            if name.startswith(f"{module}.")
        )
        # fp32 keeps 24 bits of weights around 1: 1e-7 absolute.
        assert moved == pytest.approx(rate, rel=1e-3, abs=2e-7)


# The loss.


def test_accumulation_gives_the_losses_of_the_large_batch(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """2 x 4 against 8, with texts of unequal length. Sums in fp32 differ in their order: about 1e-7 relative a step,
    which Adam's normalisation can raise by a few orders in weights whose gradients are close to zero."""
    for name, settings in (("8", {"batch_size": 8}), ("2x4", {"batch_size": 4, "gradient_accumulation_steps": 2})):
        train(only_stage("pretrain", max_steps=6, log_steps=1, **settings), tmp_path / name, console=quiet)
    large, small = _losses(tmp_path / "8"), _losses(tmp_path / "2x4")
    assert len(large) == 6
    np.testing.assert_allclose(small, large, rtol=2e-6)


def test_accumulation_gives_the_large_batchs_graphs_up_to_the_balance_losses_own_nonlinearity(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """Without router losses (a product of two means over the batch is not linear in it) the routing agrees."""
    graphs = []
    for name, settings in (("8", {"batch_size": 8}), ("2x4", {"batch_size": 4, "gradient_accumulation_steps": 2})):
        recipe = only_stage("instruct", max_steps=2, log_steps=1, **settings)
        moe = {**(recipe.model.moe or {}), "balance_loss_weight": 0.0, "z_loss_weight": 0.0}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"moe": moe})})
        train(recipe, tmp_path / name, console=quiet)
        model = symphony_vlm.load(tmp_path / name, device="cpu")
        graphs.append(torch.stack([graph.adjacency_EE for _, graph in expert_graphs(model)]))
    np.testing.assert_allclose(_losses(tmp_path / "2x4"), _losses(tmp_path / "8"), rtol=2e-6)
    # A token whose second and third expert tie to the last bit may flip: one of some thousand, times (1 - momentum).
    torch.testing.assert_close(graphs[1], graphs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_logged_loss_is_cross_entropy_plus_the_weighted_router_losses(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console, accumulate: int
) -> None:
    recipe = only_stage(
        "instruct", max_steps=6, log_steps=2, batch_size=3, gradient_accumulation_steps=accumulate, learning_rate=1e-3
    )
    train(recipe, tmp_path / "run", console=quiet)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    assert len(entries) == 4
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["router"], abs=1e-5)
        assert entry["router"] == pytest.approx(0.01 * entry["balance"] + 0.001 * entry["z"], abs=1e-5)
        for kind in ("balance", "z"):
            layers = [entry[f"{kind}/{layer}"] for layer in (0, 1)]
            assert entry[kind] == pytest.approx(sum(layers) / 2, abs=1e-5)


def test_doubling_a_routers_loss_weight_doubles_its_part_of_the_first_loss(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    parts = []
    for weight in (0.01, 0.02):
        recipe = only_stage("instruct", max_steps=1)
        moe = {**(recipe.model.moe or {}), "balance_loss_weight": weight, "z_loss_weight": 0.0}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"moe": moe})})
        run = tmp_path / str(weight)
        train(recipe, run, console=quiet)
        parts.append((_losses(run, "router")[0], _losses(run, "balance")[0], _losses(run, "cross_entropy")[0]))
    assert parts[1][1:] == parts[0][1:]
    assert parts[1][0] == pytest.approx(2 * parts[0][0], abs=2e-6)


def test_the_first_loss_is_near_that_of_guessing(tiny_run: Any) -> None:
    """A new language model knows nothing: log of the vocabulary size, give or take its initial noise."""
    size = len(json.loads((tiny_run.folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    first = next(entry for entry in tiny_run.log("language") if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(size), abs=0.2)


# The logs.


def test_the_log_has_every_stage_in_order_with_increasing_steps(tiny_run: Any) -> None:
    entries = [entry for entry in tiny_run.log() if "loss" in entry]
    assert list(dict.fromkeys(entry["stage"] for entry in entries)) == [s.name for s in load_recipe("tiny").stages]
    for stage in load_recipe("tiny").stages:
        steps = [entry["step"] for entry in entries if entry["stage"] == stage.name]
        assert steps == [1, *range(stage.log_steps, stage.max_steps + 1, stage.log_steps)]
    for entry in entries:
        assert {"loss", "grad_norm", "learning_rate", "epoch"} <= entry.keys()


def test_every_stage_logs_a_validation_loss_at_each_checkpoint(tiny_run: Any) -> None:
    for stage in load_recipe("tiny").stages:
        losses = {entry["step"]: entry["eval_loss"] for entry in tiny_run.log(stage.name) if "eval_loss" in entry}
        saved = {int(path.name.split("-")[1]) for path in (tiny_run.folder / stage.name).glob("checkpoint-*")}
        assert saved <= losses.keys(), stage.name
        assert all(math.isfinite(loss) for loss in losses.values())


def test_the_routing_log_describes_loads_and_graphs(tiny_run: Any) -> None:
    entries = tiny_run.routing("instruct")
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    for entry in entries:
        assert set(entry["layers"]) == {"0", "1"}
        for layer in entry["layers"].values():
            # Shares of the choices, rounded to six digits.
            assert sum(layer["load"]) == pytest.approx(1.0, abs=4e-6)
            assert layer["tokens"] > 0
        assert len(entry["graphs"]) == 2
        for graph in entry["graphs"].values():
            assert graph["num_updates"] == entry["step"]
            np.testing.assert_allclose(np.sum(graph["adjacency"], axis=1), 1.0, atol=4e-6)
    assert not (tiny_run.folder / "pretrain" / "routing.jsonl").exists()


def test_each_graphs_logged_drift_is_the_length_of_its_step(tiny_run: Any) -> None:
    """The log has a line for every step here, so the drift is the distance between two lines' matrices."""
    entries = tiny_run.routing("instruct")
    for before, entry in itertools.pairwise(entries):
        for name, graph in entry["graphs"].items():
            step = np.subtract(graph["adjacency"], before["graphs"][name]["adjacency"])
            # 16 entries rounded to six digits, on both sides.
            assert graph["drift"] == pytest.approx(np.linalg.norm(step), abs=4e-6)
            assert graph["drift"] > 1e-4


def test_checkpoints_and_tensorboard_have_the_statistics_of_the_log(tiny_run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    by_step = {entry["step"]: entry for entry in tiny_run.routing("instruct")}
    checkpoints = sorted((tiny_run.folder / "instruct").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for folder in checkpoints:
        assert json.loads((folder / "routing.json").read_text()) == by_step[int(folder.name.split("-")[1])]
    events = EventAccumulator(str(tiny_run.folder / "tensorboard" / "instruct" / "routing"))
    events.Reload()
    for key in ("load_cv", "token_entropy"):
        shown = [(event.step, event.value) for event in events.Scalars(f"{key}/1")]
        assert shown == [(step, np.float32(entry["layers"]["1"][key])) for step, entry in by_step.items()]
    layer = "language_model.model.layers.1.mlp"
    for key in ("drift", "spectral_gap"):
        shown = [(event.step, event.value) for event in events.Scalars(f"{key}/{layer}")]
        graphs = {step: entry["graphs"][f"{layer}.router.expert_graph"] for step, entry in by_step.items()}
        assert shown == [(step, np.float32(graph[key])) for step, graph in graphs.items()]


def test_the_routing_log_has_a_line_at_every_checkpoint_so_that_no_interval_spans_an_interruption(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """41 steps are logged every second one (20 points); the checkpoints fall on multiples of 3."""
    settings = {"max_steps": 41, "log_steps": 3, "save_fraction": 0.07, "batch_size": 2}
    train(only_stage("instruct", **settings), tmp_path / "run", console=quiet)
    lines = (tmp_path / "run" / "instruct" / "routing.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [step for step in range(1, 42) if step % 2 == 0 or step % 3 == 0 or step == 41]


def test_tensorboard_has_the_losses_of_each_stage(tiny_run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stage in ("language", "instruct"):
        events = EventAccumulator(str(tiny_run.folder / "tensorboard" / stage))
        events.Reload()
        shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
        logged = [(entry["step"], np.float32(entry["loss"])) for entry in tiny_run.log(stage) if "loss" in entry]
        assert shown == logged


# Handing on, and refusals.


def test_the_announced_number_of_steps_is_the_number_run(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """86 samples in batches of 9 are 10 batches, the last incomplete; by 4 that makes 3 steps, the last of 2."""
    recipe = only_stage("pretrain", max_steps=-1, epochs=1.5, batch_size=9, gradient_accumulation_steps=4)
    with (tmp_path / "said").open("w") as file:
        result = train(recipe, tmp_path / "run", console=Console(file=file, width=300))
    said = (tmp_path / "said").read_text()
    assert f"pretrain: {result.step} steps" in said
    assert result.step == 5


def test_too_few_samples_for_one_contrastive_batch_are_refused_not_skipped(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match="86 samples make no batch of 100") as error:
        train(only_stage("encoder", start=None, batch_size=100), tmp_path / "run", console=quiet)
    assert error.value.where == "encoder"


def test_too_little_text_for_one_block_is_refused(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match="less than one block of 100000"):
        train(only_stage("language", start=None, max_length=100_000), tmp_path / "run", console=quiet)


def test_a_learning_rate_for_no_part_of_the_model_is_refused(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match=r"'language_model.model.layers.7' is no module of the model"):
        train(only_stage("pretrain", train={"language_model.model.layers.7": 1e-3}), tmp_path / "run", console=quiet)


def test_a_sample_longer_than_the_limit_stops_the_run_and_names_it(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match=r"captions_train.json: record \d+"):
        train(only_stage("pretrain", max_length=10), tmp_path / "run", console=quiet)


def test_gradient_checkpointing_changes_nothing_but_memory(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    for name, on in (("off", False), ("on", True)):
        recipe = only_stage("instruct", max_steps=3, log_steps=1, gradient_checkpointing=on)
        train(recipe, tmp_path / name, console=quiet)
    assert _losses(tmp_path / "on") == _losses(tmp_path / "off")
    models = [symphony_vlm.load(tmp_path / name, device="cpu") for name in ("on", "off")]
    graphs = [[graph.adjacency_EE for _, graph in expert_graphs(model)] for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*graphs, strict=True))


def test_captions_and_conversations_can_be_mixed_in_one_stage(
    only_stage: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    values = only_stage("pretrain", max_steps=1).model_dump(mode="json")
    values["stages"][0]["data"] = ["captions", "train"]
    train(Recipe.model_validate(values), tmp_path / "run", console=quiet)
    counts = json.loads((tmp_path / "run" / "provenance.json").read_text())["counts"]
    assert {name.partition(":")[0] for name in counts} == {"captions", "train"}


def test_a_failed_save_leaves_the_old_model(tmp_path: Path) -> None:
    from symphony_vlm.training.fitting import replace_folder

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")

    def save(target: Path) -> None:
        target.mkdir()
        (target / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(folder, save)
    assert (folder / "a").read_text() == "old"
    replace_folder(folder, lambda target: shutil.copytree(folder, target) and None)
    assert (folder / "a").read_text() == "old"


def test_the_runs_tokenizer_holds_the_image_marker_as_one_token(tiny_run: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_run.folder / "tokenizer")
    assert len(tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)) == 1
