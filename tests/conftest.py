"""Tiny random models that every part of the test suite shares: built in a second, without a download."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before any test module imports transformers: torchvision without its compiled operators would break that.
import symphony_vlm  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration
    from symphony_vlm.moe.configuration import MoEConfig

# Nothing may reach out while tests run; these must be set before the libraries are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_POSITIONS = 512

_BEGAN = pytest.StashKey[float]()


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the markers of the ``compact`` template."""
    from symphony_vlm.data.templates import get_template
    from symphony_vlm.data.tokenizer import train_tokenizer

    template = get_template("compact")
    texts = ["What color is the circle?", "How many shapes are there?", "yes", "no", "a small red star at the top."]
    markers = [marker for marker in template.special_tokens if marker != template.answer_end]
    return train_tokenizer(texts * 20, vocab_size=400, special_tokens=markers, end_token=template.answer_end)


def make_tiny_model(
    *,
    moe: MoEConfig | None = None,
    seed: int = 0,
    resize_mode: Any = "pad",
    scales: tuple[int, ...] = (1,),
    hidden_size: int = 32,
) -> SymphonyVLMForConditionalGeneration:
    """A random model in evaluation mode with its processor, upcycled if `moe` is given."""
    import torch
    from transformers import AutoConfig

    from symphony_vlm.model.configuration import SymphonyVLMConfig
    from symphony_vlm.model.image_processor import SymphonyImageProcessor
    from symphony_vlm.model.processor import SymphonyVLMProcessor
    from symphony_vlm.model.vision import VisionConfig
    from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration

    tokenizer = make_tiny_tokenizer()
    images = SymphonyImageProcessor(image_size=IMAGE_SIZE * scales[-1], resize_mode=resize_mode)
    processor = SymphonyVLMProcessor(images, tokenizer, num_image_tokens=NUM_IMAGE_TOKENS, template="compact")
    tower = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "width": 32, "layers": 2, "head_width": 16}
    vision = VisionConfig(
        backend="open_clip",
        architecture={"embed_dim": 32, "vision_cfg": tower},
        image_size=IMAGE_SIZE,
        feature_layer=-1,
        scales=scales,
    )
    text = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = SymphonyVLMConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_id=processor.image_token_id,
        num_image_tokens=NUM_IMAGE_TOKENS,
        grid_pinpoints=images.grid_pinpoints,
    )
    # A private random state: building a model must not disturb the test's own seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SymphonyVLMForConditionalGeneration(config)
        if moe is not None:
            model.upcycle_(moe, seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.processor = processor
    return model.eval()


def make_tiny_moe_model(router: str = "symphony_smoe", *, seed: int = 0) -> SymphonyVLMForConditionalGeneration:
    """A random model with four experts in every layer."""
    from symphony_vlm.moe.configuration import MoEConfig

    return make_tiny_model(moe=MoEConfig(num_experts=4, router=router), seed=seed)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_factory() -> Callable[..., SymphonyVLMForConditionalGeneration]:
    """`make_tiny_model` itself, for tests that need other settings."""
    return make_tiny_model


@pytest.fixture
def tiny_model() -> SymphonyVLMForConditionalGeneration:
    """A fresh dense model, which the test may change."""
    return make_tiny_model()


@pytest.fixture
def tiny_moe_model() -> SymphonyVLMForConditionalGeneration:
    """A fresh model with the symphony_smoe router, which the test may change."""
    return make_tiny_moe_model()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved symphony_smoe model with its processor; tests only read it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = make_tiny_moe_model()
    model.save_pretrained(folder)
    assert model.processor is not None
    model.processor.save_pretrained(folder)
    return folder


def pytest_sessionstart(session: pytest.Session) -> None:
    """Notes when the tests began."""
    session.config.stash[_BEGAN] = time.time()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Removes shared memory of this run, 66 MiB of every process, which DeepSpeed on a CPU never gives back."""
    if hasattr(session.config, "workerinput"):
        return  # the other workers' processes may be at work
    for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        if path.stat().st_mtime >= session.config.stash[_BEGAN]:
            path.unlink(missing_ok=True)
