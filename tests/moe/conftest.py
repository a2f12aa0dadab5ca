"""Tiny dense language models of every supported family, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 48


def make_language_model(family: str = "llama", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random dense causal LM with two layers, in fp32 and evaluation mode."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(sizes | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # The default initialisation is so small that the feed-forward layers hardly move the logits.
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(0.0, 0.3)
    return model.eval()


def make_ids(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Random token ids ``[rows, length]``."""
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def language_model() -> Callable[..., PreTrainedModel]:
    """`make_language_model`."""
    return make_language_model


@pytest.fixture
def token_ids() -> Callable[..., Tensor]:
    """`make_ids`."""
    return make_ids
