"""Language stages: every router on plain text, losses that act, blocks without gaps, models that open again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.config.recipe import Recipe
from symphony_vlm.data.word_tokenizer import train_word_tokenizer
from symphony_vlm.errors import InputError
from symphony_vlm.model.language_model import SymphonyForCausalLM
from symphony_vlm.moe.configuration import PRESETS, MoEConfig
from symphony_vlm.moe.feed_forward import recognise
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.moe.upcycle import upcycle_
from symphony_vlm.training.language import LineBlocks, new_sparse_language_model, token_stream
from symphony_vlm.training.run import train

LINES = [f"the {colour} {shape} is left of the {other} one ." for colour in ("red", "blue", "green")
         for shape in ("circle", "square", "star", "ring") for other in ("small", "large", "old", "new")]  # fmt: skip
SMALL = [
    "model.language.architecture.hidden_size=16",
    "model.language.architecture.n_inner=16",
    "model.language.architecture.num_hidden_layers=2",
    "model.language.architecture.num_attention_heads=2",
    "model.language.architecture.max_position_embeddings=32",
    "model.language.vocab_size=300",
    "model.language.min_frequency=1",
    "model.moe.num_experts=4",
    "stages.language.max_length=16",
    "stages.language.max_steps=3",
    "stages.language.batch_size=4",
    "stages.language.log_steps=1",
    "stages.language.save_fraction=1.0",
    "monitor.report_to=[]",
]


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Recipe]:
    """``wikitext2_tiny`` with next to no width, on a few lines."""
    file = tmp_path / "train.txt"
    file.write_text("".join(f"{line}\n" for line in LINES))

    def make(*overrides: str) -> Recipe:
        texts = [f"data.text.train={file}", f"data.text.validation={file}"]
        return load_recipe("wikitext2_tiny", [*SMALL, *texts, *overrides])

    return make


@pytest.fixture
def quiet() -> Console:
    """A console that nobody sees."""
    return Console(quiet=True)


def build(recipe: Recipe, seed: int = 0) -> SymphonyForCausalLM:
    torch.manual_seed(seed)
    tokenizer = train_word_tokenizer(LINES, vocab_size=300)
    return new_sparse_language_model(recipe.model, tokenizer, seed=seed)


@pytest.mark.parametrize("router", PRESETS)
def test_every_preset_trains_with_an_active_balance_loss(
    router: str, small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    recipe = small(f"model.moe.router={router}", "stages.language.learning_rate=1e-2")
    result = train(recipe, tmp_path / "run", console=quiet)
    assert result.step == 3
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    assert losses[-1]["cross_entropy"] < losses[0]["cross_entropy"]
    for entry in losses:
        # The log rounds to 6 places.
        assert entry["router"] == pytest.approx(0.01 * entry["balance"], abs=2e-6)
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + entry["router"], abs=1e-5)
        assert entry["balance"] >= 1 - 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert isinstance(model, SymphonyForCausalLM) and model.config.moe_config.router == router
    assert [index for index, _ in enumerate(sparse_layers(model))] == ([0] if "glam" in router else [0, 1])
    assert tokenizer.convert_ids_to_tokens(tokenizer("the red\n")["input_ids"]) == ["the", "red", "<eos>"]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_the_balance_loss_gives_every_gate_a_gradient_and_a_zero_weight_none(small: Callable[..., Recipe]) -> None:
    """The public WikiText code asked for this loss and built its gate without it."""
    ids = torch.arange(32).view(2, 16) % 15
    for weight in (0.01, 0.0):
        model = build(small(f"model.moe.balance_loss_weight={weight}")).train()
        output = model(input_ids=ids, labels=ids)
        assert output.loss_parts is not None
        gates = [layer.router.gate.weight for _, layer in sparse_layers(model)]
        router_loss = output.loss - output.loss_parts["cross_entropy"]
        assert float(router_loss) == pytest.approx(weight * float(output.loss_parts["balance"]), abs=1e-6)
        with_it = torch.autograd.grad(output.loss, gates, retain_graph=True)
        assert model.routing is not None
        only = model.routing.weighted_loss(model.routing.losses())
        gradients = torch.autograd.grad(only, gates, allow_unused=True) if only.requires_grad else [None] * 2
        assert all(g.abs().sum() > 0 for g in with_it)
        assert all((g is not None and float(g.abs().sum()) > 0) == (weight > 0) for g in gradients)


def test_arms_start_from_equal_weights_and_seeds_from_others(small: Callable[..., Recipe]) -> None:
    plain, symphony = (build(small(f"model.moe.router={r}")).state_dict() for r in ("smoe", "symphony_smoe"))
    assert all(torch.equal(plain[name], symphony[name]) for name in plain)
    other = build(small("model.moe.router=smoe"), seed=1).state_dict()
    for part in ("gate.weight", "experts.up_proj", "wte.weight"):
        names = [name for name in plain if name.endswith(part)]
        assert names and all(not torch.equal(plain[name], other[name]) for name in names)


def test_experts_of_a_new_model_are_drawn_one_by_one(small: Callable[..., Recipe]) -> None:
    _, layer = next(iter(sparse_layers(build(small()))))
    up = layer.experts.up_weight
    assert not torch.equal(up[0], up[1]) and float(up.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("router", ["similarity_smoe", "attention_smoe", "symphony_smoe"])
def test_no_router_looks_ahead_and_the_cache_changes_nothing(router: str, small: Callable[..., Recipe]) -> None:
    model = build(small(f"model.moe.router={router}")).eval()
    ids = torch.randint(0, 15, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 15
    with torch.no_grad():
        logits, other = (model(input_ids=x, use_cache=False).logits for x in (ids, changed))
        first = model(input_ids=ids[:, :7], use_cache=True)
        second = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(logits[:, :8], other[:, :8]) and not torch.equal(logits[:, 8:], other[:, 8:])
    # Sums over 7 or 12 keys are ordered differently: rounding of fp32 logits of order 1.
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), logits, atol=1e-5, rtol=1e-5)


def test_experts_keep_the_dropout_of_gpts_feed_forward() -> None:
    from transformers import AutoConfig

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "multi_query": False, "n_positions": 32}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_bigcode", resid_pdrop=0.25, **sizes))
    assert recognise(dense.transformer.h[0].mlp, "layer 0").dropout == 0.25
    upcycle_(dense.eval(), MoEConfig(num_experts=2))  # proves equal logits, without dropout
    layer = dense.transformer.h[0].mlp.train()
    x = torch.randn(2000, 1, 16, generator=torch.Generator().manual_seed(0))
    # Of 32,000 values a quarter is zeroed, give or take a standard deviation of 77.
    assert float((layer(x) == 0).float().mean()) == pytest.approx(0.25, abs=0.015)
    assert not (layer.eval()(x) == 0).any()


def test_an_epoch_predicts_every_token_but_the_first_once() -> None:
    blocks = LineBlocks(torch.arange(25, dtype=torch.int32), block_size=5, name="text")
    predicted = [int(token) for i in range(len(blocks)) for token in blocks[i]["labels"][1:]]
    assert predicted == list(range(1, 25))
    assert all(torch.equal(blocks[i]["input_ids"], blocks[i]["labels"]) for i in range(len(blocks)))


def test_the_stream_is_that_of_the_whole_text() -> None:
    tokenizer = train_word_tokenizer(LINES, vocab_size=300)
    many = LINES * 30  # more than one batch of lines
    assert token_stream(many, tokenizer).tolist() == tokenizer("".join(f"{line}\n" for line in many))["input_ids"]


def test_bpe_is_an_option(small: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    train(small("model.language.tokenizer=bpe"), tmp_path / "run", console=quiet)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.decode(tokenizer("a zebra\n")["input_ids"]) == "a zebra\n"


def test_a_saved_model_is_trained_on(small: Callable[..., Recipe], tmp_path: Path, quiet: Console) -> None:
    train(small(), tmp_path / "first", console=quiet)
    values = small().model_dump(mode="json")
    values["model"] |= {"start": str(tmp_path / "first" / "model"), "moe": None}
    train(Recipe.model_validate(values), tmp_path / "second", console=quiet)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in ("first", "second"))
    assert second.config.moe == first.config.moe
    assert not torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"text": None}}, "give 'data.text.train'"),
        ({"model": {"vision": {"name": "ViT-B-32"}}}, "has no 'model.vision'"),
        ({"stages": [{"kind": "text"}]}, "'model.vision' is missing"),
        ({"model": {"language": {"name": "x/y", "architecture": None}}}, "upcycle a saved one first"),
        ({"stages": [{"upcycle": True}]}, "belong to multimodal stages"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    change: dict[str, Any], message: str, small: Callable[..., Recipe]
) -> None:
    def merged(below: Any, above: Any) -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            return below | {key: merged(below.get(key), value) for key, value in above.items()}
        if isinstance(below, list) and isinstance(above, list):
            return [merged(b, a) for b, a in zip(below, above, strict=True)]
        return above

    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(merged(small().model_dump(mode="json"), change))


def test_blocks_longer_than_positions_or_text_are_refused(
    small: Callable[..., Recipe], tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(InputError, match="33 tokens are more than the model's 32 positions"):
        train(small("stages.language.max_length=33"), tmp_path / "a", console=quiet)
    with pytest.raises(InputError, match="less than one block of 20"):
        LineBlocks(torch.arange(19), block_size=20, name="text")
