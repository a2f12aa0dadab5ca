"""Experts shared out over gloo processes compute what one process computes: see ``expert_parallel_worker.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.moe.expert_parallel import shard_experts_
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.token_exchange import compute_rows

WORKER = Path(__file__).with_name("expert_parallel_worker.py")
STEPS, SAVED = 5, 3
FORMS = ["gated", "gated with biases", "plain", "plain with biases"]
COMPUTED = [(form, implementation) for form in FORMS for implementation in ("segments", "grouped_mm", "batched_mm")]
COMPUTED.append(("gated", "fused"))  # which knows no other form
ROUTINGS = ["even", "uneven", "one expert", "the second rank's experts"]
ROUTINGS += ["no token on the second rank", "no token at all"]
SCENARIOS = ["symphony", "checkpointing", "native", "shared expert", "images", "images, all frozen but the projector"]
SCENARIOS += ["images, the language model alone trains"]
PER_TOKEN = ("output", "x", "weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expert_parallel")
    command = [sys.executable, str(WORKER), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # A rank that waited for the others for ever would be stopped by this.
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Results by number of processes, of each of them."""
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in (1, 2, 4)}


def check_layer(runs: dict[int, list[dict[str, Any]]], name: str) -> dict[str, Tensor]:
    """Output and gradients of the tokens of both ranks, and of all parameters on each of them."""
    alone = runs[1][0]["layers"][name]
    ranks = [run["layers"][name] for run in runs[2]]
    together = {key: torch.cat([rank[key] for rank in ranks]) for key in PER_TOKEN if key in alone}
    for results in [together | {key: rank[key] for key in alone if key not in PER_TOKEN} for rank in ranks]:
        assert results.keys() == alone.keys() and all(results.keys() >= rank.keys() for rank in ranks)
        for key, expected in alone.items():
            # Sums of at most 48 products, each rounded by 6e-8 of its size, in an order that may depend on how many
            # rows are multiplied at once.
            scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(results[key], expected, atol=2e-6 * scale, rtol=0, msg=lambda m: f"{key}: {m}")  # noqa: B023
    return alone


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("form", "implementation"), COMPUTED)
def test_shared_out_experts_equal_those_of_one_process_in_output_and_gradients(
    runs: dict[int, list[dict[str, Any]]], form: str, implementation: str, routing: str
) -> None:
    alone = check_layer(runs, f"{form}/{implementation}/{routing}")
    assert (alone["output"].numel() == 0) == (routing == "no token at all")
    for gradient in (alone[key] for key in alone if key.startswith("experts.")):
        used = gradient.abs().flatten(1).amax(1) > 0
        assert used.tolist() == {
            "one expert": [False, False, False, True],
            "the second rank's experts": [False, False, True, True],
            "no token on the second rank": [True, False, False, True],
            "no token at all": [False] * 4,
        }.get(routing, [True] * 4)


@pytest.mark.parametrize("name", ["layer", "shared expert"])
def test_a_whole_layer_and_its_clipped_gradients_equal_those_of_one_process(
    runs: dict[int, list[dict[str, Any]]], name: str
) -> None:
    alone = check_layer(runs, name)
    assert alone["norm"] > 1  # so that clipping to 0.5 acts
    kept = [gradient for key, gradient in alone.items() if key not in (*PER_TOKEN, "norm")]
    assert float(torch.stack([gradient.norm() for gradient in kept]).norm()) == pytest.approx(0.5, rel=1e-4)


def test_sixteen_bits_travel_as_they_are(runs: dict[int, list[dict[str, Any]]]) -> None:
    alone = runs[1][0]["layers"]["bfloat16"]
    ranks = [run["layers"]["bfloat16"] for run in runs[2]]
    for key, expected in alone.items():
        ours = torch.cat([rank[key] for rank in ranks]) if key in PER_TOKEN else ranks[0][key]
        assert ours.dtype == expected.dtype == (torch.float32 if key == "weights" else torch.bfloat16)
        # A value may be rounded the other way, by 2^-8 of its size, where products are added in another order.
        assert (ours.float() - expected.float()).abs().max() <= 2**-7 * expected.float().abs().max(), key


def test_a_rank_whose_tokens_carry_no_gradient_still_returns_those_of_the_others(
    runs: dict[int, list[dict[str, Any]]],
) -> None:
    """Otherwise the first rank would wait for it in the backward pass for ever."""
    first, second = (run["layers"]["only the first rank's tokens have a gradient"] for run in runs[2])
    expected = runs[1][0]["layers"]["gated/segments/uneven"]["x"][: len(first)]
    assert second is None
    torch.testing.assert_close(first, expected, atol=2e-6, rtol=0)


def check_training(ranks: list[list[dict[str, Any]]], alone: list[dict[str, Any]]) -> None:
    """Every rank at every step against the oracle: losses, norms, graphs, weights."""
    for states in zip(*ranks, strict=True):
        shared_out = {key for key in states[0]["own"] if ".experts." in key}
        assert shared_out
        for state in states[1:]:
            assert state["norm"].equal(states[0]["norm"])
            assert all(a.equal(b) for a, b in zip(state["graphs"], states[0]["graphs"], strict=True))
            assert all(state["own"][key].equal(states[0]["own"][key]) for key in state["own"].keys() - shared_out)
    for state, expected in zip(ranks[0], alone, strict=False):
        # Roundings of 6e-8 in gradients of up to 1, which AdamW with an epsilon of 1e-3 and a rate of 0.02 makes steps
        # of up to 1.2e-6, some of them in the same direction for five steps.
        assert state["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert float(state["norm"]) == pytest.approx(float(expected["norm"]), rel=1e-4)
        assert state["whole"].keys() == expected["whole"].keys()
        for key, weight in expected["whole"].items():
            torch.testing.assert_close(state["whole"][key], weight, atol=1e-5, rtol=0, msg=lambda m: f"{key}: {m}")  # noqa: B023
        # Counts are whole numbers, exact in whatever order they are added.
        for ours, graph in zip(state["graphs"], expected["graphs"], strict=True):
            torch.testing.assert_close(ours, graph, atol=0, rtol=0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_training_is_that_of_one_process(runs: dict[int, list[dict[str, Any]]], name: str) -> None:
    ranks = [run["training"][name] for run in runs[2]]
    alone = runs[1][0]["training"][name]
    check_training([states[:STEPS] for states in ranks], alone)
    # What is compared has moved by far more than the tolerance, the experts of both ranks too.
    first, last = alone[0]["whole"], alone[-1]["whole"]
    moved = {key: (last[key] - first[key]).abs() for key in first if first[key].is_floating_point()}
    assert max(float(way.max()) for way in moved.values()) > 1e-2
    if "frozen" not in name and "alone" not in name:
        for key, way in moved.items():
            if ".experts." in key:
                assert (way.flatten(1).amax(1) > 1e-4).all(), key
        assert all(float(state["norm"]) > 0.5 for state in alone), "clipping acts"


@pytest.mark.parametrize("name", SCENARIOS)
def test_training_continues_from_whole_weights_and_a_whole_optimizer_state(
    runs: dict[int, list[dict[str, Any]]], name: str
) -> None:
    for run in runs[2]:
        states = run["training"][name]
        assert len(states) == STEPS + STEPS - SAVED
        for uninterrupted, continued in zip(states[SAVED:STEPS], states[STEPS:], strict=True):
            assert uninterrupted["loss"] == continued["loss"]
            assert all(uninterrupted["own"][key].equal(continued["own"][key]) for key in continued["own"])


def test_one_process_continues_what_two_have_saved(folder: Path, runs: dict[int, list[dict[str, Any]]]) -> None:
    """The files do not tell how many ranks shared the experts."""
    states = [run["training"]["symphony"][SAVED:STEPS] for run in runs[2]]
    check_training(states, torch.load(folder / "continued.pt"))


def test_groups_that_hold_the_same_experts_train_them_together(runs: dict[int, list[dict[str, Any]]]) -> None:
    """Four ranks, two groups of two."""
    ranks = [run["replicas"][:STEPS] for run in runs[4]]
    check_training(ranks, runs[1][0]["replicas"])
    for first, second in ((0, 2), (1, 3)):
        for a, b in zip(ranks[first], ranks[second], strict=True):
            assert all(a["own"][key].equal(b["own"][key]) for key in a["own"])
    key = next(key for key in ranks[0][0]["own"] if key.endswith("experts.down_proj"))
    assert len(ranks[0][0]["own"][key]) == 2 and not ranks[0][0]["own"][key].equal(ranks[1][0]["own"][key])


def test_a_saved_model_is_an_ordinary_one(folder: Path, runs: dict[int, list[dict[str, Any]]]) -> None:
    saved = [run["saved"] for run in runs[2]]
    for rank in saved:
        assert rank["before"].keys() == rank["after"].keys()
        assert all(rank["before"][key].equal(rank["after"][key]) for key in rank["before"])
    model = sv.load_language_model(folder / "model").eval()
    ids = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    for rank in saved:
        for others in rank["logits"]:
            # Logits of size 10, products in another order.
            torch.testing.assert_close(others, logits, atol=1e-5, rtol=0)
    state = model.state_dict()
    for key, weight in saved[0]["before"].items():
        assert any(name.endswith(key) and weight.equal(value) for name, value in state.items()), key


def test_the_documented_loop_trains_and_saves_an_ordinary_model(folder: Path) -> None:
    trained, before = (sv.load_language_model(folder / name).state_dict() for name in ("sparse", "model"))
    assert trained.keys() == before.keys()
    for key, weight in trained.items():
        assert weight.shape == before[key].shape
        if ".experts." in key:  # all of them have learnt
            assert ((weight - before[key]).abs().flatten(1).amax(1) > 1e-5).all()


def test_an_implementation_never_has_to_compute_nothing() -> None:
    """Of transformers', some may not; the experts still get gradients, of zero."""
    experts = Experts(2, 8, 8, "silu")
    experts.reset(0.1)
    seen = []

    def compute(x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        seen.append(len(x_TD))
        return experts(x_TD, weights_TK, indices_TK)

    rows_MD = torch.empty(0, 8, requires_grad=True)
    results_MO = compute_rows(compute, rows_MD, torch.empty(0, dtype=torch.long))
    assert results_MO.shape == (0, 8) and seen == [1]
    results_MO.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in experts.parameters())
    assert rows_MD.grad is not None and rows_MD.grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("size", "3 does not divide 2 processes"),
        ("three experts", "3 experts .* cannot be shared out evenly over 2 ranks"),
        ("dense", "no experts to share out"),
        ("twice", "already shared out"),
        ("fsdp", "FSDP2 or DeepSpeed ZeRO-3 has sharded the parameters"),
        ("fsdp afterwards", "FSDP2 or DeepSpeed ZeRO-3 has sharded the parameters"),
        ("save", "save_pretrained: this rank has only its own experts"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_on_every_rank(
    runs: dict[int, list[dict[str, Any]]], case: str, message: str
) -> None:
    for run in runs[2]:
        assert re.search(message, run["refusals"][case])


def test_a_single_program_is_refused() -> None:
    with pytest.raises(InputError, match="no process group"):
        shard_experts_(nn.Linear(2, 2), 2)
