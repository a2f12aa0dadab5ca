"""Word swap in questions about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from symphony_vlm.evaluation.attacks.attack import Attack, Posed
from symphony_vlm.evaluation.attacks.question_parts import question_span
from symphony_vlm.evaluation.attacks.word_swap import (
    DEFAULT_RATE,
    STOP_WORDS_SHA256,
    Profile,
    decimal_text,
    word_swap,
)
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.pictures import Picture
from symphony_vlm.evaluation.predictor import AnswersItems

__all__ = ["QuestionSwap"]


@dataclass(frozen=True, kw_only=True)
class QuestionSwap(Attack):
    """Words of the question, and of nothing else in the prompt, become ``AAA``."""

    name: ClassVar[str] = "word_swap"
    rate: float = DEFAULT_RATE
    profile: Profile = "textattack"
    token: str = "AAA"

    @property
    def spec(self) -> str:
        """``word_swap:RATE``, and the profile unless it is ``textattack``."""
        return f"{self.name}:{decimal_text(self.rate)}" + (f":{self.profile}" if self.profile != "textattack" else "")

    @property
    def parameters(self) -> dict[str, Any]:
        """Rate, profile, token, and which words stay."""
        budget = {"rate": self.rate, "profile": self.profile, "token": self.token}
        return budget | {"stop_words_sha256": STOP_WORDS_SHA256}

    def applies_to(self, item: EvaluationItem) -> bool:
        """Whether there is a question."""
        start, end = question_span(item)
        return end > start

    def pose(
        self,
        item: EvaluationItem,
        pictures: Sequence[Picture],
        features: Sequence[Any] | None,
        predictor: AnswersItems,
        seed: int,
    ) -> list[Posed]:
        """The one attacked question."""
        start, end = question_span(item)
        found = word_swap(
            item.question[start:end], self.rate, token=self.token, profile=self.profile, seed=seed, line_index=0
        )
        question = item.question[:start] + found.text + item.question[end:]
        facts = {"n_words": found.n_words, "n_eligible": found.n_eligible, "n_swapped": found.n_swapped}
        return [
            Posed(
                item=replace(item, question=question, asked=found.text),
                features=features,
                facts=facts | {"realised_rate": round(found.realised_rate, 6)},
            )
        ]
