"""The parts of a model around a pretrained language model: its tokenizer's template, its markers, where it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import ModelConfig
from symphony_vlm.data.tokenizer import train_tokenizer
from symphony_vlm.errors import InputError
from symphony_vlm.training.parts import assemble, check_templates, open_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def pretrained(folder: Path, *, chat_template: str | None) -> ModelConfig:
    """The recipe ``tiny`` around a language model from a folder, as from the hub."""
    model = load_recipe("tiny").model
    tokenizer = train_tokenizer(
        ["What is it?", "red"] * 9,
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        end_token="<|endoftext|>",
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(**(model.language.architecture or {}), vocab_size=len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    language: dict[str, Any] = {"name": str(folder)}
    return ModelConfig.model_validate(model.model_dump() | {"language": language, "template": "auto"})


def test_a_models_own_chat_template_is_used_and_its_answers_end_generation(tmp_path: Path) -> None:
    model = pretrained(tmp_path, chat_template=CHATML)
    tokenizer = open_tokenizer(model, tmp_path / "unused", [])
    vlm = assemble(model, tokenizer, encoder=None, language=None).eval()
    assert vlm.processor is not None
    assert vlm.processor.template == "tokenizer"
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert vlm.generation_config.eos_token_id == [end, eos]
    # Whatever it says, it says the end of its answer once.
    prompt = torch.tensor([[eos, end]])
    out = vlm.generate(
        input_ids=prompt,
        max_new_tokens=5,
        do_sample=False,
        suppress_tokens=[t for t in range(len(tokenizer)) if t != end],
    )
    assert out.tolist() == [[eos, end, end]]


def test_one_stop_token_stays_a_number(tmp_path: Path) -> None:
    model = pretrained(tmp_path, chat_template=None)
    tokenizer = open_tokenizer(model, tmp_path / "unused", [])
    vlm = assemble(model, tokenizer, encoder=None, language=None)
    assert vlm.processor is not None
    assert vlm.processor.template == "vicuna_v1"
    assert vlm.generation_config.eos_token_id == tokenizer.eos_token_id


def test_markers_that_the_tokenizer_lacks_are_found_before_anything_trains(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(pretrained(tmp_path, chat_template=CHATML), tmp_path / "unused", [])
    check_templates(["auto", "plain", "chatml"], tokenizer)
    with pytest.raises(InputError, match=r"'llama3' needs <\|start_header_id\|>, .* has not") as error:
        check_templates(["plain", "llama3"], tokenizer)
    assert error.value.remedy is not None
    assert error.value.remedy.startswith("Templates that fit this tokenizer: tokenizer, plain, chatml, vicuna_v1")


def test_a_new_tokenizer_holds_the_markers_of_every_stage(tmp_path: Path) -> None:
    model = load_recipe("tiny").model
    tokenizer = open_tokenizer(model, tmp_path / "new", [], ["chatml", "plain"])
    check_templates([model.template, "chatml", "plain"], tokenizer)
    assert tokenizer.eos_token == "<|end|>"
