"""The least that a library must be able to do here, each with a word on what was seen."""

from __future__ import annotations

import io

__all__ = [
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "opencv",
    "pillow",
    "safetensors",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
]


def torch() -> str:
    """A product and its gradient, and what PyTorch was built for."""
    import torch

    x = torch.ones(2, 3, requires_grad=True)
    (x @ x.T).sum().backward()
    _expect(x.grad is not None and bool((x.grad == 4).all()), "a gradient is wrong")
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU alone"


def torchvision() -> str:
    """A transform."""
    import torch
    from torchvision.transforms import functional

    from symphony_vlm._imports import torchvision_operators_missing

    _expect(functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4), "a resized picture has the wrong shape")
    # Nothing here needs them, but whoever looks for the reason of another library's error should read it.
    return "its compiled operators do not fit torch and are not needed" if torchvision_operators_missing() else ""


def transformers() -> str:
    """The Auto classes, with this package's models among them."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind, auto_class in {"symphony_vlm": AutoModelForImageTextToText, "symphony_lm": AutoModelForCausalLM}.items():
        if CONFIG_MAPPING[kind] not in auto_class._model_mapping:
            raise RuntimeError(f"{kind} is not registered with {auto_class.__name__}")
    return "our models are registered"


def tokenizers() -> str:
    """One word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    _expect(Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).encode("b").ids == [1], "a word has the wrong number")
    return ""


def safetensors() -> str:
    """There and back."""
    import torch
    from safetensors.torch import load, save

    saved = torch.arange(3, dtype=torch.bfloat16)
    _expect(torch.equal(load(save({"x": saved}))["x"], saved), "a tensor came back changed")
    return ""


def datasets() -> str:
    """A table of one row."""
    from datasets import Dataset

    _expect(Dataset.from_dict({"a": [1]})[0] == {"a": 1}, "a row came back changed")
    return ""


def pillow() -> str:
    """The formats that pictures come in."""
    from PIL import Image

    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 0, 0)).save(file, kind)
        _expect(Image.open(file).convert("RGB").size == (8, 8), f"a {kind} came back in another size")
    return "reads PNG, JPEG, WebP"


def opencv() -> str:
    """A blur, as the corruptions use it."""
    import cv2
    import numpy as np

    _expect(
        cv2.GaussianBlur(np.full((8, 8, 3), 7, np.uint8), (0, 0), 1.0)[0, 0, 0] == 7,
        "a blurred flat picture has changed",
    )
    return ""


def matplotlib() -> str:
    """A figure without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    FigureCanvasAgg(figure)
    figure.subplots().plot([0, 1])
    figure.savefig(io.BytesIO(), format="svg")
    return ""


def bitsandbytes() -> str:
    """A linear layer in 4 bits, on a CUDA device if there is one."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16).to(device)
    x = torch.zeros(1, 64, device=device, dtype=torch.bfloat16)
    _expect(layer(x).shape == (1, 64), "a product has the wrong shape")
    return f"computes in 4 bits on {device}"


def _expect(seen: object, otherwise: str) -> None:
    """An ``assert`` with something to say, which ``python -O`` keeps."""
    if not seen:
        raise RuntimeError(otherwise)
