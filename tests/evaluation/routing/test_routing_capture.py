"""What is recorded of a prompt, against the routers themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.routing.capture import PromptCapture
from symphony_vlm.evaluation.routing.prompts import RoutedPrompts
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.recording import sparse_layers

Factory = Callable[..., Any]
QUESTIONS = ("What color is the circle?", "How many?")


def _with_graph(model: Any) -> Any:
    """Graphs far from the identity, so that they change what is selected."""
    with torch.no_grad():
        for n, (_, graph) in enumerate(expert_graphs(model)):
            rows = torch.rand(4, 4, generator=torch.Generator().manual_seed(n))
            graph.adjacency_EE.copy_(0.3 * torch.eye(4) + 0.7 * rows / rows.sum(1, keepdim=True))
    return model


def _inputs(model: Any, questions: tuple[str, ...]) -> dict[str, Any]:
    messages = [
        [Message(role="user", parts=(ImagePart(index=0), TextPart(text=f"\n{question}")))] for question in questions
    ]
    inputs = model.processor.encode_prompts(messages)
    generator = torch.Generator().manual_seed(1)
    size = model.vision_tower.config.input_size
    return inputs | {"pixel_values": torch.randn(1, 3, size, size, generator=generator).repeat(len(questions), 1, 1, 1)}


def _captured(model: Any, questions: tuple[str, ...], **generation: Any) -> RoutedPrompts:
    capture = PromptCapture(model)
    with torch.no_grad(), capture.first_pass():
        model.generate(**_inputs(model, questions), do_sample=False, max_new_tokens=3, **generation)
    return capture.taken()


def test_a_prompt_is_recorded_as_the_routers_decide_and_nothing_of_the_answer(tiny_moe_model: Any) -> None:
    model = _with_graph(tiny_moe_model)
    found = _captured(model, QUESTIONS[:1])
    inputs = _inputs(model, QUESTIONS[:1])
    with torch.no_grad():
        model(**inputs)
    length = inputs["input_ids"].shape[1]
    assert found.lengths.tolist() == [length]
    np.testing.assert_array_equal(found.is_image_T, (inputs["input_ids"][0] == model.config.image_token_id).numpy())
    assert found.is_image_T.sum() == model.config.num_image_tokens
    for n, (_, layer) in enumerate(sparse_layers(model.language_model)):
        output = model.routing.outputs[layer.key]
        np.testing.assert_array_equal(found.selected_TLK[:, n], output.indices_TK.numpy())
        np.testing.assert_array_equal(found.scores_TLE[:, n], output.scores_TE.half().numpy())
        np.testing.assert_array_equal(found.weights_TLK[:, n], output.weights_TK.half().numpy())
        np.testing.assert_array_equal(found.plain_TLE[:, n], output.logits_TE.softmax(-1).half().numpy())


def test_padding_is_left_out_and_a_batch_is_its_prompts_one_after_the_other(tiny_moe_model: Any) -> None:
    model = _with_graph(tiny_moe_model)
    together = _captured(model, QUESTIONS)
    assert len(set(together.lengths.tolist())) == 2, "or there is no padding to leave out"
    for row, question in enumerate(QUESTIONS):
        alone, part = _captured(model, (question,)), together.take([row])
        np.testing.assert_array_equal(part.lengths, alone.lengths)
        np.testing.assert_array_equal(part.is_image_T, alone.is_image_T)
        # A batch rounds differently, by some 1e-7, which can move a value of 16 bits by its last one (2^-11).
        np.testing.assert_allclose(part.scores_TLE.astype(float), alone.scores_TLE.astype(float), rtol=1e-3)
        assert (part.selected_TLK == alone.selected_TLK).mean() > 0.99


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "symphony_smoe"},
        {"router": "symphony_smoe", "smooth": "logits"},
        {"router": "symphony_smoe", "score": "sigmoid"},
        {"router": "symphony_xmoe"},
        {"router": "symphony_smoe", "token_graph": "similarity"},
        {"router": "symphony_smoe", "token_graph": "similarity", "smooth": "logits"},
        {"router": "symphony_smoe", "token_graph": "attention"},
    ],
    ids=str,
)
def test_the_plain_selection_is_that_of_the_same_model_with_the_identity_as_graph(
    tiny_model_factory: Factory, settings: dict[str, Any]
) -> None:
    """In the first layer, whose hidden states no graph has touched."""
    model = _with_graph(tiny_model_factory(moe=MoEConfig(num_experts=4, **settings)))
    found = _captured(model, QUESTIONS)
    for _, graph in expert_graphs(model):
        graph.adjacency_EE.copy_(torch.eye(4))
    identity = _captured(model, QUESTIONS)
    np.testing.assert_array_equal(found.plain_TLK[:, 0], identity.selected_TLK[:, 0])
    np.testing.assert_array_equal(identity.plain_TLK[:, 0], identity.selected_TLK[:, 0])
    np.testing.assert_array_equal(found.plain_TLE[:, 0], identity.scores_TLE[:, 0])
    assert (found.plain_TLK != found.selected_TLK).any(), "the graph changes something"


@pytest.mark.parametrize("router", ["smoe", "similarity_smoe"])
def test_without_an_expert_graph_the_plain_selection_is_the_selection(tiny_model_factory: Factory, router: str) -> None:
    model = tiny_model_factory(moe=MoEConfig(num_experts=4, router=router))
    found = _captured(model, QUESTIONS)
    np.testing.assert_array_equal(found.plain_TLK, found.selected_TLK)
    np.testing.assert_array_equal(found.plain_TLE, found.scores_TLE)
    assert not PromptCapture(model).has_graph


def test_a_graph_that_only_weighs_leaves_the_selection_plain(tiny_model_factory: Factory) -> None:
    model = _with_graph(tiny_model_factory(moe=MoEConfig(num_experts=4, applies_to="weights")))
    found = _captured(model, QUESTIONS)
    np.testing.assert_array_equal(found.plain_TLK, found.selected_TLK)


def test_recording_leaves_no_hook_behind_even_after_an_error(tiny_moe_model: Any) -> None:
    model = tiny_moe_model
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), PromptCapture(model).first_pass():
        raise RuntimeError("stop")
    _captured(model, QUESTIONS)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_experts_in_front_of_the_language_model_are_refused(tiny_model_factory: Factory) -> None:
    model = tiny_model_factory(
        moe=MoEConfig(num_experts=2, num_experts_per_tok=1, modules=("language", "vision"), router="smoe")
    )
    with pytest.raises(InputError, match=r"vision\.0, vision\.1.*not measured") as e:
        PromptCapture(model)
    assert e.value.where == "--routing"
