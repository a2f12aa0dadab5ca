"""The recorded experts are those that one pass over the whole conversation chooses."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.serving.chat import ChatSession

RED = Image.new("RGB", (40, 30), "red")


@pytest.mark.parametrize("reuse", [True, False])
def test_experts_equal_those_of_one_pass(tiny_moe_model: Model, reuse: bool) -> None:
    session = ChatSession(tiny_moe_model, reuse_prefix=reuse, trace_routing=True)
    session.add_image(RED)
    for question in ("What color?", "And now?"):
        session.ask(question, max_new_tokens=9)
        routing = session.routing
        assert routing is not None
        ids = torch.tensor([routing.token_ids])
        assert (ids == tiny_moe_model.config.image_token_id).sum() == 16
        features = [picture.features for picture in session._pictures]
        with torch.no_grad():
            tiny_moe_model(input_ids=ids, image_features=features)
        assert tiny_moe_model.routing is not None
        assert list(routing.experts) == list(tiny_moe_model.routing.outputs) == [0, 1]
        for layer, out in tiny_moe_model.routing.outputs.items():
            assert isinstance(layer, int)
            # A random gate's choices are far from ties, compared with the 1e-7 by which passes of other lengths differ.
            assert torch.equal(routing.experts[layer], out.indices_TK.int())
            torch.testing.assert_close(routing.weights[layer], out.weights_TK, atol=1e-5, rtol=0)
        assert routing.num_experts == 4
        answer = session._processor.tokenizer.decode(list(routing.token_ids[routing.answer_start :]))
        assert session.history[-1].text.startswith(answer.strip().rstrip("\ufffd"))
        assert 0 < len(ids[0]) - routing.answer_start <= 9


def test_reset_and_dense_models_have_none(tiny_moe_model: Model, tiny_model: Model) -> None:
    session = ChatSession(tiny_moe_model, trace_routing=True)
    session.ask("What?", max_new_tokens=3)
    session.reset()
    assert session.routing is None
    dense = ChatSession(tiny_model, trace_routing=True)
    dense.ask("What?", max_new_tokens=3)
    assert dense.routing is None
    assert not tiny_moe_model.language_model._forward_hooks.keys() - {
        key for key, hook in tiny_moe_model.language_model._forward_hooks.items() if "RoutingTrace" not in repr(hook)
    }
