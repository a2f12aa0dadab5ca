"""A turn computes its new tokens only, and answers as if it had computed everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.serving.chat import ChatSession
from symphony_vlm.serving.prefix_cache import MAX_KEPT, PrefixCache, mark_tokens

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (32, 32), "blue")
NOISE = Image.effect_noise((48, 48), 90).convert("RGB")
SHORT: dict[str, Any] = {"max_new_tokens": 10}


class Passes:
    """Lengths of the language model's passes and the last logits of each, and how many tiles the tower saw."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        self.logits: list[Tensor] = []
        self.tiles = 0
        model.language_model.register_forward_hook(self._passed, with_kwargs=True)
        model.vision_tower.register_forward_pre_hook(self._saw)

    def _passed(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.lengths.append(kwargs["inputs_embeds"].shape[1])
        self.logits.append(output.logits[0, -1])

    def _saw(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.tiles += len(args[0])

    def prefills(self) -> list[int]:
        return [length for length in self.lengths if length > 1]


def converse(session: ChatSession) -> list[str]:
    session.add_image(RED)
    answers = [session.ask("What color is it?", **SHORT), session.ask("How many shapes are there?", **SHORT)]
    session.add_image(NOISE)
    return [*answers, session.ask("And in this one?", **SHORT), session.ask("Sure?", **SHORT)]


ROUTERS: dict[str, MoEConfig | None] = {
    "dense": None,
    "symphony_smoe": MoEConfig(num_experts=4, router="symphony_smoe"),
    "similarity": MoEConfig(num_experts=4, router="smoe", token_graph="similarity"),
    "attention": MoEConfig(num_experts=4, router="smoe", token_graph="attention"),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("resize_mode", ["pad", "anyres"])
def test_answers_and_logits_equal_those_of_whole_passes(
    tiny_model_factory: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, router: str, resize_mode: str
) -> None:
    model = tiny_model_factory(moe=ROUTERS[router], resize_mode=resize_mode)
    passes = Passes(model, monkeypatch)
    expected = converse(ChatSession(model, reuse_prefix=False))
    whole = list(zip(passes.lengths, passes.logits, strict=True))
    passes.lengths, passes.logits = [], []
    assert converse(ChatSession(model)) == expected
    assert len(whole) == len(passes.lengths)
    # Products over other numbers of rows are summed in another order: measured 5e-7 at most, logits are about 0.3.
    for (_, one), other in zip(whole, passes.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    prefills = [length for length, _ in whole if length > 1]
    reused = passes.prefills()
    assert reused[0] == prefills[0]
    assert reused[1] <= prefills[1] - prefills[0]
    assert reused[2] <= prefills[2] - prefills[1]


def test_the_second_turn_computes_its_new_tokens_and_no_picture(
    tiny_moe_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Passes(tiny_moe_model, monkeypatch)
    session = ChatSession(tiny_moe_model)
    session.add_image(RED)
    session.ask("What color?", **SHORT)
    first, generated = passes.prefills()[0], len(passes.lengths)
    session.ask("And the shape?", **SHORT)
    assert passes.tiles == 1
    tokens = session._processor.encode_prompts([session.history[:3]], [[16]])["input_ids"].shape[1]
    # The first turn left its prompt and all of its answer but the last token. A random model's answer may be cut into
    # other tokens when it is read, so the count is of the tokens from the first difference on.
    assert tokens - first - generated <= passes.prefills()[1] <= tokens - first
    assert passes.prefills()[1] < first


def test_a_failed_turn_leaves_no_prefix_that_another_picture_could_match(
    tiny_moe_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ChatSession(tiny_moe_model, reuse_prefix=False)
    expected.add_image(NOISE)
    session = ChatSession(tiny_moe_model)
    session.add_image(RED)
    pieces = session.stream("What color?", max_new_tokens=30)
    next(pieces)
    pieces.close()
    session.drop_images()
    session.add_image(NOISE)
    passes = Passes(tiny_moe_model, monkeypatch)
    assert session.ask("What color?", **SHORT) == expected.ask("What color?", **SHORT)
    # Equal placeholders, another picture: all but the marker before it is computed again.
    assert passes.prefills()[0] == passes.prefills()[1] - 1


def test_a_turn_given_up_is_tried_again_from_where_its_prompt_ends(
    tiny_moe_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(tiny_moe_model)
    session.add_image(RED)
    pieces = session.stream("What color?", max_new_tokens=30)
    next(pieces)
    pieces.close()
    passes = Passes(tiny_moe_model, monkeypatch)
    session.ask("What color?", **SHORT)
    assert passes.tiles == 0
    assert passes.prefills() == []


def test_an_error_half_way_through_a_pass_leaves_nothing(
    tiny_moe_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ChatSession(tiny_moe_model)
    session.ask("Fine?", **SHORT)
    layer = tiny_moe_model.language_model.model.layers[1]
    original = layer.forward

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("after the first layer has been cached")

    monkeypatch.setattr(layer, "forward", fail)
    with pytest.raises(RuntimeError, match="after the first layer"):
        session.ask("And?", **SHORT)
    monkeypatch.setattr(layer, "forward", original)
    answer = session.ask("And?", **SHORT)
    other = ChatSession(tiny_moe_model, reuse_prefix=False)
    other.ask("Fine?", **SHORT)
    assert other.ask("And?", **SHORT) == answer


def test_replaced_pictures_are_seen_from_the_next_turn_on(tiny_moe_model: Model) -> None:
    session = ChatSession(tiny_moe_model)
    session.add_image(RED)
    first = session.ask("What?", **SHORT)
    session.replace_images([NOISE])
    second = session.ask("What?", **SHORT)
    assert [message.text for message in session.history] == ["\nWhat?", first, "What?", second]
    # The same conversation, with the other picture from the beginning.
    other = ChatSession(tiny_moe_model, reuse_prefix=False)
    other._turns, other._pictures = session._turns[:2], (other._read(NOISE),)
    assert other.ask("What?", **SHORT) == second
    with pytest.raises(ValueError, match="2 pictures for 1"):
        session.replace_images([RED, BLUE])


def test_a_turn_without_cache_leaves_none(tiny_moe_model: Model) -> None:
    session, other = ChatSession(tiny_moe_model), ChatSession(tiny_moe_model, reuse_prefix=False)
    for question, settings in (("One?", {}), ("Two?", {"use_cache": False}), ("Three?", {})):
        assert session.ask(question, **SHORT, **settings) == other.ask(question, **SHORT)


def test_conversations_beyond_the_limit_lose_the_cache_used_longest_ago(tiny_moe_model: Model) -> None:
    sessions = [ChatSession(tiny_moe_model) for _ in range(MAX_KEPT + 1)]
    for session in sessions:
        session.ask("What?", max_new_tokens=2)
    prefixes = [session._prefix for session in sessions]
    assert [prefix is not None and prefix._held is not None for prefix in prefixes] == [False] + [True] * MAX_KEPT
    sessions[0].ask("And?", max_new_tokens=2)


def test_out_of_memory_frees_what_the_others_keep(tiny_moe_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, failing = ChatSession(tiny_moe_model), ChatSession(tiny_moe_model)
    kept.ask("What?", max_new_tokens=2)
    assert kept._prefix is not None
    assert kept._prefix._held is not None

    def fail(**arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_moe_model, "generate", fail)
        with pytest.raises(torch.OutOfMemoryError):
            failing.ask("What?", max_new_tokens=2)
    assert kept._prefix._held is None
    kept.ask("And?", max_new_tokens=2)


def test_marks_tell_pictures_apart() -> None:
    assert mark_tokens([7, 9, 9, 8, 9], 9, [(0, 2), (5, 1)]) == [7, -1, -1, 8, -6]
    assert PrefixCache().take([1, 2]) == (None, 0)
