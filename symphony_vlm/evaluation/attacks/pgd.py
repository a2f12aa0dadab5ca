"""White-box attack on the pixels through the whole model: PGD, in the form of chs20/RobustVLM (arXiv 2402.12336)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from symphony_vlm.corruptions.randomness import corruption_rng
from symphony_vlm.evaluation.attacks.adaptive_ascent import MOMENTUM as ADAPTIVE_MOMENTUM
from symphony_vlm.evaluation.attacks.adaptive_ascent import ascend_adaptively
from symphony_vlm.evaluation.attacks.attack import Attack, Posed, worst
from symphony_vlm.evaluation.attacks.gradient_ascent import MOMENTUM, STEP, Ascent, ascend
from symphony_vlm.evaluation.attacks.reference_loss import ReferenceLoss, reference_answer
from symphony_vlm.evaluation.attacks.word_swap import decimal_text
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.metrics import Metric, mean_of
from symphony_vlm.evaluation.pictures import Picture
from symphony_vlm.evaluation.predictor import AnswersItems, Predictor
from symphony_vlm.evaluation.records import Record

__all__ = ["Apgd", "Pgd"]


@dataclass(frozen=True, kw_only=True)
class Pgd(Attack):
    """Raises the loss of the reference answer within ``|change| <= eps`` of every pixel value in [0, 1].

    Items are attacked one by one, so that the picture that comes out does not depend on the batch.

    Attributes:
        eps: budget.
        steps: gradients per start.
        restarts: random starts; the worst answer counts.
    """

    name: ClassVar[str] = "pgd"
    needs_gradient: ClassVar[bool] = True
    items_at_once: ClassVar[int | None] = 8
    _ascend: ClassVar[Callable[..., Ascent]] = staticmethod(ascend)
    eps: Fraction = Fraction(4, 255)
    steps: int = 10
    restarts: int = 1

    @property
    def spec(self) -> str:
        """``NAME:EPS:STEPS``, and the number of starts unless it is 1."""
        levels = self.eps * 255
        eps = f"{levels}/255" if levels.denominator == 1 and levels < 255 else f"{float(self.eps):.10g}"
        return f"{self.name}:{eps}:{self.steps}" + (f":{self.restarts}" if self.restarts != 1 else "")

    @property
    def parameters(self) -> dict[str, Any]:
        """Budget and algorithm."""
        return self._budget | {"step_size": STEP * float(self.eps) / self.steps, "momentum": MOMENTUM}

    @property
    def _budget(self) -> dict[str, Any]:
        return {
            "norm": "l_inf",
            "eps": float(self.eps),
            "steps": self.steps,
            "restarts": self.restarts,
            "start": "uniform in the ball",
            "loss": "mean cross entropy of the reference answer",
        }

    def applies_to(self, item: EvaluationItem) -> bool:
        """A picture and a reference answer."""
        return bool(item.images) and bool(item.answers) and bool(reference_answer(item).strip())

    def pose(
        self,
        item: EvaluationItem,
        pictures: Sequence[Picture],
        features: Sequence[Any] | None,
        predictor: AnswersItems,
        seed: int,
    ) -> list[Posed]:
        """For each start the attacked picture, then each of them rounded to 8 bits.

        Raises:
            InputError: there is no gradient to follow.
        """
        assert isinstance(predictor, Predictor)  # `require_gradients` has refused the others
        loss = ReferenceLoss(predictor.model, item)
        z = loss.squares([picture.pixels for picture in pictures])
        keys = [picture.sha256 for picture in pictures]
        eps = float(self.eps)
        noise = eps * _uniform(keys, "pgd_noise", self.eps, seed, z).sign()
        known = {
            "reference": reference_answer(item),
            "loss_clean": round(loss.value(z), 6),
            # Noise of the same size that knows nothing of the model: an attack that is no better has failed.
            "loss_noise": round(loss.value((z + noise).clamp(0, 1)), 6),
        }
        found = [self._attacked(loss, z, keys, restart, seed) for restart in range(self.restarts)]
        rounded = [(ascent.point * 255).round() / 255 for ascent in found]
        with torch.no_grad():
            posed = [
                Posed(item=item, features=loss.features(ascent.point), facts=known | _facts(ascent, z, restart))
                for restart, ascent in enumerate(found)
            ]
            return posed + [Posed(item=item, features=loss.features(point)) for point in rounded]

    def _attacked(self, loss: ReferenceLoss, z: Tensor, keys: Sequence[str], restart: int, seed: int) -> Ascent:
        eps = float(self.eps)
        start = eps * _uniform(keys, f"{self.name}{restart}", self.eps, seed, z)
        ascent = self._ascend(loss.with_gradient, z, eps=eps, steps=self.steps, start=start)
        # One rounding of fp32 on values up to 1.
        assert float((ascent.point - z).abs().max()) <= eps + 1e-6
        return ascent

    def conclude(self, posed: Sequence[Posed], scored: Sequence[Scored]) -> tuple[int, dict[str, Any]]:
        """The start with the worst answer; what the rounded pictures score stands beside."""
        scores = [one.score for one in scored]
        index = worst(scores[: self.restarts])
        rounded = self.restarts + worst(scores[self.restarts :])
        return index, dict(posed[index].facts) | {
            "rounded_score": scores[rounded],
            "rounded_parsed": scored[rounded].parsed,
        }

    def metrics(self, records: Mapping[str, Record]) -> list[Metric]:
        """The score after rounding to 8 bits, and how often the attack raised the loss more than noise did."""
        facts = {name: record["attack_facts"] for name, record in records.items() if record.get("attack_facts")}

        def rounded(outcome: Outcome) -> float | None:
            return facts[outcome.item.id]["rounded_score"] if outcome.item.id in facts else None

        def beats_noise(outcome: Outcome) -> float | None:
            fact = facts.get(outcome.item.id)
            return None if fact is None else float(fact["loss"] > fact["loss_noise"])

        return [mean_of("score_8bit", rounded), mean_of("loss_above_noise", beats_noise)]


@dataclass(frozen=True, kw_only=True)
class Apgd(Pgd):
    """The same with a step size that adapts (`adaptive_ascent`), the attack of RobustVLM."""

    name: ClassVar[str] = "apgd"
    _ascend: ClassVar[Callable[..., Ascent]] = staticmethod(ascend_adaptively)

    @property
    def parameters(self) -> dict[str, Any]:
        """Budget and algorithm."""
        return self._budget | {"step_size": "from eps, halved at checkpoints", "momentum": ADAPTIVE_MOMENTUM}


def _facts(ascent: Ascent, z: Tensor, restart: int) -> dict[str, Any]:
    return {
        "loss": round(ascent.loss, 6),
        "gradient_l1": float(f"{ascent.gradient_l1:.3g}"),
        "linf": round(float((ascent.point - z).abs().max()), 6),
        "restart": restart,
    }


def _uniform(keys: Sequence[str], name: str, eps: Fraction, seed: int, like: Tensor) -> Tensor:
    """Draws of U(-1, 1) for each picture, the same on every device."""
    draws = [
        corruption_rng(key, name, decimal_text(float(eps)), seed).uniform(-1, 1, size=tuple(like.shape[1:]))
        for key in keys
    ]
    return torch.from_numpy(np.stack(draws)).to(like)
