"""Opening a model on a device, in a precision, quantised."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.model import quantization
from symphony_vlm.model.devices import choose_device
from symphony_vlm.moe.experts import Experts

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")


def test_bfloat16_leaves_gates_and_graphs_in_fp32(tiny_model_folder: Path) -> None:
    model = sv.load(tiny_model_folder, device="cpu", dtype="bfloat16")
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert kinds["language_model.lm_head.weight"] == torch.bfloat16
    routers = {name: kind for name, kind in kinds.items() if ".router." in name}
    assert routers
    assert set(routers.values()) == {torch.float32}
    assert len(model.chat("What color is it?", max_new_tokens=4)) > 0


def test_the_default_is_what_was_saved(tiny_model_folder: Path) -> None:
    model = sv.load(tiny_model_folder)
    assert model.dtype == torch.float32
    assert model.device.type == ("cuda" if CUDA else "cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device: 'gpu' is not the name of a device"),
        ({"device": "mps"}, "device: 'mps' is asked for, and PyTorch finds no MPS device here"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"dtype": "bf16"}, "dtype: 'bf16' is not one of auto, float32, bfloat16, float16"),
        ({"quantization": "2bit"}, "quantization: '2bit' is not one of none, 8bit, 4bit"),
    ],
)
def test_what_is_not_to_be_had_is_refused(tiny_model_folder: Path, settings: dict[str, str], message: str) -> None:
    if settings.get("device") == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match=message):
        sv.load(tiny_model_folder, **settings)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantisation_names_the_extra_before_reading_weights(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(sv.SymphonyVLMForConditionalGeneration, "from_pretrained", read)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"quantization: .bit needs bitsandbytes .*symphony-vlm\[qlora\]"):
        sv.load(tiny_model_folder, quantization=bits)


def test_devices_that_quantise() -> None:
    with pytest.raises(InputError, match="quantization: 8bit needs a device of cuda or cpu, not 'mps'"):
        quantization.check_quantization("8bit", torch.device("mps"))
    quantization.check_quantization("8bit", torch.device("cuda"))
    quantization.check_quantization("4bit", torch.device("cpu"))
    quantization.check_quantization("none", torch.device("mps"))


@pytest.fixture(scope="module")
def folder_of_64(
    tiny_model_factory: Callable[..., sv.SymphonyVLMForConditionalGeneration], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A sparse model as wide as a block of bitsandbytes."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model_factory(moe=sv.MoEConfig(num_experts=4, expert_init_noise=0.5), hidden_size=64)
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_model_is_smaller_and_close(folder_of_64: Path, device: str, bits: str) -> None:
    whole = sv.load(folder_of_64, device=device, dtype="bfloat16")
    small = sv.load(folder_of_64, device=device, dtype="bfloat16", quantization=bits)
    # Of the language model's weights beside head and embeddings; NF4 has a scale for each 64.
    assert _size_of_layers(small) < {"8bit": 0.95, "4bit": 0.35}[bits] * _size_of_layers(whole)
    inputs = whole.probe_inputs()
    with torch.no_grad():
        expected, found = whole(**inputs).logits.float(), small(**inputs).logits.float()
    # Weights of 4 bits are off by up to a sixth of the largest of their block; the directions of logits stay.
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.9
    assert not torch.equal(expected, found)
    assert len(small.chat("What color is it?", max_new_tokens=4)) > 0


def _size_of_layers(model: sv.SymphonyVLMForConditionalGeneration) -> int:
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.language_model.named_parameters()
        if ".layers." in name and ".router." not in name
    )


def test_experts_of_4_bits_are_those_of_nf4(folder_of_64: Path) -> None:
    import bitsandbytes.functional as bnb

    whole = sv.load(folder_of_64, device="cpu")
    small = sv.load(folder_of_64, device="cpu", quantization="4bit")
    experts = [m for m in whole.language_model.modules() if isinstance(m, Experts)]
    quantised = [m for m in small.language_model.modules() if isinstance(m, Experts)]
    assert len(experts) == len(quantised) > 0
    for before, after in zip(experts, quantised, strict=True):
        x_TD = torch.randn(12, before.up_weight.shape[2])
        indices_TK = torch.stack([torch.randperm(before.num_experts)[:2] for _ in range(12)])
        weights_TK = torch.full((12, 2), 0.5)
        for weight in (before.up_weight, before.down_proj):
            data, state = bnb.quantize_4bit(weight.data, quant_type="nf4")
            weight.data = bnb.dequantize_4bit(data, state)
        assert torch.equal(after(x_TD, weights_TK, indices_TK), before(x_TD, weights_TK, indices_TK))


def test_a_model_too_narrow_for_4_bits_is_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(InputError, match="quantization: 4bit: no linear layer .* has 64 n inputs and 32 n outputs"):
        sv.load(tiny_model_folder, device="cpu", quantization="4bit")


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if CUDA else "cpu")
