"""PGD: the ascent against a loop by hand, the loss against the training loss, and the tests for masked gradients."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from symphony_vlm.data.sample import ImageRef, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.attacks.adaptive_ascent import ascend_adaptively
from symphony_vlm.evaluation.attacks.gradient_ascent import ascend
from symphony_vlm.evaluation.attacks.pgd import Apgd, Pgd
from symphony_vlm.evaluation.attacks.prepared import require_gradients
from symphony_vlm.evaluation.attacks.reference_loss import ReferenceLoss, reference_answer
from symphony_vlm.evaluation.item import EvaluationItem, Scored
from symphony_vlm.evaluation.opening import OpenedModel
from symphony_vlm.evaluation.pictures import Picture
from symphony_vlm.evaluation.predictor import Predictor

Model = Any


def _item(answers: tuple[str, ...] = ("yes",)) -> EvaluationItem:
    image = ImageRef(name="a.png", data=b"")
    return EvaluationItem(id="q", question="Is it red?", answers=answers, images=(image,), image_key="k")


def _picture(seed: int = 0) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    return Picture(hashlib.sha256(pixels.tobytes()).hexdigest(), pixels)


def _pose(model: Model, attack: Pgd, seed: int = 0, picture: Picture | None = None) -> Any:
    predictor = Predictor(model, batch_size=4, max_new_tokens=2)
    return attack.pose(_item(), [picture or _picture()], None, predictor, seed)


def test_the_ascent_is_the_formula_of_the_specification() -> None:
    """Against the update written element by element in numpy, on a loss with a known gradient."""
    rng = np.random.default_rng(0)
    z, centre = rng.random(12), rng.random(12)
    start = rng.uniform(-0.1, 0.1, 12)
    eps, steps = 0.1, 7

    def loss_and_gradient(x: Tensor) -> tuple[float, Tensor]:
        offset = x - torch.from_numpy(centre)
        return float((offset**3).sum()), 3 * offset**2 * offset.sign()

    found = ascend(loss_and_gradient, torch.from_numpy(z), eps=eps, steps=steps, start=torch.from_numpy(start))
    x, velocity, points = np.clip(z + start, 0, 1), np.zeros(12), []
    for _ in range(steps):
        points.append(x)
        gradient = 3 * (x - centre) ** 2 * np.sign(x - centre)
        velocity = 0.9 * velocity + np.sign(gradient)
        delta = np.clip(x - z + 2.5 * eps / steps * np.sign(velocity), -eps, eps)
        x = np.clip(z + delta, 0, 1)
    points.append(x)
    losses = [((point - centre) ** 3).sum() for point in points]
    # The same operations in fp64; sums in another order.
    np.testing.assert_allclose(found.point.numpy(), points[int(np.argmax(losses))], atol=1e-12)
    assert found.loss == pytest.approx(max(losses))
    assert found.start_loss == pytest.approx(losses[0])


def test_the_iterate_of_the_largest_loss_is_kept_not_the_last() -> None:
    calls: list[Tensor] = []

    def falling(x: Tensor) -> tuple[float, Tensor]:
        calls.append(x)
        return -float(len(calls)), torch.ones_like(x)

    found = ascend(falling, torch.full((3,), 0.5), eps=0.1, steps=4, start=torch.zeros(3))
    assert found.point is calls[0]
    assert (found.loss, len(calls)) == (-1.0, 5)


def test_the_adaptive_ascent_follows_the_table_of_checkpoints_of_its_paper() -> None:
    """Against the algorithm written out in numpy, on a loss that oscillates so that steps are halved."""
    rng = np.random.default_rng(3)
    z, start = rng.random(6), rng.uniform(-0.2, 0.2, 6)
    eps, n = 0.2, 40

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float(np.sin(40 * x).sum()), 40 * np.cos(40 * x)

    def project(x: np.ndarray) -> np.ndarray:
        return np.clip(z + np.clip(x - z, -eps, eps), 0, 1)

    # Windows of 8, 7, 6, 5, ... of 40 steps: 0.22 n = 8.8, then 0.03 n = 1.2 less each, at least 0.06 n = 2.4.
    checkpoints = list(np.cumsum([8, 7, 6, 5, 4, 3, 2, 2, 2, 2]))
    points, losses = [project(z + start)], []
    f, g = function(points[0])
    losses.append(f)
    best = (f, points[0], g)
    step, kept_last, best_at_last, previous_checkpoint, halvings = eps, False, f, 0, 0
    x, x_old = points[0], points[0]
    for k in range(n):
        y = project(x + step * np.sign(g))
        new = y if k == 0 else project(x + 0.75 * (y - x) + 0.25 * (x - x_old))
        x_old, x = x, new
        f, g = function(x)
        losses.append(f)
        if f > best[0]:
            best = (f, x, g)
        if k + 1 in checkpoints:
            length = k + 1 - previous_checkpoint
            rose = sum(losses[j + 1] > losses[j] for j in range(previous_checkpoint, k + 1))
            halve = rose <= 0.75 * length or (kept_last and best[0] == best_at_last)
            kept_last, best_at_last, previous_checkpoint = not halve, best[0], k + 1
            if halve:
                halvings += 1
                step, x, g = step / 2, best[1], best[2]

    def in_torch(x: Tensor) -> tuple[float, Tensor]:
        value, gradient = function(x.numpy())
        return value, torch.from_numpy(gradient)

    found = ascend_adaptively(in_torch, torch.from_numpy(z), eps=eps, steps=n, start=torch.from_numpy(start))
    assert halvings > 2
    np.testing.assert_allclose(found.point.numpy(), best[1], atol=1e-12)
    assert found.loss == pytest.approx(best[0])
    assert found.start_loss == losses[0]


@pytest.mark.parametrize("ascent", [ascend, ascend_adaptively])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_zero_or_not_finite_is_an_error_and_no_robustness(value: float, ascent: Any) -> None:
    def masked(x: Tensor) -> tuple[float, Tensor]:
        return 1.0, torch.full_like(x, value)

    with pytest.raises(InputError, match="gradient of the loss at the picture is"):
        ascent(masked, torch.zeros(3), eps=0.1, steps=2, start=torch.zeros(3))


def test_the_loss_at_the_clean_picture_is_the_cross_entropy_of_training(tiny_moe_model: Model) -> None:
    item, picture = _item(), _picture()
    loss = ReferenceLoss(tiny_moe_model, item)
    processor = tiny_moe_model.processor
    answer = Message(role="assistant", parts=(TextPart(text="yes"),))
    encoded = processor.encode([*item.messages, answer])
    with torch.no_grad():
        output = tiny_moe_model(
            input_ids=torch.tensor([encoded.input_ids]),
            labels=torch.tensor([encoded.labels]),
            attention_mask=torch.ones(1, len(encoded.input_ids), dtype=torch.long),
            **processor.image_processor([picture.pixels]),
        )
    # fp32; the head runs on fewer positions here, which may change the order of sums. The router losses, which are
    # 0.01 and more of the total here, are no part of it.
    torch.testing.assert_close(
        torch.tensor(loss.value(loss.squares([picture.pixels]))), output.loss_parts["cross_entropy"], atol=1e-5, rtol=0
    )
    assert float(output.loss - output.loss_parts["cross_entropy"]) > 1e-3


def test_eight_bit_pictures_give_bit_equal_features(tiny_moe_model: Model) -> None:
    """What is attacked is the model that answers: normalisation of [0, 1] values equals that of the image processor."""
    picture = _picture()
    loss = ReferenceLoss(tiny_moe_model, _item())
    with torch.no_grad():
        (features,) = loss.features(loss.squares([picture.pixels]))
    (expected,) = Predictor(tiny_moe_model, batch_size=1, max_new_tokens=1).encode_images([picture.pixels])
    assert torch.equal(features, expected)


def test_the_gradient_at_the_pixels_is_that_of_finite_differences(tiny_moe_model: Model) -> None:
    """In the direction of the gradient the slope is its length, through tower, routers and experts."""
    loss = ReferenceLoss(tiny_moe_model, _item())
    z = loss.squares([_picture().pixels]) * 0.5 + 0.25
    _, gradient = loss.with_gradient(z)
    direction = gradient / gradient.norm()
    step = 2e-2
    slope = (loss.value(z + step * direction) - loss.value(z - step * direction)) / (2 * step)
    # fp32: the loss, about 6, is known to some 1e-6, so the slope to 5e-5 of 0.0865; found 3e-4 apart.
    assert slope == pytest.approx(float(gradient.norm()), rel=0.005)


@pytest.mark.parametrize(("kind", "restarts"), [(Pgd, 1), (Pgd, 2), (Apgd, 1)])
def test_the_change_stays_in_the_ball_and_raises_the_loss_above_noise(
    tiny_moe_model: Model, kind: type[Pgd], restarts: int
) -> None:
    attack = kind(eps=Fraction(8, 255), steps=10, restarts=restarts)
    posed = _pose(tiny_moe_model, attack)
    assert len(posed) == 2 * restarts
    for one in posed[:restarts]:
        facts = one.facts
        assert 0 < facts["linf"] <= 8 / 255 + 1e-6
        assert facts["loss"] > facts["loss_noise"]
        assert facts["loss"] > facts["loss_clean"]
        assert facts["gradient_l1"] > 0
        assert facts["reference"] == "yes"


def test_the_loss_grows_with_the_budget_and_with_steps(tiny_moe_model: Model) -> None:
    by_eps = [
        _pose(tiny_moe_model, Pgd(eps=eps, steps=8))[0].facts["loss"] for eps in map(Fraction, ("1/255", "8/255", "1"))
    ]
    assert by_eps == sorted(by_eps)
    few, many = (_pose(tiny_moe_model, Pgd(eps=Fraction(8, 255), steps=n))[0].facts["loss"] for n in (1, 20))
    assert many > few


def test_equal_keys_give_equal_pictures_and_seeds_others(tiny_moe_model: Model) -> None:
    attack = Pgd(steps=2)
    base, again, other = (_pose(tiny_moe_model, attack, seed)[0].features[0] for seed in (0, 0, 1))
    assert torch.equal(base, again)
    assert not torch.equal(base, other)


@pytest.mark.parametrize("router", ["smoe", "symphony_smoe"])
def test_an_attack_changes_nothing_in_the_model(router: str, tiny_model_factory: Callable[..., Model]) -> None:
    from symphony_vlm.moe.configuration import MoEConfig

    model = tiny_model_factory(moe=MoEConfig(num_experts=4, router=router))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    counters = copy.deepcopy(model.routing.statistics.__dict__)
    _pose(model, Pgd(steps=3))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, buffers[name]), name
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert repr(model.routing.statistics.__dict__) == repr(counters)
    assert not model.training


def test_the_worst_start_counts_and_rounded_pictures_stand_beside() -> None:
    from symphony_vlm.evaluation.attacks.attack import Posed

    attack = Pgd(restarts=2)
    posed = [Posed(item=_item(), features=None, facts={"restart": i}) for i in range(2)]
    posed += [Posed(item=_item(), features=None)] * 2
    scored = [Scored(score=score, parsed=str(i)) for i, score in enumerate((1.0, 0.0, 1.0, 1.0))]
    assert attack.conclude(posed, scored) == (1, {"restart": 1, "rounded_score": 1.0, "rounded_parsed": "2"})


def test_the_reference_is_the_most_frequent_answer_the_first_of_equals() -> None:
    assert reference_answer(_item(("a", "b", "b", "c", "c"))) == "b"
    assert reference_answer(_item(("x",))) == "x"


def test_what_cannot_be_attacked_is_refused(tiny_model_factory: Callable[..., Model]) -> None:
    attack = Pgd()
    assert not attack.applies_to(EvaluationItem(id="q", question="?", answers=("a",)))
    assert not attack.applies_to(_item(("",)))
    stock = OpenedModel(model=None, processor=None, router="llava", is_stock=True)
    with pytest.raises(InputError, match="llava of transformers"):
        require_gradients([attack], stock)
    tiles = tiny_model_factory(resize_mode="anyres")
    with pytest.raises(InputError, match="overlapping tiles"):
        require_gradients([attack], OpenedModel(model=tiles, processor=tiles.processor, router="dense", is_stock=False))
