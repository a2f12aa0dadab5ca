"""A sparse layer of grouped products never asks the device for a number, and its shapes are known beforehand.

On a CPU every operation that would wait for a GPU, or whose result's shape hangs on values, is found as it is called.
On CUDA its own sync debug mode looks, and a graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutput

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import update_expert_graphs
from symphony_vlm.moe.experts import Experts
from symphony_vlm.moe.layer import SparseMoE
from symphony_vlm.moe.recording import RoutingRecorder
from symphony_vlm.moe.statistics import GraphDrift

HIDDEN, VOCAB, TOKENS = 32, 16, 24


@pytest.fixture(autouse=True)
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """``segments`` computes grouped products on a CPU too."""
    monkeypatch.setattr(Experts, "_can_group", lambda self, x_TD: True)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class ToyLanguageModel(nn.Module):
    """Two sparse layers and a loss, which is all that is ours of a language model's pass."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        config = MoEConfig(num_experts=4, experts_implementation="segments", **settings)
        self.layers = nn.ModuleList(make_layer(config, index) for index in range(2))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.routing = RoutingRecorder.attach(self, config)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> CausalLMOutput:
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        logits = self.head(inputs_embeds)
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))


def make_layer(config: MoEConfig, index: int = 0) -> SparseMoE:
    layer = SparseMoE(config, hidden_size=HIDDEN, intermediate_size=64, hidden_act="silu", layer_index=index)
    layer.reset(std=0.2)
    return layer


def train_and_infer(device: str, **settings: Any) -> Callable[[], None]:
    """Two micro-batches, the graphs' step, what is logged of it, and an evaluation pass; to be called as often."""
    torch.manual_seed(0)
    model = ToyLanguageModel(**settings).to(device, torch.bfloat16)
    drift = GraphDrift(model)
    batch = {
        "inputs_embeds": torch.randn(2, TOKENS, HIDDEN, device=device, dtype=torch.bfloat16),
        "attention_mask": (torch.arange(TOKENS, device=device) < TOKENS - 3).long().expand(2, -1),
        "labels": torch.randint(0, VOCAB, (2, TOKENS), device=device),
        "num_items_in_batch": torch.tensor(2 * (TOKENS - 1), device=device),
    }

    def run() -> None:
        model.train()
        for _ in range(2):
            model(**batch).loss.backward()
        update_expert_graphs(model)
        drift.step()
        model.eval()
        with torch.no_grad():
            model(**batch)

    return run


WAIT = {
    # `.item()`, `bool(tensor)` and `.tolist()` of one number
    "aten::_local_scalar_dense",
    # shapes that hang on values; the first is also what a boolean mask as an index becomes
    *("aten::nonzero", "aten::bincount", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive"),
    # a repetition that does not know its size beforehand
    "aten::repeat_interleave",
}


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.name().startswith(("aten::index.", "aten::index_put")) else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        name = func.name().split(".")[0]
        if name in WAIT or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    with _Waits() as mode:
        yield mode.found


SETTINGS: dict[str, dict[str, Any]] = {
    "smoe": {"router": "smoe"},
    "symphony": {},
    "symphony after the fact": {"active": "eval"},
    "cosine, logits smoothed, soft counts": {"router": "symphony_xmoe", "smooth": "logits", "counts": "soft"},
    "sinkhorn": {"normalization": "sinkhorn"},
    "jitter": {"jitter_noise": 0.1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_and_inference_ask_for_no_number(settings: dict[str, Any]) -> None:
    run = train_and_infer("cpu", **settings)
    with waits() as found:
        run()
    assert found == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x),
        lambda x: torch.arange(4).repeat_interleave(x),
    ],
    ids=["item", "bool", "mask", "bincount", "repeat"],
)
def test_the_test_above_finds_what_would_wait(ask: Callable[[Tensor], Any]) -> None:
    with waits() as found:
        ask(torch.tensor([1, 0, 2, 1]))
    assert found


@needs_cuda
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_and_inference_never_synchronise_on_cuda(settings: dict[str, Any]) -> None:
    run = train_and_infer("cuda", **settings)
    run()  # libraries and memory are set up the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Decoding: one token of each of a few sequences.


def decoding_layer(device: str) -> SparseMoE:
    torch.manual_seed(0)
    layer = make_layer(MoEConfig(num_experts=8, experts_implementation="segments")).to(device, torch.bfloat16)
    with torch.no_grad():
        layer.router.gate.weight.normal_()  # no race so close that another order of sums decides it
    return layer.eval()


def tokens(count: int, device: str, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, HIDDEN, generator=generator).to(device, torch.bfloat16)


def assert_equal_but_for_rounding(ours: Tensor, expected: Tensor) -> None:
    # Fused operations round once where separate ones round to bfloat16 (2^-9) up to five times.
    assert (ours.float() - expected.float()).abs().max() <= 5 * 2**-9 * expected.float().abs().max()


def check_compiled(device: str, backend: str) -> None:
    layer = decoding_layer(device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    for count in (1, 2, 5, 8):
        with torch.inference_mode():
            expected = layer(tokens(count, device))
            assert_equal_but_for_rounding(compiled(tokens(count, device)), expected)


def test_decoding_is_one_graph_of_the_compiler() -> None:
    check_compiled("cpu", "aot_eager")


@needs_cuda
def test_decoding_is_one_graph_of_the_compiler_on_cuda() -> None:
    check_compiled("cuda", "inductor")


@needs_cuda
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_decoding_can_be_captured_in_a_cuda_graph(count: int) -> None:
    layer, static = decoding_layer("cuda"), tokens(count, "cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries are set up outside of the capture
            for _ in range(3):
                layer(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(static)
        for seed in (1, 2):  # other tokens, and so other experts
            static.copy_(tokens(count, "cuda", seed=seed))
            graph.replay()
            assert_equal_but_for_rounding(captured, layer(static))
