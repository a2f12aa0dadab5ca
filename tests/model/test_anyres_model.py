"""A model whose images are tiles: answers do not depend on batching, caching or how images come, places are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import symphony_vlm as sv
from symphony_vlm.data.sample import ImagePart, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.predictor import Predictor
from symphony_vlm.evaluation.task import EvaluationItem
from symphony_vlm.model.vlm import SymphonyVLMForConditionalGeneration as Model
from symphony_vlm.moe.configuration import MoEConfig
from symphony_vlm.serving.chat import ChatSession

NEW_TOKENS = 8
SHAPES = [(32, 32), (20, 90), (70, 66), (90, 20), (33, 64), (40, 41)]
"""Height and width; they take grids of all kinds."""


@pytest.fixture(params=["dense", "moe"])
def model(request: pytest.FixtureRequest, tiny_model_factory: Any) -> Model:
    """With weights large enough that greedy answers differ from prompt to prompt."""
    moe = MoEConfig(num_experts=4, router="symphony_smoe") if request.param == "moe" else None
    chosen: Model = tiny_model_factory(moe=moe, resize_mode="anyres")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in chosen.named_parameters():
            if weight.dim() >= 2:
                scale = 0.5 if name.startswith(("projector", "vision_tower")) else 0.25
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    chosen.generation_config.eos_token_id = None
    return chosen


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (*SHAPES[number], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt(question: str, *images: int) -> list[Message]:
    return [Message(role="user", parts=(*(ImagePart(index=i) for i in images), TextPart(text=question)))]


ITEMS: list[tuple[str, list[int]]] = [
    ("What color is the circle?", [0]),
    ("yes or no?", []),
    ("How many shapes are there? Two, three, or a hundred and five of them?", [1, 2]),
    ("a", [3]),
    ("What?", [4, 5, 0]),
]


def encode(model: Model, items: list[tuple[str, list[int]]]) -> dict[str, Any]:
    assert model.processor is not None
    counts = [model.processor.count_image_tokens([SHAPES[i] for i in images]) for _, images in items]
    inputs: dict[str, Any] = model.processor.encode_prompts([prompt(q, *range(len(im))) for q, im in items], counts)
    pictures = [picture(i) for _, images in items for i in images]
    return inputs | (dict(model.processor.image_processor(pictures)) if pictures else {})


def answers(model: Model, items: list[tuple[str, list[int]]], **settings: Any) -> list[list[int]]:
    inputs = encode(model, items)
    ids: Tensor = model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | settings))
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def test_batches_and_caches_give_the_answers_of_single_items(model: Model) -> None:
    single = [answers(model, [item])[0] for item in ITEMS]
    assert answers(model, ITEMS) == single
    assert answers(model, ITEMS, use_cache=False) == single
    assert len({tuple(ids) for ids in single}) == len(ITEMS)


@torch.no_grad()
def test_a_batch_of_different_grids_has_the_logits_of_single_items(model: Model) -> None:
    together = model(**encode(model, ITEMS)).logits
    for row, item in enumerate(ITEMS):
        logits = model(**encode(model, [item])).logits[0]
        # Logits of about 10; masked attention and other matrix shapes change the order of fp32 sums.
        torch.testing.assert_close(together[row, -len(logits) :], logits, atol=3e-4, rtol=1e-4)


@torch.no_grad()
def test_cached_features_stand_for_pixels(model: Model) -> None:
    inputs = encode(model, ITEMS)
    sizes = inputs["image_sizes"]
    towers = model.vision_tower(inputs["pixel_values"])
    for features in (
        model.get_image_features(inputs["pixel_values"], sizes),
        model.project_image_features(towers, sizes),
    ):
        rest = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        assert torch.equal(model(**rest, image_features=features).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="needs image_sizes"):
        model(**(inputs | {"image_sizes": None}))


@torch.no_grad()
def test_beams_and_samples_see_each_sequences_tiles_in_order(model: Model) -> None:
    inputs = encode(model, [ITEMS[2], ITEMS[1], ITEMS[4]])
    text = {name: inputs[name] for name in ("attention_mask", "position_ids")}
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    for images in (pixels, {"image_features": model.get_image_features(**pixels)}):
        ids, expanded = model._expand_inputs_for_generation(2, False, inputs["input_ids"], **text, **images)
        twice = model(input_ids=ids, **expanded).logits
        once = model(input_ids=inputs["input_ids"], **text, **images).logits
        torch.testing.assert_close(twice, once.repeat_interleave(2, 0), atol=3e-4, rtol=1e-4)
    assert len(answers(model, ITEMS, num_beams=2)) == len(ITEMS)
    single = [answers(model, [item], num_beams=2)[0] for item in ITEMS]
    assert answers(model, ITEMS, num_beams=2) == single


@torch.no_grad()
def test_swapping_two_images_moves_their_features_and_nothing_else(model: Model) -> None:
    assert model.processor is not None
    embedded: list[Tensor] = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    first, second = (encode(model, [("What?", order)]) for order in ([1, 3], [3, 1]))
    a, b = (model.processor.count_image_tokens([SHAPES[i]])[0] for i in (1, 3))
    features = model.get_image_features(first["pixel_values"], first["image_sizes"])
    for inputs in (first, second):
        model(**inputs)
    (here,), (there,) = embedded
    (start,) = (first["input_ids"][0] == model.config.image_token_id).nonzero()[0].tolist()
    end = start + a + b
    assert a != b and torch.equal(here[:start], there[:start]) and torch.equal(here[end:], there[end:])
    # Each image's features, in the order of the marks. Tiles in another place of a batch may round otherwise.
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(here[start:end], torch.cat([features[0], features[1]]), **close)
    torch.testing.assert_close(there[start:end], torch.cat([features[1], features[0]]), **close)


def test_chat_terminal_and_predictor_agree_with_generate(model: Model) -> None:
    assert model.processor is not None
    question, images = "What is it?", [1, 2]
    expected = model.processor.decode_answers(torch.tensor(answers(model, [("\n" + question, images)])))[0]
    pictures = [picture(i) for i in images]
    assert model.chat(question, pictures, max_new_tokens=NEW_TOKENS) == expected

    session = ChatSession(model)
    for image in pictures:
        session.add_image(image)
    assert session.ask(question, max_new_tokens=NEW_TOKENS) == expected
    session.add_image(picture(3))
    session.ask("And this?", max_new_tokens=NEW_TOKENS)
    assert [len(part) for part in session.image_features] == model.processor.count_image_tokens(
        [SHAPES[i] for i in (1, 2, 3)]
    )

    predictor = Predictor(model, batch_size=2, max_new_tokens=NEW_TOKENS)
    features = predictor.encode_images([np.asarray(picture(i)) for i in range(len(SHAPES))])
    items = [
        EvaluationItem(id=str(n), question=q, answers=("",), images=tuple(image_refs(len(im))), image_key=str(n))
        for n, (q, im) in enumerate(ITEMS)
    ]
    found = predictor.answer(items, [[features[i] for i in im] if im else None for _, im in ITEMS])
    for item, (_, images), answer in zip(items, ITEMS, found, strict=True):
        counts = model.processor.count_image_tokens([SHAPES[i] for i in images])
        inputs: dict[str, Any] = dict(model.processor.encode_prompts([item.messages], [counts]))
        if images:
            inputs |= dict(model.processor.image_processor([picture(i) for i in images]))
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert answer == model.processor.decode_answers(ids)[0]


def image_refs(number: int) -> list[Any]:
    from symphony_vlm.data.sample import ImageRef

    return [ImageRef(data=b"x", name=str(i)) for i in range(number)]


def test_the_processor_writes_each_images_own_number_of_placeholders(model: Model) -> None:
    assert model.processor is not None
    out = model.processor(images=[[picture(1), picture(2)], [picture(0)]], text=["<image>a<image>b", "<image>"])
    counts = model.processor.count_image_tokens([SHAPES[i] for i in (1, 2, 0)])
    placed = (out["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert placed == [counts[0] + counts[1], counts[2]] and len(set(counts)) == 3
    assert out["image_sizes"].tolist() == [list(SHAPES[i]) for i in (1, 2, 0)]
    assert torch.isfinite(model(**out).logits).all()
    spans = model.processor(
        images=[picture(1), picture(2)], text="x<image>a<image>b", return_text_replacement_offsets=True
    )["text_replacement_offsets"]
    mark, first = len("<image>"), 1 + counts[0] * len("<image>")
    assert spans == [
        [
            {"span": (1, 1 + mark), "new_span": (1, first)},
            {"span": (2 + mark, 2 + 2 * mark), "new_span": (first + 1, first + 1 + counts[1] * mark)},
        ]
    ]


def test_without_sizes_a_prompt_with_an_image_is_refused(model: Model) -> None:
    assert model.processor is not None
    with pytest.raises(InputError, match="depends on its size, which is not given"):
        model.processor.encode_prompts([prompt("What?", 0)])
    assert model.processor.encode_prompts([prompt("What?")])["input_ids"].shape[0] == 1


@torch.no_grad()
def test_a_saved_model_has_the_same_logits_and_a_newline_of_its_own(model: Model, tmp_path: Path) -> None:
    assert model.processor is not None and model.image_newline is not None
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = sv.load(tmp_path, device="cpu")
    assert again.image_newline is not None and torch.equal(again.image_newline, model.image_newline)
    assert torch.equal(again(**encode(again, ITEMS)).logits, model(**encode(model, ITEMS)).logits)


def test_tower_projector_and_newline_learn_and_probes_and_idle_ranks_use_them(model: Model) -> None:
    inputs = encode(model, ITEMS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("vision_tower", "projector", "image_newline")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    model.zero_grad()
    model._idle_vision_pass().backward()
    front = [p for n, p in model.named_parameters() if n.startswith(("vision_tower", "projector", "image_newline"))]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in front)
    model.eval()
    assert torch.isfinite(model(**model.probe_inputs()).logits).all()
