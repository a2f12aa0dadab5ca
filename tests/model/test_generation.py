"""Answers do not depend on caching, on batching, on how images are handed over; they do depend on the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CompileConfig, StaticCache

from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.moe.expert_graph import expert_graphs
from symphony_vlm.moe.recording import sparse_layers

NEW_TOKENS = 8
MAX_POSITIONS = 128
COLORS = ["red", "green", "blue", "white", "black", "orange"]


@pytest.fixture(params=["dense", "moe"])
def model(request: pytest.FixtureRequest) -> Model:
    """With weights large enough that greedy answers differ from prompt to prompt."""
    return with_large_weights(request.getfixturevalue({"dense": "tiny_model", "moe": "tiny_moe_model"}[request.param]))


def with_large_weights(chosen: Model) -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in chosen.named_parameters():
            if weight.dim() >= 2:
                # The image must matter as much as the words do.
                scale = 0.5 if name.startswith(("projector", "vision_tower")) else 0.25
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    for _, graph in expert_graphs(chosen):
        graph.adjacency_EE.copy_(torch.rand(4, 4, generator=generator).softmax(-1))
    chosen.generation_config.eos_token_id = None
    return chosen


def prompt(question: str, *images: int) -> list[Message]:
    parts = (*(ImagePart(index=i) for i in images), TextPart(text=question))
    return [Message(role="user", parts=parts)]


def pixels_of(model: Model, colors: list[str]) -> Tensor:
    assert model.processor is not None
    # Half white, so that an image is more than one constant patch.
    images = []
    for color in colors:
        image = Image.new("RGB", (32, 32), color)
        image.paste("white", (0, 0, 16, 8))
        images.append(image)
    values: Tensor = model.processor.image_processor(images)["pixel_values"]
    return values


def answer(model: Model, prompts: list[list[Message]], colors: list[str], **settings: Any) -> list[list[int]]:
    assert model.processor is not None
    inputs = model.processor.encode_prompts(prompts)
    if colors:
        inputs["pixel_values"] = pixels_of(model, colors)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings
    ids: Tensor = model.generate(**inputs, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


ITEMS: list[tuple[list[Message], list[str]]] = [
    (prompt("What color is the circle?", 0), ["red"]),
    (prompt("yes or no?"), []),
    (prompt("How many shapes are there? Two, three, or a hundred and five of them?", 0, 1), ["green", "blue"]),
    (prompt("no"), []),
    (prompt("a", 0), ["black"]),
    (prompt("What?", 0, 1, 2), ["orange", "red", "green"]),
    (prompt("Which of these is small?", 0), ["blue"]),
]


@pytest.mark.parametrize("with_images", [True, False])
def test_generation_with_a_cache_equals_generation_without(model: Model, with_images: bool) -> None:
    chosen = [item for item in ITEMS if bool(item[1]) is with_images]
    prompts, colors = [p for p, _ in chosen], [c for _, cs in chosen for c in cs]
    assert answer(model, prompts, colors, use_cache=True) == answer(model, prompts, colors, use_cache=False)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_left_padded_batch_gives_the_answers_of_single_items(model: Model, batch_size: int) -> None:
    single = [answer(model, [p], colors)[0] for p, colors in ITEMS]
    batched = []
    for start in range(0, len(ITEMS), batch_size):
        items = ITEMS[start : start + batch_size]
        batched += answer(model, [p for p, _ in items], [c for _, colors in items for c in colors])
    assert batched == single
    # Were all answers alike, the comparison would prove nothing.
    assert len({tuple(ids) for ids in single}) == len(ITEMS)


@torch.no_grad()
def test_a_left_padded_batch_has_the_logits_of_single_items(model: Model) -> None:
    assert model.processor is not None
    batch = model.processor.encode_prompts([p for p, _ in ITEMS])
    together = model(**batch, pixel_values=pixels_of(model, [c for _, colors in ITEMS for c in colors])).logits
    for row, (p, colors) in enumerate(ITEMS):
        alone = model.processor.encode_prompts([p])
        images = {"pixel_values": pixels_of(model, colors)} if colors else {}
        logits = model(**alone, **images).logits[0]
        # Logits of about 10; masked attention and other matrix shapes change the order of fp32 sums.
        torch.testing.assert_close(together[row, -len(logits) :], logits, atol=2e-4, rtol=1e-4)


def test_generation_computes_the_logits_of_the_last_token_alone(model: Model) -> None:
    lengths: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    answer(model, [ITEMS[0][0]], ITEMS[0][1])
    assert lengths == [1] * NEW_TOKENS


def test_a_pass_with_labels_makes_no_cache(tiny_model: Model) -> None:
    assert tiny_model.processor is not None
    batch = tiny_model.processor.encode_prompts([ITEMS[-1][0]])
    images = {"pixel_values": pixels_of(tiny_model, ITEMS[-1][1])} if ITEMS[-1][1] else {}
    assert tiny_model(**batch, **images).past_key_values is not None
    for training in (True, False):
        tiny_model.train(training)
        assert tiny_model(**batch, **images, labels=batch["input_ids"]).past_key_values is None


@pytest.fixture(params=["smoe", "symphony_smoe", "xmoe", "glam"])
def sparse_model(request: pytest.FixtureRequest, tiny_model_factory: Callable[..., Model]) -> Model:
    return with_large_weights(tiny_model_factory(moe=MoEConfig(num_experts=4, router=request.param)))


def new_static_cache(model: Model) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=MAX_POSITIONS)


@pytest.mark.parametrize("chosen", [ITEMS[:1], ITEMS], ids=["one prompt", "a padded batch"])
def test_a_static_cache_gives_the_tokens_of_a_growing_one(
    sparse_model: Model, chosen: list[tuple[list[Message], list[str]]]
) -> None:
    prompts, colors = [p for p, _ in chosen], [c for _, cs in chosen for c in cs]
    growing = answer(sparse_model, prompts, colors)
    assert answer(sparse_model, prompts, colors, cache_implementation="static") == growing
    cache = new_static_cache(sparse_model)
    for _ in range(2):  # the second time it has been filled, and emptied again
        cache.reset()
        assert answer(sparse_model, prompts, colors, past_key_values=cache) == growing


@pytest.mark.parametrize(
    "sparse_model",
    ["symphony_smoe", *(pytest.param(router, marks=pytest.mark.slow) for router in ("smoe", "xmoe", "glam"))],
    indirect=True,
)
def test_a_step_with_a_static_cache_is_one_graph(sparse_model: Model) -> None:
    """Nothing of a step asks for a tensor's value: on CUDA it can be replayed without the host.

    The experts are those of the compiled step on CUDA in fp32; on a CPU ``auto`` is a loop over their blocks.
    """
    for _, layer in sparse_layers(sparse_model):
        layer.experts.implementation = "batched_mm"
    settings = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    settings._compile_all_devices = True
    prompts, colors = [p for p, _ in ITEMS], [c for _, cs in ITEMS for c in cs]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = answer(
        sparse_model, prompts, colors, past_key_values=new_static_cache(sparse_model), compile_config=settings
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert compiled == answer(sparse_model, prompts, colors)
    # The record of compiled steps would be lost; that of the prompt is left, and what follows is recorded again.
    assert sparse_model.routing is not None
    sparse_model(input_ids=torch.tensor([[5, 6, 7]]))
    assert {len(routed.indices_TK) for routed in sparse_model.routing.outputs.values()} == {3}


def test_position_ids_follow_from_the_mask(model: Model) -> None:
    assert model.processor is not None
    inputs = model.processor.encode_prompts([ITEMS[1][0], ITEMS[3][0]])
    explicit = model(**inputs).logits
    inputs.pop("position_ids")
    real = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs).logits[real], explicit[real])


def test_image_features_stand_for_pixel_values(model: Model) -> None:
    assert model.processor is not None
    inputs = model.processor.encode_prompts([ITEMS[2][0]])
    pixels = pixels_of(model, ["green", "blue"])
    features = model.get_image_features(pixels)
    assert torch.equal(model(**inputs, image_features=features).logits, model(**inputs, pixel_values=pixels).logits)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    by_features = model.generate(**inputs, image_features=features, **options)
    assert torch.equal(by_features, model.generate(**inputs, pixel_values=pixels, **options))


def test_swapping_two_images_changes_the_answer_and_the_features_in_their_places(model: Model) -> None:
    first, second = answer(model, [ITEMS[2][0]], ["green", "blue"]), answer(model, [ITEMS[2][0]], ["blue", "green"])
    assert first != second


def test_beams_and_samples_see_each_sequences_images_in_order(model: Model) -> None:
    """Transformers repeats every tensor row by row, which would shuffle the images of a sequence with two."""
    assert model.processor is not None
    items = [ITEMS[2], ITEMS[1], ITEMS[0]]
    inputs = model.processor.encode_prompts([p for p, _ in items])
    pixels = pixels_of(model, [c for _, colors in items for c in colors])
    for images in ({"pixel_values": pixels}, {"image_features": model.get_image_features(pixels)}):
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        ids, expanded = model._expand_inputs_for_generation(2, False, inputs["input_ids"], **rest, **images)
        with torch.no_grad():
            twice, once = model(input_ids=ids, **expanded).logits, model(**inputs, **images).logits
        torch.testing.assert_close(twice, once.repeat_interleave(2, 0), atol=2e-4, rtol=1e-4)
    samples = answer(model, [p for p, _ in items], [c for _, cs in items for c in cs], num_beams=2)
    assert len(samples) == len(items)


def test_chat_answers_with_the_text_of_the_generated_tokens(model: Model) -> None:
    assert model.processor is not None
    image = Image.new("RGB", (32, 32), "red")
    said = model.chat("What color is it?", images=image, max_new_tokens=NEW_TOKENS)
    inputs = model.processor.encode_prompts([prompt("\nWhat color is it?", 0)])
    inputs["pixel_values"] = model.processor.image_processor([image])["pixel_values"]
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert said == model.processor.decode_answers(ids)[0]
    assert model.chat("no image", max_new_tokens=2) is not None


def test_chat_without_a_processor_says_how_to_get_one(tiny_model: Model) -> None:
    tiny_model.processor = None
    with pytest.raises(InputError, match=r"symphony_vlm\.load"):
        tiny_model.chat("Hi")


def test_a_wrong_number_of_placeholders_is_an_error_with_both_counts(tiny_model: Model) -> None:
    assert tiny_model.processor is not None
    inputs = tiny_model.processor.encode_prompts([ITEMS[2][0]])
    with pytest.raises(ValueError, match="32 image placeholder tokens but 16 image features"):
        tiny_model(**inputs, pixel_values=pixels_of(tiny_model, ["red"]))
