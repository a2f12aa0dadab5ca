"""What questions about one picture have in common is read once, and the answers stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.likelihood import choose
from symphony_vlm.evaluation.options import Options
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.prompts import can_share_prefixes, order_by_picture, read_prompts
from symphony_vlm.model.configuration import SymphonyVLMConfig
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.moe.configuration import MoEConfig

QUESTIONS = ("What color is it?", "a", "How many shapes are there at the top?", "no", "Which?", "yes or no?", "Is it?")
PICTURES = ((0,), (0,), (1,), (0,), (1,), (0, 1), (0, 1))
"""Of each question. Three different beginnings, one of them longer."""

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48, "n_positions": 512, "multi_query": True}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def with_language_model(model: Model, family: str, settings: dict[str, Any]) -> Model:
    """A model like this one around another language model."""
    text = AutoConfig.for_model(
        family,
        vocab_size=model.config.text_config.vocab_size,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=model.config.text_config.pad_token_id,
        **settings,
    )
    config = SymphonyVLMConfig(
        vision_config=model.config.vision_config,
        text_config=text,
        image_token_id=model.config.image_token_id,
        num_image_tokens=model.config.num_image_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        other = Model(config).eval()
    other.processor = model.processor
    return other


MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "symphony_smoe": {"router": "symphony_smoe"},
    "attention_smoe": {"router": "attention_smoe"},
    "similarity_smoe": {"router": "similarity_smoe"},
    "gpt_bigcode": {"family": "gpt_bigcode", "settings": GPT},
    "gpt_bigcode, symphony_smoe": {"family": "gpt_bigcode", "settings": GPT, "router": "symphony_smoe"},
    "phi": {"family": "phi", "settings": LLAMA, "router": "xmoe"},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_model_factory: Callable[..., Model]) -> Model:
    """With weights large enough that answers differ from prompt to prompt."""
    wanted = MODELS[request.param]
    model = tiny_model_factory()
    if "family" in wanted:
        model = with_language_model(model, wanted["family"], wanted["settings"])
    if "router" in wanted:
        model.upcycle_(MoEConfig(num_experts=4, router=wanted["router"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "token_graph" not in name:
                scale = 0.5 if name.startswith(("projector", "vision_tower")) else 0.25
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def asked(model: Model) -> tuple[list[EvaluationItem], list[list[Tensor]]]:
    numbers = np.random.default_rng(0)
    pictures = [numbers.integers(0, 255, (20, 30, 3), dtype=np.uint8) for _ in range(2)]
    encoded = Predictor(model, batch_size=8, max_new_tokens=1).encode_images(pictures)
    items = [
        EvaluationItem(
            id=str(n),
            question=question,
            answers=("A",),
            images=tuple(ImageRef(data=b"x", name=str(i)) for i in shown),
            image_key=str(shown),
        )
        for n, (question, shown) in enumerate(zip(QUESTIONS, PICTURES, strict=True))
    ]
    return items, [[encoded[i] for i in shown] for shown in PICTURES]


@pytest.fixture
def passes(model: Model) -> list[tuple[int, int]]:
    """Rows and tokens of every pass of the language model."""
    found: list[tuple[int, int]] = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return found


def test_a_model_saved_without_a_cache_shares_all_the_same(model: Model, passes: list[tuple[int, int]]) -> None:
    """As transformers' Trainer leaves it. Halves of the batch would answer instead, down to single questions."""
    items, features = asked(model)
    expected = Predictor(model, batch_size=8, max_new_tokens=6).answer(items, features)
    for settings in (model.config, model.config.get_text_config(), model.generation_config):
        settings.use_cache = False
    passes.clear()
    assert Predictor(model, batch_size=8, max_new_tokens=6).answer(items, features) == expected
    assert [tokens for _, tokens in passes][2:] == [1] * 5, "the prefixes, the questions, and then token by token"


def test_written_answers_are_token_for_token_those_of_whole_prompts(
    model: Model, passes: list[tuple[int, int]]
) -> None:
    assert can_share_prefixes(model)
    items, features = asked(model)
    plain = Predictor(model, batch_size=8, max_new_tokens=6, share_prefixes=False).answer(items, features)
    alone = [
        Predictor(model, batch_size=1, max_new_tokens=6).answer([item], [images])[0]
        for item, images in zip(items, features, strict=True)
    ]
    passes.clear()
    shared = Predictor(model, batch_size=8, max_new_tokens=6).answer(items, features)
    assert shared == plain == alone
    assert [answer.facts for answer in shared] == [answer.facts for answer in plain]
    # Were all answers alike, the comparison would prove nothing.
    assert len(set(plain)) > len(items) / 2
    (first, prefix), (second, rest) = passes[:2]
    assert (first, second) == (3, len(items))
    assert prefix > 2 * 16, "both pictures of the last questions"
    assert rest < 60


def test_options_have_the_likelihoods_of_whole_prompts(model: Model) -> None:
    items, features = asked(model)
    texts = ("A", "a red star", "no circle at the top")
    offered = [Options(texts=texts, answers=texts)] * len(items)
    plain = choose(model, items, features, offered, share=False)
    shared = choose(model, items, features, offered, share=True)
    assert shared == plain
    for one, other in zip(shared, plain, strict=True):
        # Rounded to three digits, of fp32 sums in another order.
        assert one.facts["log_probabilities"] == pytest.approx(other.facts["log_probabilities"], abs=2e-3)
        assert one.facts["prompt_sha256"] == other.facts["prompt_sha256"]
    assert len({tuple(answer.facts["log_probabilities"]) for answer in plain}) == len(items)


def test_batches_without_two_questions_about_one_picture_are_read_as_they_are(tiny_model: Model) -> None:
    items, features = asked(tiny_model)
    text = EvaluationItem(id="text", question="yes?", answers=("A",))
    lonely = [items[0], items[2], items[5]], [features[0], features[2], features[5]]
    mixed = [items[0], items[1], text], [features[0], features[1], None]
    for chosen, images in (lonely, mixed):
        prompts = read_prompts(tiny_model, [item.messages for item in chosen], images, share=True)
        assert prompts.cache is None
        assert len(prompts.images) == sum(len(one or ()) for one in images)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", LLAMA | {"sliding_window": 8}),
        ("gemma2", LLAMA | {"head_dim": 16, "sliding_window": 8}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
        ("llama", LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_models_that_count_places_read_whole_prompts(tiny_model: Model, family: str, settings: dict[str, Any]) -> None:
    assert not can_share_prefixes(with_language_model(tiny_model, family, settings))


def test_questions_about_a_picture_stand_together_and_like_lengths_beside_each_other() -> None:
    pictures, lengths = ["b", "a", "b", "c", "a"], [9, 1, 2, 3, 4]
    order = order_by_picture(pictures, lengths)
    assert [(pictures[i], lengths[i]) for i in order] == [("c", 3), ("a", 1), ("a", 4), ("b", 2), ("b", 9)]
    assert order_by_picture([""] * 3, [3, 1, 2]) == [1, 2, 0], "without pictures by length alone"
