"""The routing of a conversation, against hooks on the routers and loops over its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.model.image_processor import SymphonyImageProcessor
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.recording import sparse_layers
from symphony_vlm.moe.router import RouterOutput
from symphony_vlm.serving.chat import ChatSession
from symphony_vlm.serving.patch_geometry import seen_region
from symphony_vlm.serving.routing_view import LayerRouting, RoutingView, view_routing

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (32, 32), "blue")


def talk(model: Model) -> ChatSession:
    session = ChatSession(model)
    session.add_image(RED)
    session.ask("What colour is the cïrcle?", max_new_tokens=12)
    session.add_image(BLUE)
    session.ask("And <image> this?", max_new_tokens=12)
    return session


def view_of(session: ChatSession) -> RoutingView:
    return view_routing(session.model, session.history, session.image_features)


def test_experts_are_those_that_the_routers_chose(tiny_moe_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = talk(tiny_moe_model)
    seen: dict[Any, list[RouterOutput]] = {}
    embedded: list[torch.Tensor] = []
    for _, layer in sparse_layers(tiny_moe_model.language_model):
        layer.router.register_forward_hook(lambda m, a, out, key=layer.key: seen.setdefault(key, []).append(out))
    tiny_moe_model.language_model.register_forward_pre_hook(
        lambda m, a, kw: embedded.append(kw["inputs_embeds"]), with_kwargs=True
    )
    view = view_of(session)
    assert "".join(word.text for word in view.answer).replace("<|end|>", "").strip() == session.history[-1].text
    assert [layer.layer for layer in view.layers] == list(seen) == [0, 1]
    for layer in view.layers:
        (output,) = seen[layer.layer]
        assert torch.equal(layer.indices_SK, output.indices_TK)
        assert torch.equal(layer.weights_SK, output.weights_TK)
        assert layer.adjacency_EE is not None
        assert torch.equal(layer.adjacency_EE, torch.eye(4))
    # The patches' positions hold the pictures' features, in their order.
    assert [grid.side for grid in view.pictures] == [4, 4]
    for grid, features in zip(view.pictures, session.image_features, strict=True):
        assert torch.equal(embedded[0][0, list(grid.positions)], features)


def test_words_are_the_conversation_and_their_positions_are_its_tokens(tiny_moe_model: Model) -> None:
    session = talk(tiny_moe_model)
    processor = session._processor
    view = view_of(session)
    encoded = processor.encode(session.history, num_image_tokens=[16, 16])
    positions = [position for word in view.words for position in range(word.start, word.stop)]
    text = [i for i, token in enumerate(encoded.input_ids) if token != processor.image_token_id]
    assert positions == text
    assert "".join(word.text for word in view.words) == processor.tokenizer.decode([encoded.input_ids[i] for i in text])
    for word in view.words:
        assert word.text == processor.tokenizer.decode(encoded.input_ids[word.start : word.stop])
        assert {encoded.labels[i] != -100 for i in range(word.start, word.stop)} == {word.is_answer}
    shown = [word.text for word in view.words]
    # A letter of two bytes, in the middle of a word, stays whole; markers stand alone.
    assert " cïrcle?" in shown
    assert shown[0] == "<|user|>"
    assert "<|end|>" in shown


def test_shares_of_positions_against_a_loop(tiny_moe_model: Model) -> None:
    view = view_of(talk(tiny_moe_model))
    layer = view.layers[1]
    for word in view.words:
        expected = [0.0] * 4
        for position in range(word.start, word.stop):
            weights = layer.weights_SK[position].tolist()
            for expert, weight in zip(layer.indices_SK[position].tolist(), weights, strict=True):
                expected[expert] += weight / sum(weights) / (word.stop - word.start)
        # Sums of at most a few dozen fp32 terms below 1.
        assert layer.shares(range(word.start, word.stop)).tolist() == pytest.approx(expected, abs=1e-6)


def test_weights_that_are_not_renormalised_count_each_position_the_same() -> None:
    layer = LayerRouting(
        layer=0,
        num_experts=2,
        indices_SK=torch.tensor([[0], [1]]),
        weights_SK=torch.tensor([[0.9], [0.1]]),
        adjacency_EE=None,
    )
    assert layer.shares([0, 1]).tolist() == [0.5, 0.5]


def test_of_tiles_only_the_overview_is_a_grid(tiny_model_factory: Callable[..., Model]) -> None:
    model = tiny_model_factory(moe=MoEConfig(num_experts=4), resize_mode="anyres")
    session = ChatSession(model)
    for picture in (RED, BLUE):
        session.add_image(picture)
    session.ask("What?", max_new_tokens=4)
    embedded: list[torch.Tensor] = []
    model.language_model.register_forward_pre_hook(
        lambda m, a, kw: embedded.append(kw["inputs_embeds"]), with_kwargs=True
    )
    view = view_of(session)
    for grid, features in zip(view.pictures, session.image_features, strict=True):
        assert grid.overview_only
        assert len(features) > 16
        assert torch.equal(embedded[0][0, list(grid.positions)], features[:16])


def test_a_dense_model_and_an_empty_conversation_are_refused(tiny_model: Model, tiny_moe_model: Model) -> None:
    with pytest.raises(InputError, match="dense, so there is no routing"):
        view_of(talk(tiny_model))
    with pytest.raises(InputError, match="no answer yet"):
        view_of(ChatSession(tiny_moe_model))


def test_a_plain_router_has_no_graph(tiny_model_factory: Callable[..., Model]) -> None:
    view = view_of(talk(tiny_model_factory(moe=MoEConfig(num_experts=4, router="smoe"))))
    assert [layer.adjacency_EE for layer in view.layers] == [None, None]


OPEN_CLIP = {"library": "open_clip", "size": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


@pytest.mark.parametrize(
    "settings",
    [
        {"resize_mode": "pad"},
        {"resize_mode": "crop"},
        {"resize_mode": "stretch"},
        *(
            {"resize_mode": "encoder", "preprocessing": {**OPEN_CLIP, "resize_mode": mode}}
            for mode in ("shortest", "longest", "squash")
        ),
    ],
    ids=lambda settings: str(settings.get("preprocessing", settings)["resize_mode"]) + f"_{len(settings)}",
)
@pytest.mark.parametrize("size", [(60, 200), (300, 90), (128, 128), (1500, 2100)])
def test_a_patch_lies_where_its_pixels_come_from(settings: dict[str, Any], size: tuple[int, int]) -> None:
    """A bright square on the picture must light up the patch that is drawn over it, and no other as much."""
    processor = SymphonyImageProcessor(image_size=64, **settings)
    region = seen_region(processor, size)
    assert region is not None
    left, top, right, bottom = region
    side, height, width = 4, *size
    for row in range(side):
        for column in range(side):
            x = left + (right - left) * np.array([column, column + 1]) / side
            y = top + (bottom - top) * np.array([row, row + 1]) / side
            x_inside, y_inside = x.clip(0, width).round().astype(int), y.clip(0, height).round().astype(int)
            if np.ptp(x_inside) < 2 or np.ptp(y_inside) < 2:
                continue
            pixels = np.zeros((height, width, 3), np.uint8)
            pixels[slice(*y_inside), slice(*x_inside)] = 255
            prepared = np.asarray(processor.to_square(Image.fromarray(pixels))).astype(float)[..., 1]
            lit = prepared.reshape(side, 16, side, 16).mean((1, 3))
            black = np.asarray(processor.to_square(Image.new("RGB", (width, height)))).astype(float)[..., 1]
            lit -= black.reshape(side, 16, side, 16).mean((1, 3))
            # All of its visible part is lit. Rounding (a pixel of 16 at two edges) and the filter reach the neighbours.
            share = np.ptp(x_inside) / np.ptp(x) * np.ptp(y_inside) / np.ptp(y)
            assert lit[row, column] > 0.8 * 255 * share
            lit[row, column] = 0
            assert lit.max() < 0.2 * 255
