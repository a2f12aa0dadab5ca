"""What can be scored without looking: constant answers, and a language model that never sees the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from symphony_vlm.data.conversation import encode_conversation
from symphony_vlm.data.sample import Sample
from symphony_vlm.data.templates import resolve_template, stop_token_ids
from symphony_vlm.evaluation.statistics import clustered_bootstrap_mean
from symphony_vlm.evaluation.task import EvaluationItem, Task

__all__ = ["constant_baselines", "same_question_baseline", "text_only_baseline"]


def constant_baselines(task: str, items: Sequence[EvaluationItem], *, seed: int) -> list[dict[str, Any]]:
    """The best constant answer, over all items and per group: chosen on the items themselves, so an upper bound.

    Items whose answers are not public are left out.
    """
    items = [item for item in items if item.answers]
    if not items:
        return []
    overall = Counter(item.answers[0] for item in items).most_common(1)[0][0]
    by_group: dict[str | None, Counter[str]] = {}
    for item in items:
        by_group.setdefault(item.group, Counter())[item.answers[0]] += 1
    best = {group: counter.most_common(1)[0][0] for group, counter in by_group.items()}
    baselines = [_baseline(f"constant answer ({overall!r})", task, items, [overall] * len(items), seed)]
    if len(best) > 1:
        answers = [best[item.group] for item in items]
        baselines.append(_baseline("best constant answer per question type", task, items, answers, seed))
    return baselines


def same_question_baseline(
    task: Task, items: Sequence[EvaluationItem], training: Sequence[Sample], *, seed: int
) -> dict[str, Any]:
    """The most frequent training answer to the same question, which is as much as words alone can say.

    A question never asked in training gets the most frequent answer to those of its form: the same first two words
    and, for a choice, the same last line.

    Args:
        task: scores the answers.
        items: the questions.
        training: the training conversations.
        seed: of the interval.
    """
    by_text: dict[Any, Counter[str]] = {}
    for sample in training:
        for asked, given in pairwise(sample.messages):
            if (asked.role, given.role) == ("user", "assistant"):
                for key in (asked.text.strip(), _form(asked.text), None):
                    by_text.setdefault(key, Counter())[given.text] += 1

    def answer(question: str) -> str:
        counted = by_text.get(question.strip()) or by_text.get(_form(question)) or by_text[None]
        return counted.most_common(1)[0][0]

    answers = [answer(item.question) for item in items]
    name = "text only (most frequent training answer to the same question)"
    return _baseline(name, task.name, items, answers, seed, task)


def _form(question: str) -> tuple[str, ...]:
    lines = question.strip().splitlines()
    return (*lines[0].split()[:2], *lines[1:][-1:])


@torch.no_grad()
def text_only_baseline(
    language_model: Any, tokenizer: Any, template: str, task: Task, items: Sequence[EvaluationItem], *, seed: int
) -> dict[str, Any]:
    """A language model trained on the same conversations' text answers the questions without the pictures.

    Args:
        language_model: a causal LM in evaluation mode.
        tokenizer: its tokenizer.
        template: name of the conversations' layout.
        task: scores the answers.
        items: the questions.
        seed: of the interval.
    """
    layout = resolve_template(template, tokenizer)
    answers = []
    for start in range(0, len(items), 64):
        rows = [_text_prompt(item, layout, tokenizer) for item in items[start : start + 64]]
        longest = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        out = language_model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            eos_token_id=stop_token_ids(layout, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    predictions = [answer.strip() for answer in answers]
    return _baseline("text only (language model without the picture)", task.name, items, predictions, seed, task)


def _text_prompt(item: EvaluationItem, layout: Any, tokenizer: Any) -> list[int]:
    from symphony_vlm.training.text import without_images

    encoded = encode_conversation(
        without_images(item.messages),
        template=layout,
        tokenizer=tokenizer,
        image_token_id=-1,
        num_image_tokens=0,
        generation_prompt=True,
    )
    return encoded.input_ids


def _baseline(
    name: str, task: str, items: Sequence[EvaluationItem], answers: Sequence[str], seed: int, rule: Task | None = None
) -> dict[str, Any]:
    if rule is None:
        scores = [float(answer in item.answers) for answer, item in zip(answers, items, strict=True)]
    else:
        scores = [rule.score(answer, item).score for answer, item in zip(answers, items, strict=True)]
    interval = clustered_bootstrap_mean(np.array(scores), [item.image_key for item in items], seed=seed)
    return {
        "name": name,
        "task": task,
        "metric": "accuracy",
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n_items": len(items),
    }
