"""Counts without weights: those of the built model, the published totals, and what stages train."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

import symphony_vlm
from symphony_vlm import cli
from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.models import list_known_models, load_known_model
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.errors import InputError
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.training.parameter_counts import (
    RecipeCounts,
    count_folder,
    count_known,
    count_modules,
    count_recipe,
)
from symphony_vlm.training.run import train

WHOLE_TOWER = "model.vision.feature_layer=-1"
"""Published totals have the whole encoder in them. Training here never builds the block above the features, as nothing
reads it; with its last block as the features it is all there but the final norm."""
CLIP_NORM, SIGLIP_NORM = 2 * 1024, 2 * 1152


def counts_of(name: str, *overrides: str) -> RecipeCounts:
    return count_recipe(load_recipe(name, overrides))


def saved_total(folder: Path) -> dict[str, int]:
    """Parameters by module of a saved model, counted one by one."""
    totals: dict[str, int] = {}
    for name, parameter in symphony_vlm.load(folder, device="cpu").named_parameters():
        totals[name.partition(".")[0]] = totals.get(name.partition(".")[0], 0) + parameter.numel()
    return totals


# Against the built model.


@pytest.mark.parametrize("name", ["tiny", "symphony_7b", "libmoe_siglip_phi35"])
def test_the_counts_are_those_of_the_model_that_training_saves(
    name: str, in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = in_small(name, max_steps=1)
    counts = count_recipe(recipe)
    train(recipe, tmp_path / "run", console=quiet)
    built = saved_total(tmp_path / "run" / "model")
    assert {module: count.total for module, count in counts.modules.items()} == built
    assert count_folder(str(tmp_path / "run")) == counts.modules
    first = next(stage for stage in recipe.stages if stage.kind == "multimodal")
    stage_count = counts.stages[recipe.stages.index(first)]
    assert stage_count.total == sum(saved_total(tmp_path / "run" / first.name / "model").values())


def test_a_new_tokenizer_may_stay_smaller_than_it_was_allowed_to_become(
    in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    """The text decides; nobody has read it yet when parameters are counted."""
    recipe = in_small("tiny", max_steps=1)
    language = recipe.model.language.model_copy(update={"vocab_size": 5000})
    asked = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"language": language}), "stages": recipe.stages[1:3]}
    )
    train(asked, tmp_path / "run", console=quiet)
    built = saved_total(tmp_path / "run" / "model")["language_model"]
    rows = len(AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer"))
    assert rows < 5000
    assert count_recipe(asked).modules["language_model"].total - built == (5000 - rows) * 32


def test_active_is_the_share_of_chosen_experts_and_everything_else(tiny_moe_model: Any) -> None:
    count = count_modules(tiny_moe_model)
    experts = sum(p.numel() for _, layer in sparse_layers(tiny_moe_model) for p in layer.experts.parameters())
    language = count["language_model"]
    assert experts > 0
    assert language.total - language.active == experts // 2  # two of four
    assert count["vision_tower"].total == count["vision_tower"].active


def test_a_stage_counts_what_it_trains_and_the_memory_of_that(in_small: Callable[..., Recipe]) -> None:
    recipe = in_small("moe_llava_phi2")
    pretrain, finetune, instruct = count_recipe(recipe).stages
    assert list(pretrain.trainable) == ["projector"]
    assert list(finetune.trainable) == ["language_model", "projector"]
    projector = pretrain.trainable["projector"]
    assert finetune.trainable["projector"] == instruct.trainable["projector"] == projector
    # Two layers, of which one has four experts: fc1 and fc2 with their biases; and a gate.
    ffn = 32 * 48 + 48 + 48 * 32 + 32
    assert instruct.trainable["language_model"] == ffn + 4 * ffn + 4 * 32
    # Without bf16 all is fp32: four bytes a weight, four a gradient, eight for AdamW's averages.
    for stage in (pretrain, finetune, instruct):
        trained = sum(stage.trainable.values())
        assert (stage.weights, stage.gradients, stage.optimizer) == (4 * stage.total, 4 * trained, 8 * trained)


def test_a_stage_with_adapters_trains_them_alone_and_leaves_the_model_as_large_as_it_was() -> None:
    """A layer of Vicuna has four linear layers of 4096 x 4096 and three of 4096 x 11008; published: 7B, rank 128."""
    counts = counts_of("llava_1_5_7b_lora")
    full = counts_of("llava_1_5_7b")
    adapters = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert counts.stages[1].trainable == {
        "language_model": adapters,
        "projector": full.stages[1].trainable["projector"],
    }
    assert counts.stages[1].total == full.whole.total + adapters
    assert counts.modules == full.modules
    after = counts_of("symphony_4b", "stages.prefinetune.lora={rank: 8}")
    assert after.modules == counts_of("symphony_4b").modules
    assert after.stages[2].trainable == counts_of("symphony_4b").stages[2].trainable


def test_the_estimate_is_what_the_weights_and_the_optimizer_of_a_stage_really_take(
    in_small: Callable[..., Recipe], tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 with autocast: the frozen language model keeps the 16 bits of its files in the first stage."""
    from symphony_vlm.training import fitting
    from symphony_vlm.training.trainer import StageTrainer

    seen: list[tuple[int, int]] = []

    class Measured(StageTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train(*args, **kwargs)
            assert self.optimizer is not None and self.model is not None
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            states = [t for s in self.optimizer.state.values() for key, t in s.items() if key.startswith("exp_avg")]
            seen.append((weights, sum(t.numel() * t.element_size() for t in states)))
            return result

    monkeypatch.setattr(fitting, "StageTrainer", Measured)
    recipe = in_small("symphony_4b", bf16=True, max_steps=1)
    train(recipe, tmp_path / "run", console=quiet)
    assert seen == [(stage.weights, stage.optimizer) for stage in count_recipe(recipe).stages]


# Against what is published: recipes.md gives the sums, in billions or millions with these digits.


@pytest.mark.parametrize("name", list_known_models())
def test_a_known_part_has_the_parameters_that_its_entry_says(name: str) -> None:
    known = load_known_model(name)
    assert sum(count.total for count in count_known(known).values()) == known.parameters


def test_phi_3_mini_and_its_upcycled_forms() -> None:
    dense = counts_of("symphony_7b").stages[0]
    assert load_known_model("phi_3_mini_4k").parameters == 3_821_079_552
    ffn, gates = 75_497_472, 16 * 3072 * 4
    language = counts_of("symphony_7b").modules["language_model"]
    assert language.total == 7_444_958_208 + gates == 3_821_079_552 + 16 * 3 * ffn + gates
    assert f"{language.total / 1e9:.3f} {language.active / 1e9:.3f}" == "7.445 5.029"
    everywhere = counts_of("symphony_7b", "model.moe.layers=all").modules["language_model"].total
    assert f"{everywhere / 1e9:.2f}" == "11.07"
    assert dense.total == 3_821_079_552 + 290_909_184 + 12_589_056


@pytest.mark.parametrize(
    ("name", "overrides", "norm", "published"),
    [
        ("symphony_7b", [], CLIP_NORM, "7.761"),
        ("symphony_4b", [], CLIP_NORM, "4.188"),
        ("libmoe_clip_phi35", [], CLIP_NORM, "4.792"),
        ("libmoe_siglip_phi35", [], SIGLIP_NORM, "5.103"),
        ("libmoe_siglip_phi35", ["model.moe.num_experts=6", "model.moe.num_experts_per_tok=3"], SIGLIP_NORM, "5.672"),
    ],
)
def test_the_published_totals(name: str, overrides: list[str], norm: int, published: str) -> None:
    whole = counts_of(name, WHOLE_TOWER, *overrides).whole.total + norm
    assert f"{whole / 1e9:.3f}" == published


@pytest.mark.parametrize(
    ("name", "norm", "published"),
    [("libmoe_clip_phi35", CLIP_NORM, "4.140"), ("libmoe_siglip_phi35", SIGLIP_NORM, "4.250")],
)
def test_the_published_totals_before_upcycling(name: str, norm: int, published: str) -> None:
    assert f"{(counts_of(name, WHOLE_TOWER).stages[0].total + norm) / 1e9:.3f}" == published


@pytest.mark.parametrize(
    ("name", "projector", "tower", "norm"),
    [
        ("symphony_7b", "12.6", "303.5", CLIP_NORM),
        ("libmoe_clip_phi35", "15.7", "303.5", CLIP_NORM),
        ("libmoe_siglip_phi35", "16.5", "412.4", SIGLIP_NORM),
    ],
)
def test_the_published_sizes_of_projectors_and_towers(name: str, projector: str, tower: str, norm: int) -> None:
    stages = counts_of(name, WHOLE_TOWER, "stages.pretrain.train={projector: 1, vision_tower: 1}").stages
    trained = stages[0].trainable
    assert f"{trained['projector'] / 1e6:.1f}" == projector
    assert f"{(trained['vision_tower'] + norm) / 1e6:.1f}" == tower


@pytest.mark.parametrize(
    ("name", "block"),
    [
        # Attention, two norms, feed-forward; with E experts E of these and a gate.
        ("symphony_4b", 4 * (1024 * 1024 + 1024) + 4 * 1024 + 2 * 1024 * 4096 + 4096 + 1024),
        ("libmoe_clip_phi35", 4 * (1024**2 + 1024) + 4 * 1024 + 4 * (2 * 1024 * 4096 + 4096 + 1024 + 1024)),
        ("libmoe_siglip_phi35", 4 * (1152**2 + 1152) + 4 * 1152 + 4 * (2 * 1152 * 4304 + 4304 + 1152 + 1152)),
    ],
)
def test_what_is_built_is_smaller_than_published_by_the_block_above_the_features(name: str, block: int) -> None:
    assert counts_of(name, WHOLE_TOWER).whole.total - counts_of(name).whole.total == block


@pytest.mark.parametrize("twin", ["symphony_4b", "symphony_7b"])
def test_a_twin_has_as_many_parameters(twin: str) -> None:
    assert counts_of(twin).to_dict() == counts_of(f"{twin}_smoe").to_dict()


def test_the_embedding_grows_where_the_placeholder_finds_no_room() -> None:
    """Vicuna's 32,000 rows are full; Phi-3's 32,064 are not, nor are Phi-2's."""
    rows = {"llava_1_5_7b": 1, "cumo_mistral_7b": 2, "symphony_4b": 0, "moe_llava_phi2": 0}
    hidden = {"llava_1_5_7b": 4096, "cumo_mistral_7b": 4096}
    for name, more in rows.items():
        grown = counts_of(name).stages[0].total - counts_of(name, "model.random_weights=true").stages[0].total
        # Phi-2's head has a bias, which none of these two has.
        assert grown == more * 2 * hidden.get(name, 0)


# The command.


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["config", "params", *words])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_the_summary_has_the_form_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    code, out, _ = run_command(capsys, "symphony_7b", "--json")
    # Two or three seconds on an idle core; its own imports come on top in a process of its own.
    assert time.monotonic() - start < 30
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert found["total"] == sum(module["total"] for module in found["modules"].values()) == 7_748_653_056
    assert found["active"] == sum(module["active"] for module in found["modules"].values())
    assert [stage["name"] for stage in found["stages"]] == ["pretrain", "finetune", "instruct"]


def test_the_table_has_modules_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_command(capsys, "symphony_4b", "model.moe.num_experts=8")
    assert code == 0
    for word in ("vision_tower", "projector", "language_model", "in all", "prefinetune", "optimizer", "GB"):
        assert word in out


def test_a_saved_model_and_a_known_part_are_counted_by_themselves(
    capsys: pytest.CaptureFixture[str], tiny_model_folder: Path, tiny_parts: dict[str, str]
) -> None:
    found = json.loads(run_command(capsys, str(tiny_model_folder), "--json")[1])
    assert found["total"] == sum(saved_total(tiny_model_folder).values())
    assert json.loads(run_command(capsys, "microsoft/phi-2", "--json")[1])["total"] == 2_779_683_840
    causal = json.loads(run_command(capsys, tiny_parts["microsoft/phi-2"], "--json")[1])
    assert set(causal["modules"]) == {"model", "lm_head"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["microsoft/phi-3"], "microsoft/phi-3: neither a local folder nor a model known offline; did you mean"),
        (["symphony_5b"], "no recipe of that name; did you mean 'symphony_"),
        (["symphony_4b", "model.language.name=some/model"], "architecture of 'some/model' is not known offline"),
        (["symphony_4b", "model.vision.name=some/tower"], "model.vision.name: the architecture of 'some/tower'"),
        (["microsoft/phi-2", "seed=1"], "'seed=1' is a setting of a recipe"),
        (["tiny", "stages.pretrain.train={language_model.layers.*.mpl: 1}"], "is no module of the model"),
    ],
)
def test_what_cannot_be_counted_is_one_clear_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_command(capsys, *words)
    assert code == 2
    assert complaint in err and len(err.splitlines()) == 1


def test_an_entry_of_the_wrong_kind_is_not_taken() -> None:
    with pytest.raises(InputError, match="not known offline"):
        counts_of("symphony_4b", "model.language.name=openai/clip-vit-large-patch14-336")


def test_counting_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B model in memory would take a minute and 30 GB; so would its upcycled experts."""
    counted = counts_of("cumo_mistral_7b")
    assert counted.whole.total > 7.5e9
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    assert resident < 4e9
    assert torch.empty(1).device.type == "cpu", "the meta device is not left switched on"
