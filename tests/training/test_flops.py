"""Model FLOPs against what torch counts in a real forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.experts import Experts
from symphony_vlm.training.batch_sizes import BatchSizes
from symphony_vlm.training.contrastive import ContrastiveModel
from symphony_vlm.training.flops import TrainingFlops, peak_tflops, training_flops
from symphony_vlm.training.trainer import freeze_except

# Both counts are of the same products. What the formula leaves out: the product with the expert graph, E / 2D of a
# gate, and products of rotary positions (outer products of two short vectors).
TOLERANCE = 0.01
LENGTH, BATCH = 64, 2


@pytest.fixture(autouse=True)
def _no_fused_attention() -> Iterator[None]:
    """Of fused kernels on a CPU torch counts nothing, so everything runs as products of matrices here."""
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(True)


def _counted(model: Any, **inputs: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return float(counter.get_total_flops())


def _batch(model: Any) -> tuple[dict[str, torch.Tensor], BatchSizes]:
    generator = torch.Generator().manual_seed(0)
    num_features = model.config.num_image_tokens
    ids = torch.randint(5, 300, (BATCH, LENGTH), generator=generator)
    ids[ids == model.config.image_token_id] = 5
    ids[:, 4 : 4 + num_features] = model.config.image_token_id
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    size = model.vision_tower.config.input_size
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(BATCH, 3, size, size)}
    inputs["attention_mask"] = torch.ones_like(ids)
    supervised = int((labels[:, 1:] != -100).sum())
    lengths = (LENGTH,) * BATCH
    sizes = BatchSizes(
        samples=BATCH, tokens=ids.numel(), supervised=supervised, places=ids.numel(), tiles=BATCH, lengths=lengths
    )
    return inputs, sizes


RATES: dict[str, dict[str, float]] = {
    "stage 1": {"projector": 1.0},
    "stage 2": {"projector": 1.0, "language_model": 1.0},
    "everything": {"vision_tower": 1.0, "projector": 1.0, "language_model": 1.0},
    "upper layer alone": {"language_model.model.layers.1": 1.0},
}


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's counter knows single products, and counts nothing for a grouped one."""
    monkeypatch.setattr(Experts, "_can_group", lambda self, x_TD: False)


@pytest.mark.parametrize("stage", RATES)
@pytest.mark.parametrize("num_experts", [None, 4])
def test_the_formula_is_what_torch_counts(tiny_model_factory: Any, stage: str, num_experts: int | None) -> None:
    moe = None if num_experts is None else MoEConfig(num_experts=num_experts, router="smoe", num_experts_per_tok=2)
    model = tiny_model_factory(moe=moe)
    freeze_except(model, RATES[stage])
    model.train()
    inputs, sizes = _batch(model)
    counted = _counted(model, **inputs)
    expected = training_flops(model).of(sizes)
    assert expected == pytest.approx(counted, rel=TOLERANCE), (counted, expected)


@pytest.mark.parametrize("module", ["vision", "projector"])
def test_experts_in_front_of_the_language_model_count_with_their_active_share(
    tiny_model_factory: Any, module: str
) -> None:
    moe = MoEConfig(num_experts=4, router="smoe", num_experts_per_tok=2, modules=(module,))  # type: ignore[arg-type]
    model = tiny_model_factory(moe=moe).train()
    freeze_except(model, RATES["everything"])
    inputs, sizes = _batch(model)
    assert training_flops(model).of(sizes) == pytest.approx(_counted(model, **inputs), rel=TOLERANCE)


def test_a_cached_tower_costs_nothing(tiny_model_factory: Any) -> None:
    model = tiny_model_factory()
    freeze_except(model, RATES["stage 1"])
    model.train()
    inputs, sizes = _batch(model)
    inputs["vision_features"] = model.vision_tower(inputs.pop("pixel_values")).detach()
    counted = _counted(model, **inputs)
    assert training_flops(model, cached_features=True).of(sizes) == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("window", [None, 16])
def test_a_language_model_alone_has_logits_everywhere(window: int | None) -> None:
    """A window saves products in the formula; torch, which multiplies and then masks, does not notice."""
    config = AutoConfig.for_model(
        "mistral", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=window,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(5, 300, (BATCH, LENGTH))
    sizes = BatchSizes(tokens=ids.numel(), lengths=(LENGTH,) * BATCH)
    counted = _counted(model, input_ids=ids, labels=ids)
    saved = 0 if window is None else 3 * 2 * 4 * 2 * 16 * BATCH * LENGTH * (LENGTH - window)
    assert training_flops(model).of(sizes) == pytest.approx(counted - saved, rel=TOLERANCE)


def test_transformers_own_experts_count_with_their_active_share() -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()
    ids = torch.randint(5, 300, (BATCH, LENGTH))
    sizes = BatchSizes(tokens=ids.numel(), lengths=(LENGTH,) * BATCH)
    assert training_flops(model).of(sizes) == pytest.approx(_counted(model, input_ids=ids, labels=ids), rel=TOLERANCE)


def test_the_palm_formula_is_the_limit_when_everything_trains(tiny_model_factory: Any) -> None:
    """6 N + 12 L H Q T per token (PaLM, appendix B), N without the embedding, with the head on every token."""
    model = tiny_model_factory().language_model
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in n)
    flops = training_flops(model)
    tokens = BatchSizes(tokens=LENGTH, lengths=(LENGTH,))
    assert flops.of(tokens) == LENGTH * (6 * weights + 12 * 2 * 2 * 16 * LENGTH)


def test_an_image_and_its_caption_cost_both_encoders() -> None:
    architecture = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    }
    model = ContrastiveModel(architecture, 100).train()
    captions = torch.randint(0, 100, (BATCH, 16))
    counted = _counted(model, pixel_values=torch.randn(BATCH, 3, 32, 32), captions=captions)
    assert training_flops(model).of(BatchSizes(samples=BATCH)) == pytest.approx(counted, rel=TOLERANCE)


def test_padding_costs_nothing_and_documents_attend_to_themselves() -> None:
    flops = TrainingFlops(token=2.0, pairs=((None, 1.0),))
    assert flops.of(BatchSizes(tokens=5, places=8, lengths=(2, 3))) == 10 + 4 + 9


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, False, 989),
        ("NVIDIA H100 PCIe", True, False, 756),
        ("NVIDIA H200", False, True, 495),
        ("NVIDIA A100-SXM4-80GB", False, False, 19.5),
        ("NVIDIA L40S", True, False, 362),
        ("NVIDIA GeForce RTX 4090", True, False, 165.2),
        ("NVIDIA GeForce GTX 1080", True, False, None),
    ],
)
def test_peaks_are_found_by_the_devices_name(name: str, bf16: bool, tf32: bool, peak: float | None) -> None:
    assert peak_tflops(name, bf16=bf16, tf32=tf32) == peak
