"""What counts as a collapsed router or a dead expert, and what is said about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from symphony_vlm.config.monitor import MonitorConfig
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import update_expert_graphs
from symphony_vlm.moe.recording import RoutingRecorder, sparse_layers
from symphony_vlm.moe.router import RouterOutput
from symphony_vlm.moe.statistics import LoadStatistics
from symphony_vlm.training.router_watch import RouterWatch, collapse_threshold
from symphony_vlm.training.stage_warnings import StageWarnings


def _routed(choices: list[list[int]], num_experts: int = 4) -> RouterOutput:
    indices = torch.tensor(choices)
    logits = torch.zeros(len(choices), num_experts)
    weights = torch.full(indices.shape, 1 / indices.shape[1])
    return RouterOutput(weights_TK=weights, indices_TK=indices, logits_TE=logits, scores_TE=logits)


class Run:
    """A model with two sparse layers of four experts (K = 2) and its watch, fed by hand."""

    def __init__(self, model: Any, folder: Path, **settings: Any) -> None:
        self.model, self.folder = model, folder
        self.recorder: RoutingRecorder = model.routing
        self.path = folder / "warnings.jsonl"
        config = MonitorConfig(**settings)
        self.watch = RouterWatch(
            model, self.recorder, config, StageWarnings(self.path, lambda _: None, repeat_steps=1000)
        )
        self.arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
        self.step = 0
        self.watch.on_train_begin(self.arguments, TrainerState(), TrainerControl())

    def advance(self, steps: int, *by_layer: list[list[int]], log: bool = True) -> None:
        for layer, choices in enumerate(by_layer):
            self.recorder.statistics.add(layer, _routed(choices), None)
        self.step += steps
        state = TrainerState(global_step=self.step)
        self.watch.on_step_end(self.arguments, state, TrainerControl(should_log=log))

    @property
    def warned(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []


EVEN = [[0, 1], [2, 3]] * 50
ALL_ON_ONE = [[1, 0], [1, 2], [1, 3], [1, 0]] * 25
"""Every token chooses expert 1, whose share of the slots is only a half."""


@pytest.fixture
def run(tiny_model_factory: Any, tmp_path: Path) -> Run:
    model = tiny_model_factory(moe=MoEConfig(num_experts=4, router="symphony_smoe"))
    return Run(model, tmp_path, collapse_steps=30, dead_steps=40)


def test_a_router_that_stays_collapsed_is_warned_about_once_by_name_with_what_to_try(run: Run) -> None:
    run.advance(10, EVEN, ALL_ON_ONE)
    run.advance(10, EVEN, ALL_ON_ONE)
    assert run.warned == []
    assert [layer.is_collapsed for layer in run.watch.latest] == [False, True]
    run.advance(10, EVEN, ALL_ON_ONE)
    run.advance(10, EVEN, ALL_ON_ONE)
    (warning,) = run.warned
    assert (warning["kind"], warning["layer"], warning["step"], warning["share"]) == (
        "collapsed_router",
        "decoder layer 1",
        30,
        1.0,
    )
    assert "100.0% of its tokens have chosen expert 1 for 30 steps (an even load is 50%)" in warning["message"]
    for remedy in ("balance_loss_weight (now 0.01)", "layers.1.mlp.router", "jitter_noise", "strength (now 0.5)"):
        assert remedy in warning["remedy"]


def test_steps_must_follow_each_other(run: Run) -> None:
    for _ in range(3):
        run.advance(20, ALL_ON_ONE, EVEN)
        run.advance(1, EVEN, EVEN)
    assert run.warned == []


def test_dead_experts_are_named_but_only_if_chance_cannot_explain_them(run: Run) -> None:
    without_three = [[0, 1], [1, 2], [2, 0]] * 10
    few = [[0, 1]]
    for _ in range(5):
        run.advance(10, without_three, few)
    (warning,) = run.warned
    assert (warning["kind"], warning["layer"], warning["experts"]) == ("dead_experts", "decoder layer 0", [3])
    assert warning["step"] == 40


def test_a_frozen_router_gets_other_advice(tiny_model_factory: Any, tmp_path: Path) -> None:
    model = tiny_model_factory(moe=MoEConfig(num_experts=4, router="smoe"))
    model.requires_grad_(False)
    run = Run(model, tmp_path, collapse_steps=1)
    run.advance(10, ALL_ON_ONE)
    assert "frozen" in run.warned[0]["remedy"]


@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "threshold"),
    [(8, 1, 0.9), (4, 2, 0.9), (64, 8, 0.9), (16, 15, 1 - 1 / 32), (4, 4, 1.0)],
)
def test_the_threshold_lies_far_from_an_even_load(num_experts: int, num_chosen: int, threshold: float) -> None:
    """With K = E every token chooses every expert, which must not count: the share 1 is not above 1."""
    assert collapse_threshold(0.9, num_experts, num_chosen) == pytest.approx(threshold, abs=1e-12)


def test_what_is_shown_and_logged(run: Run) -> None:
    """Shares add up to K; the gate's logits are all equal, so its entropy is ln E."""
    run.advance(10, EVEN, ALL_ON_ONE)
    first, second = run.watch.latest
    assert first.shares == (0.5, 0.5, 0.5, 0.5)
    assert second.shares == pytest.approx((0.5, 1.0, 0.25, 0.25))
    assert first.entropy == pytest.approx(1.0)
    assert run.watch.log_entries == {"router/largest_share": 1.0, "router/entropy_min": 1.0, "router/drift": 0.0}


def test_the_drift_is_the_way_of_the_graph_over_the_steps(run: Run) -> None:
    router = next(layer for _, layer in sparse_layers(run.model)).router
    before = router.expert_graph.whole_adjacency().clone()
    router.expert_graph.count(router.membership(_routed(EVEN), None))
    update_expert_graphs(run.model)
    run.advance(5, EVEN, EVEN)
    way = float((router.expert_graph.whole_adjacency() - before).norm())
    assert way > 0
    assert run.watch.latest[0].drift == pytest.approx(way / 5)
    assert run.watch.latest[0].edge is not None and run.watch.latest[0].edge[:2] in {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_nothing_is_read_between_log_steps(run: Run) -> None:
    run.advance(1, EVEN, EVEN, log=False)
    assert run.watch.latest == []


def test_two_readers_of_the_statistics_have_intervals_of_their_own() -> None:
    """One reads twice while the other reads once; the second sees the sum."""
    statistics = LoadStatistics()
    statistics.read("fast"), statistics.read()
    statistics.add(0, _routed(ALL_ON_ONE), None)
    assert statistics.read("fast")[0]["tokens"] == 100
    statistics.add(0, _routed(EVEN), None)
    assert statistics.read("fast")[0]["load"] == [0.25] * 4
    whole = statistics.read()[0]
    assert whole["tokens"] == 200
    assert whole["load"] == pytest.approx([0.25, 0.375, 0.1875, 0.1875])
    assert whole["gate_entropy"] == pytest.approx(math.log(4))
    assert statistics.read("fast") == statistics.read() == {}
