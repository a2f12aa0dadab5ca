"""Opening a model on a device, in a precision, quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import symphony_vlm as sv
from symphony_vlm.errors import InputError
from symphony_vlm.model import quantization
from symphony_vlm.model.devices import choose_device

CUDA = torch.cuda.is_available()


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
    if CUDA:
        with pytest.raises(InputError, match=r"symphony-vlm\[qlora\]|needs a CUDA device, not 'cpu'"):
            sv.load(tiny_model_folder, device="cpu", quantization=bits)
    else:
        with pytest.raises(InputError, match=r"quantization: .bit needs .*symphony-vlm\[qlora\]"):
            sv.load(tiny_model_folder, quantization=bits)


def test_quantisation_needs_the_cuda_device_to_be_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_bitsandbytes", lambda *args: None)
    with pytest.raises(InputError, match="8bit needs a CUDA device, not 'cpu'"):
        quantization.check_quantization("8bit", torch.device("cpu"))
    quantization.check_quantization("8bit", torch.device("cuda"))
    quantization.check_quantization("none", torch.device("cpu"))


@pytest.mark.skipif(not CUDA, reason="bitsandbytes quantises on CUDA")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_model_is_smaller_and_close(tiny_model_folder: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    whole = sv.load(tiny_model_folder, device="cuda", dtype="bfloat16")
    small = sv.load(tiny_model_folder, device="cuda", dtype="bfloat16", quantization=bits)
    assert small.get_memory_footprint() < whole.get_memory_footprint()
    inputs = whole.probe_inputs()
    with torch.no_grad():
        expected, found = whole(**inputs).logits.float(), small(**inputs).logits.float()
    # Weights of 4 bits are off by up to a sixth of the largest of their block; the directions of logits stay.
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.9


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if CUDA else "cpu")
