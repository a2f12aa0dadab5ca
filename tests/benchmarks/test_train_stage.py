"""The benchmark of a stage's steps runs that stage as training does, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_it_measures_real_steps_of_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)  # the benchmarks are no part of the installed package
    from benchmarks.train_stage import main

    output, table = tmp_path / "result.json", tmp_path / "profile.txt"
    settings = ["batch_size=2", "global_batch_size=4", "model.moe.router=smoe"]
    main(
        [
            "tiny",
            "instruct",
            "--steps",
            "4",
            "--image-size",
            "64",
            "--json",
            str(output),
            "--profile",
            str(table),
            *settings,
        ]
    )
    found = json.loads(output.read_text())
    assert found["steps"] == len(found["losses"]) == 4
    assert (found["batch_size"], found["gradient_accumulation_steps"]) == (2, 2)
    assert found["losses"][-1] < found["losses"][0]
    assert found["trained_parameters"] == found["parameters"] > 0
    assert found["samples_per_second"] > 0 and found["tokens_per_second"] > 0
    assert "aten::" in table.read_text()
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{\n") :])["samples_per_second"] == found["samples_per_second"]


SMALL = [
    *(f"model.language.architecture.{name}=16" for name in ("hidden_size", "n_inner")),
    "model.language.architecture.num_hidden_layers=1",
    "model.language.architecture.num_attention_heads=2",
    "model.language.architecture.max_position_embeddings=32",
    *(f"model.language.architecture.{name}=0.0" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
    "model.language.vocab_size=500",
    "model.moe.num_experts=4",
    "max_length=16",
    "batch_size=4",
    "global_batch_size=8",
]


def test_two_language_recipes_are_trained_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see the same data from the same weights; at first, while the graphs are the identity, they do the same."""
    monkeypatch.syspath_prepend(REPOSITORY)
    from benchmarks import paired_stages
    from benchmarks.train_stage import main

    turns: list[int] = []
    original = paired_stages.Blocks._begin

    def begin(self: paired_stages.Blocks) -> None:
        original(self)
        turns.append(self.me)

    monkeypatch.setattr(paired_stages.Blocks, "_begin", begin)
    output = tmp_path / "pair.json"
    recipes = ["wikitext103_smoe_medium", "language", "--against", "wikitext103_symphony_smoe_medium"]
    main([*recipes, "--steps", "6", "--block", "2", "--json", str(output), *SMALL])
    assert turns == [0, 1, 1, 0, 0, 1]
    found = json.loads(output.read_text())
    plain, symphony = (found["recipes"][recipe] for recipe in (recipes[0], recipes[3]))
    assert plain["parameters"] == symphony["parameters"] > 2 * 500 * 16, "the vocabulary is there in full"
    assert plain["steps"] == symphony["steps"] == 6
    assert plain["losses"][0] == symphony["losses"][0], "logged after a block's last step, but the first step too"
    assert found["pairs"] == 2 and [len(seconds) for seconds in found["block_seconds"]] == [3, 3]
    assert found["ratio"] > 0 and found["error"] >= 0
    assert "block_seconds" not in capsys.readouterr().out


def test_the_ratio_is_of_neighbours_and_a_fault_of_one_ends_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)
    from transformers import TrainerControl, TrainerState

    from benchmarks.paired_stages import Blocks, compare, train_in_turn

    # The machine becomes four times slower; the second is always a tenth slower than the first.
    drift = [1.0, 2.0, 3.0, 4.0]
    assert compare(drift, [1.1 * value for value in drift]) == {"ratio": pytest.approx(1.1), "error": pytest.approx(0)}

    class Loop:
        """A trainer's loop with nothing in it."""

        def __init__(self, fails_at: int) -> None:
            self._fails_at = fails_at

        def add_callback(self, callback: Blocks) -> None:
            self._callback = callback

        def train(self) -> None:
            state, control = TrainerState(max_steps=4), TrainerControl()
            arguments: Any = None
            self._callback.on_train_begin(arguments, state, control)
            for step in range(1, 5):
                if step == self._fails_at:
                    raise RuntimeError("no memory")
                state.global_step = step
                self._callback.on_step_end(arguments, state, control)

    assert [len(seconds) for seconds in train_in_turn([Loop(0), Loop(0)], steps=2, blocks=2)] == [2, 2]  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="no memory"):
        train_in_turn([Loop(0), Loop(3)], steps=2, blocks=2)  # type: ignore[list-item]


def test_a_stage_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)
    from benchmarks.train_stage import main

    with pytest.raises(SystemExit, match="no multimodal or language stage 'encoder'; it has pretrain, instruct"):
        main(["tiny", "encoder"])
