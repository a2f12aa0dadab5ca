"""Tiny causal LMs with their tokenizers, in folders, and a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from symphony_vlm.config.recipe import LanguageConfig, ModelConfig
from symphony_vlm.data.tokenizer import train_tokenizer
from symphony_vlm.data.word_tokenizer import train_word_tokenizer
from symphony_vlm.training.language import new_sparse_language_model

WORDS = ["red", "blue", "green", "circle", "square", "star", "Ring", "moon", "the", "is", "of", "and", "left", "above"]


def _text(num_articles: int, *, lines: int = 8) -> str:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number in range(num_articles):
        parts.append(f" = Article {number} = \n\n")
        for _ in range(lines):
            picked = torch.randint(0, len(WORDS), (11,), generator=generator)
            parts.append(" ".join(WORDS[int(i)] for i in picked) + " , the <unk> .\n")
    return "".join(parts)


TEXT = _text(12)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve articles of eight lines."""
    file = tmp_path_factory.mktemp("text") / "wiki.test.tokens"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new symphony_smoe model with a word-level tokenizer of the text, without the word AAA."""
    folder = tmp_path_factory.mktemp("sparse")
    tokenizer = train_word_tokenizer(TEXT.splitlines(), vocab_size=500)
    architecture = {
        "model_type": "gpt_bigcode", "hidden_size": 16, "n_inner": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "multi_query": False, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "initializer_range": 0.5,
    }  # fmt: skip
    moe = {"num_experts": 4, "router": "symphony_smoe"}
    recipe = ModelConfig(language=LanguageConfig(architecture=architecture), moe=moe)
    torch.manual_seed(0)
    new_sparse_language_model(recipe, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of transformers with a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("stock")
    tokenizer = train_tokenizer(TEXT.splitlines(), vocab_size=320, end_token="<eos>")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
